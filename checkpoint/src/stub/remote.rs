//! The stub at work in one process.
//!
//! On the source it is brought in through unused bytes at the end of an
//! executable page, normally the vDSO's: from there a trampoline maps the data
//! area, and the loop itself runs there too. At every instant from then on the
//! target finds its own way back should the engine die; the code between
//! [`Remote::install`] and [`Remote::remove`] never leaves it without one.

use std::io;

use libc::user_regs_struct;
use nix::unistd::Pid;

use super::{
    Batch, Buf, Call, Tracee, code, frame, healed_offset,
    told::{SignalUse, Told},
    told_offset,
};
use crate::{
    proc::{Vma, VmaKind},
    sys::{
        memory::{self, PAGE, PAGE_LEN},
        ptrace::{self, Stop},
    },
};

/// Bytes of the data area: two slots of header and frame, then the batch. The
/// leader keeps the first slot: it waits on its way home while other threads,
/// one after the other, use the second.
pub(crate) const DATA_LEN: u64 = AREA as u64;
const AREA: usize = 512 << 10;
/// Where the frame lies in a slot, aligned as xsave wants it.
const FRAME_AT: u64 = 256;
const SLOT: usize = (256 + frame::LEN).next_multiple_of(PAGE_LEN);
const SLOT_LEN: u64 = SLOT as u64;
/// Where the header marks with a zero that it holds a borrowed signal's action.
const SAVED_MARK_AT: u64 = 12;
/// Where the header holds it.
const SAVED_ACTION_AT: u64 = 32;
/// Where the header holds the set of SIGTRAP; a timeout of zero follows.
const TRAP_AT: u64 = 64;
/// Bytes of the header up to that timeout.
const HEADER_LEN: usize = 72;
/// Where batches lie in the area.
const BATCH_AT: u64 = 2 * SLOT_LEN;
/// Bytes of unused executable memory it takes.
const CODE_LEN: usize = frame::TRAMPOLINE + 256;

/// Places of the stub in a target.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Start of the loop.
    pub(crate) code: u64,
    /// Start of the data area.
    pub(crate) data: u64,
}

/// The stub in one process, run by one of its threads.
#[derive(Clone)]
pub(crate) struct Remote {
    place: Place,
    /// Where header and frame of this thread lie.
    slot: u64,
    /// Thread group and thread as the target sees itself.
    ids: (i32, i32),
    signal: Told,
}

/// What a batch returned.
pub(crate) struct Results<'b> {
    batch: &'b Batch,
    memory: Vec<u8>,
    /// Tasks born attached while it ran, as we see them.
    pub(crate) born: Vec<Pid>,
}

impl Results<'_> {
    /// What `call` returned: `Err` for an errno, and for a call not reached.
    pub(crate) fn get(&self, call: Call) -> io::Result<u64> {
        match Batch::result(&self.memory, call) {
            Some(errno @ -4095..=-1) => Err(errno_error(errno)),
            Some(value) => Ok(value.cast_unsigned()),
            None => Err(io::Error::from_raw_os_error(libc::ECANCELED)),
        }
    }

    /// What is in `buf` now.
    pub(crate) fn bytes(&self, buf: Buf) -> &[u8] {
        self.batch.buffer(&self.memory, buf)
    }

    /// The little-endian integer at `at` in `buf`.
    pub(crate) fn u64(&self, buf: Buf, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(buf)[at..at + 8].try_into().expect("eight bytes"))
    }

    /// The little-endian integer at `at` in `buf`.
    pub(crate) fn u32(&self, buf: Buf, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(buf)[at..at + 4].try_into().expect("four bytes"))
    }
}

fn errno_error(ret: i64) -> io::Error {
    io::Error::from_raw_os_error(i32::try_from(-ret).expect("an errno"))
}

