//! A process of this machine, told from a later one of the same pid.

use std::{fs, io, time::Duration};

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

/// Pid and start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Its pid.
    pub(crate) pid: i32,
    /// When it started, in clock ticks since boot.
    pub(crate) start: u64,
}

impl Process {
    /// The process that has `pid` now; `None` if there is none or it has ended.
    pub(crate) fn find(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may itself hold spaces and parentheses.
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        let alive = !matches!(fields.next()?, "Z" | "X");
        let start = fields.nth(18)?.parse().ok()?;
        alive.then_some(Self { pid, start })
    }

    /// Whether it still runs.
    pub(crate) fn is_alive(self) -> bool {
        Self::find(self.pid) == Some(self)
    }

    /// Whether it was killed and has not ended yet.
    pub(crate) fn is_ending(self) -> bool {
        const PF_EXITING: u64 = 4;
        const KILL: u64 = 1 << (Signal::KILL.as_raw() - 1);
        let read = |name| fs::read_to_string(format!("/proc/{}/{name}", self.pid));
        let (stat, status) = (read("stat").unwrap_or_default(), read("status").unwrap_or_default());
        let flags = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(6));
        let exiting = flags.and_then(|flags| flags.parse::<u64>().ok());
        let pending = status.lines().filter_map(|line| {
            let mask = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
            u64::from_str_radix(mask.trim(), 16).ok()
        });
        exiting.is_none_or(|flags| flags & PF_EXITING != 0)
            || pending.fold(0, |all, mask| all | mask) & KILL != 0
    }

    /// Sends it a signal, and never to another that has its pid by now.
    pub(crate) fn signal(self, signal: Signal) -> io::Result<()> {
        let Some(fd) = self.open()? else { return Ok(()) };
        match rustix::process::pidfd_send_signal(fd, signal) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// Waits until it has ended.
    pub(crate) async fn gone(self) -> io::Result<()> {
        if let Some(fd) = self.open()? {
            #[allow(deprecated, reason = "for fds whose owner lies about them; OwnedFd does not")]
            let fd = AsyncFd::with_interest(fd, Interest::READABLE)?;
            fd.readable().await?.retain_ready();
        }
        Ok(())
    }

    /// Waits until it has ended, at most for `limit`; says whether it has.
    pub(crate) async fn gone_within(self, limit: Duration) -> bool {
        matches!(tokio::time::timeout(limit, self.gone()).await, Ok(Ok(())))
    }

    fn open(self) -> io::Result<Option<std::os::fd::OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let fd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(err) => return Err(err.into()),
        };
        // The pid cannot change hands any more once the fd is open.
        Ok(self.is_alive().then_some(fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_process_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::find(child.id().try_into().unwrap()).unwrap();
        assert!(process.is_alive());
        assert!(!Process { start: process.start + 1, ..process }.is_alive());
        assert!(!process.gone_within(Duration::from_millis(1)).await);
        process.signal(Signal::KILL).unwrap();
        assert!(process.gone_within(Duration::from_secs(60)).await);
        child.wait().unwrap();
        assert!(!process.is_alive());
        process.signal(Signal::KILL).unwrap();
    }
}
