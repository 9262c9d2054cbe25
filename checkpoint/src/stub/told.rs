//! How a task tells that it has done what it was lent for: by a signal that it
//! ignores, which stops it for a living tracer and is nothing without one.

use std::io;

use nix::unistd::Pid;

use crate::{
    proc::Status,
    sys::ptrace::{self, Stop},
};

/// The signal by which a batch says that it is done.
#[derive(Clone, Copy)]
pub(super) struct Told {
    pub(super) number: i32,
    /// It is caught by the target: ignored for the length of a batch.
    pub(super) borrowed: bool,
}

/// Events that carry the id of a new task.
const BIRTHS: [i32; 3] =
    [libc::PTRACE_EVENT_FORK, libc::PTRACE_EVENT_VFORK, libc::PTRACE_EVENT_CLONE];

impl Told {
    /// Lets the task run until it says by the signal that it is done. Returns the
    /// tasks born meanwhile.
    pub(super) fn hear(self, tid: Pid) -> io::Result<Vec<Pid>> {
        let mut born = Vec::new();
        ptrace::set_signal_mask(tid, !bit(self.number))?;
        ptrace::cont(tid)?;
        loop {
            match ptrace::wait(tid)? {
                Stop::Signal(number) if number == self.number => {
                    if ptrace::stop_code(tid)? == libc::SI_TKILL {
                        return Ok(born);
                    }
                    // Somebody else's, and the target ignores it: as delivered.
                    ptrace::cont(tid)?;
                }
                // Only SIGSTOP passes the mask; deliver it, the group-stop it
                // makes is one of the events below.
                Stop::Signal(libc::SIGSTOP) => ptrace::cont_with(tid, libc::SIGSTOP)?,
                Stop::Signal(number) => {
                    return Err(io::Error::other(format!("the stub was hit by signal {number}")));
                }
                Stop::Event { event, .. } => {
                    if BIRTHS.contains(&event) {
                        born.push(ptrace::event_pid(tid)?);
                    }
                    ptrace::cont(tid)?;
                }
                Stop::Gone => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
            }
        }
    }
}

/// What the threads of a process do with signals, as bit masks (bit `n - 1` for
/// signal `n`).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SignalUse {
    caught: u64,
    ignored: u64,
    /// Blocked by any thread: it may be waited for with sigwait or signalfd.
    blocked: u64,
    pending: u64,
}

impl SignalUse {
    /// What `threads`, all of one process, do with signals.
    pub(crate) fn of(threads: &[Status]) -> Self {
        threads.iter().fold(Self::default(), |all, s| Self {
            caught: all.caught | s.caught,
            ignored: all.ignored | s.ignored,
            blocked: all.blocked | s.blocked,
            pending: all.pending | s.pending | s.shared_pending,
        })
    }

    /// A signal that the process ignores; if there is none, one to borrow.
    pub(super) fn choose(&self) -> Told {
        let busy = |n: i32| (self.caught | self.blocked | self.pending) & bit(n) != 0;
        let by_default = [libc::SIGURG, libc::SIGWINCH];
        let own = (1..=64).filter(|&n| self.ignored & bit(n) != 0 && !STOPPERS.contains(&n));
        match by_default.into_iter().chain(own).find(|&n| !busy(n)) {
            Some(number) => Told { number, borrowed: false },
            None => {
                let free = (34..=64).rev().find(|&n| self.pending & bit(n) == 0);
                Told { number: free.unwrap_or(64), borrowed: true }
            }
        }
    }
}

/// Signals that do more than their action says: kill, and job control.
const STOPPERS: [i32; 6] =
    [libc::SIGKILL, libc::SIGSTOP, libc::SIGCONT, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}
