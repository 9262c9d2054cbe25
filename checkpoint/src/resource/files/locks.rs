//! File locks: `flock(2)`, open file description locks, leases, POSIX locks.
//!
//! The first three belong to a description, so the engine takes them. A POSIX
//! lock belongs to a process's fd table: the task has to take it itself.
//! Where both hosts see one file system the frozen source still holds its
//! locks; those are taken last, when it is gone.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{Failure, Making, Refusal, fdinfo::FdInfo};
use crate::{
    stub::{Batch, Remote, Tracee, args},
    sys,
};

/// How long the last step waits for a lock the source may still hold.
const PATIENCE: Duration = Duration::from_millis(100);

/// A lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lock {
    kind: Kind,
    /// Exclusive, or a lease to write.
    write: bool,
    start: u64,
    /// 0 is up to the end of the file, wherever that will be.
    len: u64,
}

/// Whose lock it is. The order is the format: append only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    Flock,
    Description,
    Lease,
    Posix,
}

/// A POSIX lock, which only the task itself can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PosixLock {
    /// An fd of the file.
    pub(crate) fd: RawFd,
    lock: Lock,
}

impl PosixLock {
    /// Those that fd `fd` shows; a line in an unknown form is judged elsewhere.
    pub(super) fn all(fd: RawFd, info: &FdInfo) -> Vec<Self> {
        let locks = dump(info).unwrap_or_default();
        locks.into_iter().filter(Lock::is_posix).map(|lock| Self { fd, lock }).collect()
    }

    /// The argument of `fcntl(fd, F_SETLK, …)`.
    pub(crate) fn flock(&self) -> libc::flock {
        self.lock.flock()
    }
}

impl Lock {
    fn flock(&self) -> libc::flock {
        let kind = if self.write { libc::F_WRLCK } else { libc::F_RDLCK };
        libc::flock {
            l_type: i16::try_from(kind).unwrap_or_default(),
            l_whence: 0,
            l_start: self.start.cast_signed(),
            l_len: self.len.cast_signed(),
            l_pid: 0,
        }
    }

    pub(super) fn is_posix(&self) -> bool {
        self.kind == Kind::Posix
    }

    /// Takes it if nobody else has it.
    fn take(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        match (self.kind, self.write) {
            (Kind::Flock, false) => flock(fd, FlockOperation::NonBlockingLockShared)?,
            (Kind::Flock, true) => flock(fd, FlockOperation::NonBlockingLockExclusive)?,
            (Kind::Lease, false) => sys::fcntl::set_lease(fd, libc::F_RDLCK)?,
            (Kind::Lease, true) => sys::fcntl::set_lease(fd, libc::F_WRLCK)?,
            (Kind::Description | Kind::Posix, _) => {
                fcntl(fd.as_raw_fd(), FcntlArg::F_OFD_SETLK(&self.flock()))?;
            }
        }
        Ok(())
    }
}

/// Every lock that is shown on an fd.
pub(super) fn dump(info: &FdInfo) -> Result<Vec<Lock>, Refusal> {
    let lines = info.rest.lines().filter_map(|line| line.strip_prefix("lock:"));
    lines
        .map(|line| {
            parse(line)
                .ok_or_else(|| Refusal::unmovable(format!("holds the lock \"{}\"", line.trim())))
        })
        .collect()
}

/// `1: FLOCK  ADVISORY  WRITE 4711 fe:01:123 0 EOF`.
fn parse(line: &str) -> Option<Lock> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, kind, state, mode, _, _, start, end] = words[..] else { return None };
    let kind = match (kind, state) {
        ("FLOCK", _) => Kind::Flock,
        ("POSIX", _) => Kind::Posix,
        ("OFDLCK", _) => Kind::Description,
        ("LEASE", "ACTIVE") => Kind::Lease,
        _ => return None,
    };
    let write = match mode {
        "WRITE" => true,
        "READ" => false,
        _ => return None,
    };
    let start: u64 = start.parse().ok()?;
    let len = match end {
        "EOF" => 0,
        end => end.parse::<u64>().ok()?.checked_sub(start)? + 1,
    };
    Some(Lock { kind, write, start, len })
}

/// Takes the locks of a description; returns those that someone else has.
pub(super) fn open(locks: &[Lock], fd: BorrowedFd<'_>) -> Result<Vec<Lock>, Failure> {
    let mut late = Vec::new();
    for lock in locks {
        match lock.take(fd) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => late.push(*lock),
            done => done.making("take a lock")?,
        }
    }
    Ok(late)
}

/// Takes a task's own locks, inside it, under the same condition as [`arm`].
pub(crate) fn take_posix(locks: &[PosixLock], remote: &Remote, task: &Tracee) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    for lock in locks {
        loop {
            let mut batch = Batch::new();
            let flock = lock.flock();
            let mut raw = [flock.l_type, flock.l_whence, 0, 0].map(i16::to_ne_bytes).concat();
            raw.extend([flock.l_start, flock.l_len, 0].map(i64::to_ne_bytes).concat());
            let flock = batch.bytes(&raw);
            let call = batch.try_call(libc::SYS_fcntl, args![lock.fd, libc::F_SETLK, flock]);
            match remote.run(task, &batch)?.get(call) {
                Ok(_) => break,
                Err(err) if err.kind() != io::ErrorKind::WouldBlock => return Err(err),
                Err(_) if Instant::now() < end => thread::sleep(Duration::from_millis(1)),
                Err(err) => {
                    warn!(%err, ?lock, "a lock was not taken again");
                    break;
                }
            }
        }
    }
    Ok(())
}

/// Takes a lock that the source had when it was frozen. The container runs on
/// without it when even now somebody else has it.
pub(super) fn arm(lock: &Lock, fd: BorrowedFd<'_>) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match lock.take(fd) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                thread::sleep(Duration::from_millis(1));
            }
            done => return done,
        }
    }
}
