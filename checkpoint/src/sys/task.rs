//! Attributes of a task that another task may read and set.

use std::io;

use libc::{c_int, c_long};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

fn check(ret: c_long) -> io::Result<c_long> {
    if ret == -1 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// Head and length of the robust futex list (`get_robust_list(2)`).
pub(crate) fn robust_list(tid: Pid) -> io::Result<(u64, u64)> {
    let (mut head, mut len) = (0_u64, 0_u64);
    // SAFETY: both pointers are to integers that outlive the call.
    check(unsafe {
        let (head, len) = (&raw mut head, &raw mut len);
        libc::syscall(libc::SYS_get_robust_list, tid.as_raw(), head, len)
    })?;
    Ok((head, len))
}

/// Scheduling attributes (`sched_setattr(2)`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SchedAttr {
    size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
    util_min: u32,
    util_max: u32,
}
const _: () = assert!(size_of::<SchedAttr>() == 56);

/// Reads the scheduling attributes of `tid`.
pub(crate) fn sched_attr(tid: Pid) -> io::Result<SchedAttr> {
    let mut attr = SchedAttr::default();
    // SAFETY: the kernel writes at most the size we pass.
    check(unsafe {
        let size = size_of::<SchedAttr>();
        libc::syscall(libc::SYS_sched_getattr, tid.as_raw(), &raw mut attr, size, 0)
    })?;
    Ok(attr)
}

/// Sets the scheduling attributes of `tid`.
pub(crate) fn set_sched_attr(tid: Pid, attr: &SchedAttr) -> io::Result<()> {
    let size = u32::try_from(size_of::<SchedAttr>()).expect("small");
    let attr = SchedAttr { size, ..*attr };
    // SAFETY: the kernel reads `attr`, which outlives the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid.as_raw(), &raw const attr, 0) })
        .map(drop)
}

const IOPRIO_WHO_PROCESS: c_int = 1;

/// I/O priority of `tid` (`ioprio_get(2)`).
pub(crate) fn io_priority(tid: Pid) -> io::Result<i32> {
    // SAFETY: integers only.
    let ret =
        check(unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid.as_raw()) })?;
    Ok(i32::try_from(ret).unwrap_or(0))
}

/// Sets the I/O priority of `tid`.
pub(crate) fn set_io_priority(tid: Pid, value: i32) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, tid.as_raw(), value) })
        .map(drop)
}

/// CPUs that `tid` may run on, as a bit mask of whole words.
pub(crate) fn affinity(tid: Pid) -> io::Result<Vec<u8>> {
    let mut mask = vec![0_u8; 1024];
    // SAFETY: the kernel writes at most the length we pass.
    let n = check(unsafe {
        let len = mask.len();
        libc::syscall(libc::SYS_sched_getaffinity, tid.as_raw(), len, mask.as_mut_ptr())
    })?;
    mask.truncate(usize::try_from(n).unwrap_or(0));
    Ok(mask)
}

/// Sets the CPUs that `tid` may run on.
pub(crate) fn set_affinity(tid: Pid, mask: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `mask`, which outlives the call.
    check(unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, tid.as_raw(), mask.len(), mask.as_ptr())
    })
    .map(drop)
}
