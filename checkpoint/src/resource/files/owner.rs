//! Who is told by a signal that a file is ready (`O_ASYNC`, `F_SETOWN_EX`).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    thread,
};

use nix::unistd::Pid;
use rustix::{
    fs::{OFlags, Uid, fcntl_getfl, fcntl_setfl},
    thread::set_thread_res_uid,
};
use serde::{Deserialize, Serialize};

use super::{Collector, Doing, Refusal, Source, table::Held};
use crate::{proc::Status, sys::fcntl};

const F_OWNER_TID: i32 = 0;
const F_OWNER_PGRP: i32 = 2;

/// The owner of a description.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// Thread, process or process group.
    kind: i32,
    /// In the container's pid namespace.
    pid: i32,
    /// In whose name it was set: decides whom it may signal.
    uids: [u32; 2],
    signal: i32,
    /// Whether it is told at all.
    on: bool,
}

pub(super) fn dump(
    held: &Held,
    source: &Source<'_>,
    out: &mut Collector<'_>,
) -> Result<Option<Image>, Refusal> {
    let fd = held.fd.as_fd();
    let on = held.info.oflags().contains(OFlags::from_bits_retain(libc::O_ASYNC.cast_unsigned()));
    // An `O_PATH` description has no owner.
    let owner = match fcntl::owner(fd) {
        Ok(owner) => owner,
        Err(_) => return Ok(None),
    };
    let signal = fcntl::signal(fd).doing("tell its signal")?;
    if owner.pid == 0 && signal == 0 && !on {
        return Ok(None);
    }
    let pid = if owner.pid == 0 {
        0
    } else if let Some(pid) = inside(owner, source) {
        pid
    } else {
        out.losses.push(format!("forgets that pid {} is told by a signal", owner.pid));
        return Ok(None);
    };
    let uids = fcntl::owner_uids(fd).doing("tell in whose name its owner was set")?;
    Ok(Some(Image { kind: owner.kind, pid, uids, signal, on }))
}

/// The owner in the container's pid namespace, if it is in the tree.
fn inside(owner: fcntl::Owner, source: &Source<'_>) -> Option<i32> {
    let status = Status::of(Pid::from_raw(owner.pid)).ok()?;
    let process = Pid::from_raw(*status.ns_tgid.first()?);
    source.ctx.tasks.contains(&process).then(|| match owner.kind {
        F_OWNER_TID => status.tid(),
        F_OWNER_PGRP => status.pgid(),
        _ => status.tgid(),
    })
}

/// Sets the owner; `host` finds its pid in our pid namespace.
pub(super) fn arm(
    image: &Image,
    fd: BorrowedFd<'_>,
    host: &(dyn Fn(i32) -> Option<Pid> + Sync),
) -> io::Result<()> {
    let Image { kind, pid, uids, signal, on } = image;
    fcntl::set_signal(fd, *signal)?;
    let owner = if *pid == 0 { None } else { host(*pid) };
    if let Some(host) = owner {
        let owner = fcntl::Owner { kind: *kind, pid: host.as_raw() };
        let [real, effective] = uids.map(Uid::from_raw);
        // The kernel takes the caller's user; ours is changed on a thread
        // that ends with it.
        let set = || {
            set_thread_res_uid(real, effective, effective)?;
            fcntl::set_owner(fd, owner)
        };
        thread::scope(|scope| {
            scope.spawn(set).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
    }
    if *on {
        let flags = fcntl_getfl(fd)? | OFlags::from_bits_retain(libc::O_ASYNC.cast_unsigned());
        fcntl_setfl(fd, flags)?;
    }
    Ok(())
}
