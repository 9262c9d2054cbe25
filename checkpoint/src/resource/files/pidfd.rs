//! Handles of processes (`pidfd_open(2)`).

use std::os::fd::OwnedFd;

use rustix::{
    fs::OFlags,
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::{Failure, Making, Refusal, Source, Target, set_status, table::Held};

/// The flag of a handle that means one thread (`PIDFD_THREAD`).
const THREAD: OFlags = OFlags::EXCL;

/// The process in the container's pid namespace.
pub(super) fn dump(held: &Held, source: &Source<'_>) -> Result<i32, Refusal> {
    if held.info.oflags().contains(THREAD) {
        return Err(Refusal::unmovable("is a pidfd of a thread"));
    }
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<i32>().ok());
    let host = number(held.info.field("Pid")).unwrap_or(-1);
    if host <= 0 {
        return Err(Refusal::unmovable("is a pidfd of a process that has ended"));
    }
    if !source.ctx.tasks.iter().any(|task| task.as_raw() == host) {
        return Err(Refusal::unmovable(format!("is a pidfd of pid {host} outside the tree")));
    }
    let inner = held.info.field("NSpid").and_then(|pids| pids.split_whitespace().last());
    number(inner).ok_or_else(|| Refusal::unmovable("is a pidfd that does not show its pid"))
}

pub(super) fn open(pid: i32, flags: OFlags, target: &Target<'_>) -> Result<OwnedFd, Failure> {
    let host = (target.host)(pid).and_then(|host| Pid::from_raw(host.as_raw()));
    let host = host.ok_or(Failure::Damaged("a pidfd of a process that is not there"))?;
    let fd = pidfd_open(host, PidfdFlags::empty()).making("open a pidfd")?;
    set_status(fd, flags)
}
