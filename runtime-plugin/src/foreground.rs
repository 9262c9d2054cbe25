//! Stands in for a container's process until it ends.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::console::Terminal;

/// The signals that are to reach a container's process instead of us.
#[derive(Debug)]
pub(crate) struct Signals(SignalFd);

impl Signals {
    /// Holds them back from now on.
    ///
    /// To be called when the process is there but does not run yet: it must
    /// not inherit the mask, nor may a signal for it end us.
    pub(crate) fn hold() -> Result<Self> {
        let all = SigSet::all();
        all.thread_block().context("cannot block signals")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        SignalFd::with_flags(&all, flags).map(Self).context("cannot take signals")
    }

    /// Passes them on to our child `pid`, and what it writes to its terminal to
    /// our stdout. Returns its exit code, 128 and the signal's number when one
    /// ended it.
    pub(crate) fn pass_to(self, pid: Pid, terminal: Option<Terminal>) -> Result<u8> {
        if let Some(terminal) = &terminal {
            terminal.type_along()?;
        }
        stand_in(&self.0, pid, terminal)
    }
}

fn stand_in(signals: &SignalFd, pid: Pid, mut terminal: Option<Terminal>) -> Result<u8> {
    loop {
        // First, because it may have ended before its SIGCHLD was blocked.
        if let Some(code) = reap(pid)? {
            while terminal.as_ref().is_some_and(is_readable) {
                relay(&mut terminal)?;
            }
            return Ok(code);
        }
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if let Some(terminal) = &terminal {
            fds.push(PollFd::new(terminal.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(err) => return Err(err).context("cannot wait for the container"),
        }
        if fds.get(1).and_then(|fd| fd.any()).unwrap_or(false) {
            relay(&mut terminal)?;
        }
        while let Some(info) = signals.read_signal().context("cannot take signals")? {
            let signal = Signal::try_from(info.ssi_signo.cast_signed())?;
            match (signal, &terminal) {
                (Signal::SIGCHLD, _) => {}
                (Signal::SIGWINCH, Some(terminal)) => terminal.resize(),
                _ => pass_on(pid, signal),
            }
        }
    }
}

fn pass_on(pid: Pid, signal: Signal) {
    match kill(pid, signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(err) => tracing::warn!(%err, %signal, "cannot pass the signal on"),
    }
}

fn is_readable(terminal: &Terminal) -> bool {
    let mut fds = [PollFd::new(terminal.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| 0 < ready)
}

fn relay(terminal: &mut Option<Terminal>) -> Result<()> {
    if let Some(open) = terminal
        && !open.relay()?
    {
        *terminal = None;
    }
    Ok(())
}

/// Collects ended children; gives the exit code of `pid` when it is one of them.
fn reap(pid: Pid) -> Result<Option<u8>> {
    loop {
        let (child, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(child, code)) => (child, code),
            Ok(WaitStatus::Signaled(child, signal, _)) => (child, 128 + signal as i32),
            Ok(WaitStatus::StillAlive) => return Ok(None),
            Ok(_) => continue,
            Err(Errno::EINTR) => continue,
            Err(err) => return Err(err).context("cannot wait for the container"),
        };
        if child == pid {
            return Ok(Some(u8::try_from(code & 0xff)?));
        }
    }
}
