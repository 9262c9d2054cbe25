//! Stands in for a container's process until it ends.

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Passes signals on to our child `pid` and returns its exit code, 128 and the
/// signal's number when one ended it.
pub(crate) fn wait(pid: Pid) -> Result<u8> {
    let signals = SigSet::all();
    signals.thread_block().context("cannot block signals")?;
    loop {
        // First, because it may have ended before its SIGCHLD was blocked.
        if let Some(code) = reap(pid)? {
            return Ok(code);
        }
        match signals.wait().context("cannot wait for signals")? {
            Signal::SIGCHLD => {}
            signal => match kill(pid, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(err) => tracing::warn!(%err, %signal, "cannot pass the signal on"),
            },
        }
    }
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
