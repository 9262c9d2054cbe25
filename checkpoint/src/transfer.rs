//! Handing file descriptors to a task: one message of `SCM_RIGHTS`, received by
//! the stub, then moved to their numbers.

use std::{
    collections::BTreeSet,
    io::{self, IoSlice},
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::stub::{Batch, Buf, Remote, Results, Tracee, args};

/// One fd to hand over.
pub(crate) struct Gift<'f> {
    pub(crate) number: u64,
    pub(crate) fd: BorrowedFd<'f>,
    pub(crate) cloexec: bool,
}

/// Most fds in one message (`SCM_MAX_FD`).
const MAX_FDS: usize = 253;

/// Gives `gifts` to a task whose fd table is empty, which executes `first` before
/// and what `last` adds behind.
///
/// Each run of a batch costs two switches between two processes, so calls are put
/// together: the kernel gives out the lowest free number, so those that the files
/// arrive at are known before they do.
pub(crate) fn give(
    remote: &Remote,
    task: &Tracee,
    gifts: &[Gift<'_>],
    first: Batch,
    last: impl FnOnce(&mut Batch),
) -> io::Result<()> {
    let wanted: BTreeSet<u64> = gifts.iter().map(|g| g.number).collect();
    let mut taken = BTreeSet::new();
    let mut batch = first;
    let mut arrivals = Vec::new();
    for chunk in gifts.chunks(MAX_FDS) {
        let (theirs, ours) = send(remote, task, chunk, std::mem::take(&mut batch), &arrivals)?;
        batch.call(libc::SYS_close, args![ours]);
        let free = (0..).filter(|n| !taken.contains(n) && *n != theirs);
        let at: Vec<u64> = free.take(chunk.len()).collect();
        let control = receive(&mut batch, theirs, chunk.len());
        settle(&mut batch, chunk, at.clone(), &wanted, &mut taken);
        arrivals = vec![(control, at)];
    }
    last(&mut batch);
    if batch.is_empty() {
        return Ok(());
    }
    check(&remote.run(task, &batch)?, &arrivals)
}

/// Runs `batch`, then sends the fds of `chunk`; returns the numbers of the two
/// ends in the task, first that in which they lie.
fn send(
    remote: &Remote,
    task: &Tracee,
    chunk: &[Gift<'_>],
    mut batch: Batch,
    arrivals: &[(Buf, Vec<u64>)],
) -> io::Result<(u64, u64)> {
    let pair = batch.space(8);
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    batch.call(libc::SYS_socketpair, args![libc::AF_UNIX, kind, 0_u64, pair]);
    let results = remote.run(task, &batch)?;
    check(&results, arrivals)?;
    let (theirs, ours) = (results.u32(pair, 0), results.u32(pair, 4));
    let pid = rustix::process::Pid::from_raw(task.tid.as_raw()).ok_or(io::ErrorKind::NotFound)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).or_else(|_| leader_pidfd(task))?;
    let fd = i32::try_from(ours).map_err(io::Error::other)?;
    let socket = pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty())?;
    let raw: Vec<_> = chunk.iter().map(|g| g.fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"f")], &rights, MsgFlags::empty(), None)?;
    Ok((u64::from(theirs), u64::from(ours)))
}

/// Wants the files of a message at the numbers foreseen.
fn check(results: &Results<'_>, arrivals: &[(Buf, Vec<u64>)]) -> io::Result<()> {
    for (control, at) in arrivals {
        // Behind a header of 16 bytes.
        let numbers = (0..at.len()).map(|i| u64::from(results.u32(*control, 16 + 4 * i)));
        if !numbers.eq(at.iter().copied()) {
            return Err(io::Error::other("files arrived at numbers that were not foreseen"));
        }
    }
    Ok(())
}

/// Receives the `n` fds that lie in socket `theirs`. Returns where their numbers
/// will be.
fn receive(batch: &mut Batch, theirs: u64, n: usize) -> Buf {
    // struct msghdr: name, namelen, iov, iovlen, control, controllen, flags.
    let byte = batch.space(16);
    let iov = batch.space(16);
    batch.address(iov, byte);
    let iov = length(batch, iov, 1);
    let control_len = 16 + 4 * n;
    let control = batch.space(control_len.next_multiple_of(8));
    let message = batch.space(56);
    batch.address(message.skip(16), iov);
    length(batch, message.skip(16), 1);
    batch.address(message.skip(32), control);
    length(batch, message.skip(32), control_len as u64);
    batch.call(libc::SYS_recvmsg, args![theirs, message, 0_u64]);
    batch.call(libc::SYS_close, args![theirs]);
    control
}

/// Writes `len` behind the address at the start of `at`.
fn length(batch: &mut Batch, at: Buf, len: u64) -> Buf {
    batch.number(at.skip(8), len);
    at
}

/// pidfds name processes, and the task may be another thread than the leader.
fn leader_pidfd(task: &Tracee) -> rustix::io::Result<std::os::fd::OwnedFd> {
    let status = crate::proc::Status::of(task.tid).map_err(|_| rustix::io::Errno::SRCH)?;
    let leader = status.ns_tgid.first().copied().unwrap_or(0);
    let pid = rustix::process::Pid::from_raw(leader).ok_or(rustix::io::Errno::SRCH)?;
    pidfd_open(pid, PidfdFlags::empty())
}

/// Moves received fds to their numbers. `taken` are numbers in place already.
fn settle(
    batch: &mut Batch,
    chunk: &[Gift<'_>],
    mut at: Vec<u64>,
    wanted: &BTreeSet<u64>,
    taken: &mut BTreeSet<u64>,
) {
    let dup = |batch: &mut Batch, from: u64, to: u64, cloexec: bool| {
        let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
        batch.call(libc::SYS_dup3, args![from, to, flags]);
        batch.call(libc::SYS_close, args![from]);
    };
    for (i, gift) in chunk.iter().enumerate() {
        if at[i] == gift.number {
            let flags = u64::from(gift.cloexec);
            batch.call(libc::SYS_fcntl, args![gift.number, libc::F_SETFD, flags]);
        } else {
            // Whoever still waits on that number steps aside.
            if let Some(j) = at.iter().skip(i + 1).position(|&n| n == gift.number) {
                let aside = (0..)
                    .find(|n| !taken.contains(n) && !wanted.contains(n) && !at.contains(n))
                    .expect("numbers are many");
                dup(batch, gift.number, aside, false);
                at[i + 1 + j] = aside;
            }
            dup(batch, at[i], gift.number, gift.cloexec);
            at[i] = gift.number;
        }
        taken.insert(gift.number);
    }
}

/// The borrowed fds of a list of files under consecutive numbers.
pub(crate) fn consecutive<'f>(files: impl Iterator<Item = BorrowedFd<'f>>) -> Vec<Gift<'f>> {
    (0..).zip(files).map(|(number, fd)| Gift { number, fd, cloexec: true }).collect()
}