impl Remote {
    /// Brings the stub into a stopped process of the source.
    ///
    /// `vmas` is its whole memory map, `signals` what its threads do with them.
    /// What engines left that died here goes from both the process and `vmas`.
    pub(crate) fn install(
        task: &mut Tracee,
        others: &[Tracee],
        ids: (i32, i32),
        vmas: &mut Vec<Vma>,
        signals: &SignalUse,
    ) -> io::Result<Self> {
        let tasks = std::iter::once(&*task).chain(others);
        let used: Vec<u64> = tasks.map(|task| task.regs.rip).collect();
        task.leave_rseq()?;
        let slack = find_slack(task.tid, vmas)?;
        let lender = Lender { slack, ids, signal: signals.choose() };
        lender.remove_leftovers(task, vmas, &used)?;
        let data = find_hole(vmas, DATA_LEN)
            .ok_or_else(|| io::Error::other("no room for the stub in the address space"))?;
        let code_at = slack + frame::TRAMPOLINE as u64;
        let args = [
            data,
            DATA_LEN,
            (libc::PROT_READ | libc::PROT_WRITE).cast_unsigned().into(),
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE)
                .cast_unsigned()
                .into(),
            u64::MAX,
            0,
        ];
        let mapped = lender.syscall(task, libc::SYS_mmap, args)?;
        let place = Place { code: code_at, data };
        if mapped != data.cast_signed() {
            // The trampoline takes the task home.
            return Err(if mapped < 0 {
                errno_error(mapped)
            } else {
                io::Error::other("the stub was mapped elsewhere")
            });
        }
        let remote = Self { place, slot: data, ids, signal: lender.signal };
        remote.enter(task)?;
        Ok(remote)
    }

    /// The stub of a process on the destination, where the skeleton brought it.
    pub(crate) fn at(place: Place, ids: (i32, i32)) -> Self {
        // A skeleton has every signal at its default; urgent data is ignored.
        let signal = Told { number: libc::SIGURG, borrowed: false };
        Self { place, slot: place.data, ids, signal }
    }

    /// The same stub, lent to another thread of the process.
    pub(crate) fn lend(&self, task: &mut Tracee, tid: i32) -> io::Result<Self> {
        task.leave_rseq()?;
        let slot = self.place.data + SLOT_LEN;
        let lent = Self { slot, ids: (self.ids.0, tid), ..self.clone() };
        lent.enter(task)?;
        Ok(lent)
    }

    /// The same stub in a thread, or in a copy, of a process of the destination.
    pub(crate) fn of(&self, ids: (i32, i32)) -> Self {
        Self { ids, ..self.clone() }
    }

    /// Lays the way home and points the thread at it: from here on it needs us
    /// for nothing.
    fn enter(&self, task: &Tracee) -> io::Result<()> {
        self.write_frame(task)?;
        let rip = self.place.code + healed_offset();
        ptrace::set_registers(task.tid, &user_regs_struct { rip, ..self.batch_regs(task) })
    }

    /// Tells with another signal than before: `number` is queued in the target.
    pub(crate) fn tell_with(&mut self, number: i32) {
        self.signal = Told { number, borrowed: false };
    }

    pub(crate) fn place(&self) -> Place {
        self.place
    }

    /// Start of the loop.
    pub(crate) fn code(&self) -> u64 {
        self.place.code
    }

    /// Runs from other executable memory from now on.
    pub(crate) fn move_code(&mut self, code: u64) {
        self.place.code = code;
    }

    /// Largest batch, in bytes.
    pub(crate) const fn capacity() -> usize {
        AREA - 2 * SLOT
    }

    /// Lays the way home of `task` into the data area.
    fn write_frame(&self, task: &Tracee) -> io::Result<()> {
        let base = self.slot + FRAME_AT;
        let xstate = ptrace::xstate(task.tid)?;
        let raw = frame::encode(base, &task.portable_regs(), task.mask, &xstate);
        memory::write_exact(task.tid, &raw, base)?;
        self.write_header(task)
    }

    /// Ids and signal for the end of a batch, the frame for the way home. The
    /// word between says by not being zero that no action waits to be put back.
    fn write_header(&self, task: &Tracee) -> io::Result<()> {
        let mut header = Vec::with_capacity(24);
        header.extend_from_slice(&self.ids.0.to_le_bytes());
        header.extend_from_slice(&self.ids.1.to_le_bytes());
        header.extend_from_slice(&self.signal.number.to_le_bytes());
        header.extend_from_slice(&1_u32.to_le_bytes());
        header.extend_from_slice(&(self.slot + FRAME_AT + 8).to_le_bytes());
        memory::write_exact(task.tid, &header, self.slot)?;
        memory::write_exact(task.tid, &frame::SIGTRAP.to_le_bytes(), self.slot + TRAP_AT)
    }

    fn batch_regs(&self, task: &Tracee) -> user_regs_struct {
        user_regs_struct {
            rip: self.place.code,
            rbx: self.place.data + BATCH_AT,
            r12: self.slot,
            orig_rax: u64::MAX,
            ..task.regs
        }
    }

    /// Executes `batch` in the stopped `task` and reads back its results.
    ///
    /// A checked call that fails is an error which names the call.
    pub(crate) fn run<'b>(&self, task: &Tracee, batch: &'b Batch) -> io::Result<Results<'b>> {
        let results = self.try_run(task, batch)?;
        match batch.failure(&results.memory) {
            None => Ok(results),
            Some((nr, _, errno)) => {
                let err = io::Error::from_raw_os_error(errno);
                Err(io::Error::new(err.kind(), format!("{}: {err}", syscall_name(nr))))
            }
        }
    }

    /// Executes `batch` and leaves the judgement of failed calls to the caller.
    pub(crate) fn try_run<'b>(&self, task: &Tracee, batch: &'b Batch) -> io::Result<Results<'b>> {
        if batch.size() > Self::capacity() {
            return Err(io::Error::other("batch too large for the stub"));
        }
        let tid = task.tid;
        let base = self.place.data + BATCH_AT;
        self.write_header(task)?;
        if self.signal.borrowed {
            self.borrow_signal(task)?;
        }
        memory::write_exact(tid, &batch.encode(base), base)?;
        let born = self.execute(task)?;
        let mut memory = vec![0; batch.size()];
        memory::read_exact(tid, &mut memory, base)?;
        if self.signal.borrowed {
            self.give_signal_back(task)?;
        }
        Ok(Results { batch, memory, born })
    }

    /// Runs from the start of the batch to the stop it tells its end with.
    fn execute(&self, task: &Tracee) -> io::Result<Vec<Pid>> {
        ptrace::set_registers(task.tid, &self.batch_regs(task))?;
        self.signal.hear(task.tid)
    }

    /// Ignores the signal for one batch. The call saves the old action in the
    /// header and marks it there as saved, so that the stub puts it back after
    /// our death and [`Remote::give_signal_back`] while we live.
    fn borrow_signal(&self, task: &Tracee) -> io::Result<()> {
        let mut batch = Batch::new();
        let ignore = batch.bytes(&sigaction_ignore());
        let signal = u64::from(self.signal.number.cast_unsigned());
        let saved = self.slot + SAVED_ACTION_AT;
        let call = batch.call(
            libc::SYS_rt_sigaction,
            [signal.into(), ignore.into(), saved.into(), 8_u64.into()],
        );
        batch.store(call, self.slot + SAVED_MARK_AT);
        let base = self.place.data + BATCH_AT;
        memory::write_exact(task.tid, &batch.encode(base), base)?;
        self.execute(task).map(drop)
    }

    /// Has the stub make the call that puts the borrowed signal back.
    fn give_signal_back(&self, task: &Tracee) -> io::Result<()> {
        let mut mark = [0; 4];
        memory::read_exact(task.tid, &mut mark, self.slot + SAVED_MARK_AT)?;
        if mark == [0; 4] {
            let rip = self.place.code + told_offset();
            ptrace::set_registers(task.tid, &user_regs_struct { rip, ..self.batch_regs(task) })?;
            make_syscall(task.tid)?;
        }
        self.write_header(task)
    }

    /// Takes the stub out of the source again: unmaps its data area and leaves
    /// the task where [`Tracee::release`] makes it go on as if nothing had been.
    pub(crate) fn remove(self, task: &Tracee) -> io::Result<()> {
        let slack = self.place.code - frame::TRAMPOLINE as u64;
        let lender = Lender { slack, ids: self.ids, signal: self.signal };
        let args = [self.place.data, DATA_LEN, 0, 0, 0, 0];
        match lender.syscall(task, libc::SYS_munmap, args)? {
            0 => {}
            errno => return Err(errno_error(errno)),
        }
        // Nobody runs in it any more; the next stub needs the room.
        task.go_home()?;
        ptrace::poke(task.tid, slack, &[0; CODE_LEN])
    }
}

