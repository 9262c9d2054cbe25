//! A seized task: stopped, looked at, resumed.

use std::io;

use libc::user_regs_struct;
use nix::unistd::Pid;

use crate::sys::{
    memory,
    ptrace::{self, Seize, Stop},
};

/// `PTRACE_EVENT_STOP`.
const EVENT_STOP: i32 = 128;

/// A task that this thread has seized and stopped.
pub(crate) struct Tracee {
    /// Its thread id as this process sees it.
    pub(crate) tid: Pid,
    /// Registers it goes on with.
    pub(crate) regs: user_regs_struct,
    /// Signals it blocks.
    pub(crate) mask: u64,
    /// Found stopped by job control: it stays so when released.
    pub(crate) job_stopped: bool,
}

impl Tracee {
    /// Seizes `tid` and asks it to stop; [`Tracee::settle`] waits for it.
    pub(crate) fn request_stop(tid: Pid, how: Seize) -> io::Result<()> {
        ptrace::seize(tid, how)?;
        ptrace::interrupt(tid)
    }

    /// Waits for the stop that [`Tracee::request_stop`] asked for.
    ///
    /// `None` when the task ended meanwhile.
    pub(crate) fn settle(tid: Pid) -> io::Result<Option<Self>> {
        let job_stopped = loop {
            match ptrace::wait(tid)? {
                Stop::Gone => return Ok(None),
                // The group-stop of a task stopped by SIGSTOP, SIGTSTP, SIGTTIN
                // or SIGTTOU carries that signal, the one asked for SIGTRAP.
                Stop::Event { event: EVENT_STOP, signal } => break signal != libc::SIGTRAP,
                // About to leave the kernel for another reason (a signal to be
                // delivered): let it be delivered, the stop asked for follows
                // before the handler's first instruction.
                Stop::Signal(signal) => ptrace::cont_with(tid, signal)?,
                Stop::Event { .. } => ptrace::cont(tid)?,
            }
        };
        let regs = ptrace::registers(tid)?;
        let mask = ptrace::signal_mask(tid)?;
        let mut tracee = Self { tid, regs, mask, job_stopped };
        tracee.mend_interrupted()?;
        Ok(Some(tracee))
    }

    /// Points the task at where it was found, still stopped.
    ///
    /// The mask goes first: between the two calls the task may be on its way
    /// back from the stub, which ends with a mask of its own.
    pub(crate) fn go_home(&self) -> io::Result<()> {
        ptrace::set_signal_mask(self.tid, self.mask)?;
        ptrace::set_registers(self.tid, &self.regs)
    }

    /// Lets the task go on with [`Tracee::regs`] and [`Tracee::mask`].
    pub(crate) fn release(&self) -> io::Result<()> {
        self.go_home()?;
        ptrace::detach(self.tid)
    }

    /// Takes the task out of a restartable sequence as a preemption would.
    ///
    /// Anything we make the task execute would let the kernel forget that it
    /// was inside one, and the sequence would go on as if it were atomic.
    pub(crate) fn leave_rseq(&mut self) -> io::Result<()> {
        let rseq = match ptrace::rseq(self.tid) {
            Ok(rseq) if rseq.area != 0 => rseq,
            _ => return Ok(()),
        };
        let mut word = [0; 8];
        memory::read_exact(self.tid, &mut word, rseq.area + 8)?;
        let section = u64::from_le_bytes(word);
        if section == 0 {
            return Ok(());
        }
        // struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip.
        let mut raw = [0; 32];
        memory::read_exact(self.tid, &mut raw, section)?;
        let field =
            |i: usize| u64::from_le_bytes(raw[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
        let (start, len, abort) = (field(1), field(2), field(3));
        if self.regs.rip.wrapping_sub(start) < len {
            self.regs.rip = abort;
        }
        Ok(())
    }

    /// The registers with which the task resumes when the kernel no longer
    /// knows that it was stopped inside a syscall: the call is made anew.
    pub(crate) fn portable_regs(&self) -> user_regs_struct {
        let mut regs = self.regs;
        if in_interrupted_syscall(&regs) {
            regs.rip -= 2;
            regs.rax = regs.orig_rax;
        }
        regs.orig_rax = u64::MAX;
        regs
    }

    /// Mends what the stop itself has interrupted: these calls return EINTR
    /// even though no signal was delivered, so they are made anew. In the task
    /// itself at once: it must not be our death that lets the error out.
    fn mend_interrupted(&mut self) -> io::Result<()> {
        if self.regs.orig_rax.cast_signed() >= 0
            && self.regs.rax.cast_signed() == -i64::from(libc::EINTR)
            && NEVER_RESTARTED.contains(&self.regs.orig_rax.cast_signed())
        {
            self.regs.rip -= 2;
            self.regs.rax = self.regs.orig_rax;
            self.regs.orig_rax = u64::MAX;
            ptrace::set_registers(self.tid, &self.regs)?;
        }
        Ok(())
    }
}

/// Whether the task stopped inside a syscall that waits to be restarted.
fn in_interrupted_syscall(regs: &user_regs_struct) -> bool {
    // ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK: kernel
    // internal, never seen by a program.
    regs.orig_rax.cast_signed() >= 0 && matches!(regs.rax.cast_signed(), -512 | -513 | -514 | -516)
}

/// Syscalls that answer EINTR to any interruption (`signal(7)`: never
/// restarted) although they have waited for nothing they would lose.
const NEVER_RESTARTED: [i64; 16] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_io_getevents,
    // With SO_RCVTIMEO or SO_SNDTIMEO (never connect: its state has changed).
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
];