/// Has a task of the source execute single syscalls by the trampoline.
struct Lender {
    /// Where the trampoline goes, and the loop behind it.
    slack: u64,
    ids: (i32, i32),
    signal: Told,
}

impl Lender {
    /// Executes one syscall.
    fn syscall(&self, task: &Tracee, nr: i64, args: [u64; 6]) -> io::Result<i64> {
        let home = task.portable_regs();
        // To borrow a signal takes a call like this one: it tells by none.
        let told = if self.signal.borrowed { 0 } else { self.signal.number };
        let mut text = frame::trampoline(&home, task.mask, self.ids, told);
        text.extend_from_slice(code());
        ptrace::poke(task.tid, self.slack, &text)?;
        let [rdi, rsi, rdx, r10, r8, r9] = args;
        let regs = user_regs_struct {
            rip: self.slack,
            rax: nr.cast_unsigned(),
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            orig_rax: u64::MAX,
            ..home
        };
        ptrace::set_registers(task.tid, &regs)?;
        if self.signal.borrowed {
            ptrace::set_signal_mask(task.tid, u64::MAX)?;
            make_syscall(task.tid)?;
            return Ok(ptrace::registers(task.tid)?.rax.cast_signed());
        }
        self.signal.hear(task.tid)?;
        Ok(ptrace::registers(task.tid)?.rbx.cast_signed())
    }

    /// Unmaps the data areas of engines that died here. A thread on its way home
    /// through one is either in the code of that engine or already past it.
    fn remove_leftovers(&self, task: &Tracee, vmas: &mut Vec<Vma>, used: &[u64]) -> io::Result<()> {
        let mut failed = Ok(());
        let on_the_way = used.iter().any(|rip| is_code(task.tid, *rip));
        vmas.retain(|vma| {
            if on_the_way || failed.is_err() || !is_leftover(task.tid, vma) {
                return true;
            }
            let args = [vma.start, DATA_LEN, 0, 0, 0, 0];
            failed = self.syscall(task, libc::SYS_munmap, args).and_then(|ret| match ret {
                0 => task.go_home(),
                errno => Err(errno_error(errno)),
            });
            failed.is_err()
        });
        failed
    }
}

/// Lets the task make the syscall in front of it and stops it behind; events of
/// job control on the way are passed over.
///
/// A task whose tracer dies while it stands at the entry or the exit is sent
/// SIGTRAP: the code behind has to take that back, and we stay there no longer
/// than we must. Single steps would be worse, for the trap flag they need
/// outlives the tracer.
fn make_syscall(tid: Pid) -> io::Result<()> {
    let mut signal = 0;
    let mut stops = 0;
    loop {
        if stops < 2 {
            ptrace::to_syscall(tid, signal)?;
        } else {
            ptrace::interrupt(tid)?;
            ptrace::cont_with(tid, signal)?;
        }
        signal = 0;
        match ptrace::wait(tid)? {
            Stop::Event { .. } if stops == 2 => return Ok(()),
            Stop::Signal(libc::SIGTRAP) => stops += 1,
            Stop::Signal(libc::SIGSTOP) => signal = libc::SIGSTOP,
            Stop::Signal(_) | Stop::Event { .. } => {}
            Stop::Gone => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }
}

fn sigaction_ignore() -> [u8; 32] {
    let mut raw = [0; 32];
    raw[0] = 1; // SIG_IGN
    raw
}

/// Whether `vma` is a data area of ours, which its first header tells.
fn is_leftover(pid: Pid, vma: &Vma) -> bool {
    let mut header = [0; HEADER_LEN];
    let field =
        |header: &[u8], at: usize| header[at..at + 8] == (vma.start + FRAME_AT + 8).to_le_bytes();
    vma.kind == VmaKind::Anonymous
        && vma.is_writable()
        && vma.end - vma.start == DATA_LEN
        && memory::read_exact(pid, &mut header, vma.start).is_ok()
        && field(&header, 16)
        && header.ends_with(&frame::SIGTRAP.to_le_bytes())
}

/// Whether `rip` points into a stub or its trampoline.
fn is_code(pid: Pid, rip: u64) -> bool {
    let page = rip & !(PAGE - 1);
    let mut text = [0; PAGE_LEN];
    memory::read_exact(pid, &mut text, page).is_ok()
        && stubs(&text).any(|at| (page + at as u64..page + (at + CODE_LEN) as u64).contains(&rip))
}

/// Where stubs of ours lie in a page, trampoline first.
fn stubs(page: &[u8; PAGE_LEN]) -> impl Iterator<Item = usize> {
    let starts = (0..PAGE_LEN - CODE_LEN).step_by(8);
    starts.filter(|start| page[start + frame::TRAMPOLINE..].starts_with(code()))
}

/// Finds unused bytes at the end of an executable page, in the vDSO if it can.
pub(crate) fn find_slack(pid: Pid, vmas: &[Vma]) -> io::Result<u64> {
    let executable = |v: &&Vma| v.is_executable() && v.is_readable() && !v.is_shared();
    let vdso = vmas.iter().filter(|v| v.kind == VmaKind::Vdso);
    let files = vmas.iter().filter(executable).filter(|v| matches!(v.kind, VmaKind::File { .. }));
    let rip = ptrace::registers(pid)?.rip;
    for vma in vdso.chain(files) {
        let mut page = [0; PAGE_LEN];
        let last = vma.end - PAGE;
        if memory::read_exact(pid, &mut page, last).is_err() {
            continue;
        }
        forget_leftovers(&mut page, last, rip);
        let used = page.iter().rposition(|&b| b != 0).map_or(0, |at| at + 1);
        let start = used.next_multiple_of(64);
        if PAGE_LEN - start >= CODE_LEN {
            return Ok(last + start as u64);
        }
    }
    Err(io::Error::other("no unused bytes in executable memory for the stub"))
}

/// Takes a stub that an engine left when it died for the zeros it lies on, so
/// that the next one comes to the same place.
///
/// A task still on its way home from it writes or needs nothing that the next
/// one changes, except in the trampoline, which only the leader runs.
fn forget_leftovers(page: &mut [u8; PAGE_LEN], at: u64, rip: u64) {
    for start in stubs(page).collect::<Vec<_>>() {
        let stub = start..start + CODE_LEN;
        let runs_here = stub.contains(&usize::try_from(rip.wrapping_sub(at)).unwrap_or(usize::MAX));
        if !runs_here {
            page[stub].fill(0);
        }
    }
}

/// Finds a hole of `len` bytes in an address space, away from both ends of it.
pub(crate) fn find_hole(vmas: &[Vma], len: u64) -> Option<u64> {
    // A gap on both sides keeps the growing stack's guard out of the way.
    const GUARD: u64 = 1 << 20;
    const TOP: u64 = 0x7fff_0000_0000;
    let mut end = TOP;
    for vma in vmas.iter().rev().filter(|v| v.start < TOP) {
        if end.saturating_sub(vma.end) >= len + 2 * GUARD {
            return Some(end - GUARD - len);
        }
        end = vma.start.min(end);
    }
    None
}

/// The kernel's name of the calls that the engine makes.
fn syscall_name(nr: u64) -> String {
    let name = match i64::try_from(nr).unwrap_or(-1) {
        libc::SYS_mmap => "mmap",
        libc::SYS_munmap => "munmap",
        libc::SYS_mremap => "mremap",
        libc::SYS_mprotect => "mprotect",
        libc::SYS_madvise => "madvise",
        libc::SYS_mlock2 => "mlock2",
        libc::SYS_open => "open",
        libc::SYS_close => "close",
        libc::SYS_prctl => "prctl",
        libc::SYS_arch_prctl => "arch_prctl",
        libc::SYS_clone3 => "clone3",
        libc::SYS_setsid => "setsid",
        libc::SYS_setpgid => "setpgid",
        libc::SYS_rt_sigaction => "rt_sigaction",
        libc::SYS_recvmsg => "recvmsg",
        libc::SYS_dup3 => "dup3",
        libc::SYS_setresuid => "setresuid",
        libc::SYS_setresgid => "setresgid",
        libc::SYS_setgroups => "setgroups",
        libc::SYS_capset => "capset",
        libc::SYS_seccomp => "seccomp",
        libc::SYS_timer_create => "timer_create",
        libc::SYS_epoll_ctl => "epoll_ctl",
        libc::SYS_socketpair => "socketpair",
        libc::SYS_chdir => "chdir",
        libc::SYS_chroot => "chroot",
        _ => return format!("syscall {nr}"),
    };
    name.to_owned()
}
