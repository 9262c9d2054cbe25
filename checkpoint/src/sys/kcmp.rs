//! Whether two fds name the same open file description (`kcmp(2)`).

use std::{
    cmp::Ordering,
    io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    process,
};

use nix::unistd::Pid;

const KCMP_FILE: libc::c_int = 0;
const KCMP_SYSVSEM: libc::c_int = 6;
const KCMP_EPOLL_TFD: libc::c_int = 7;

/// What an epoll watches, as the kernel keys it.
#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}
const _: () = assert!(size_of::<EpollSlot>() == 12);

/// Orders the open file descriptions behind two of our own fds.
///
/// The order is the kernel's, arbitrary but stable until reboot: good for
/// sorting, so that `n` descriptions need `n log n` comparisons.
pub(crate) fn files(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> io::Result<Ordering> {
    let me = Pid::this().as_raw();
    let [a, b] = [a, b].map(|fd| libc::c_long::from(fd.as_raw_fd()));
    // SAFETY: KCMP_FILE takes two numbers and touches no memory of ours.
    ordering(unsafe { libc::syscall(libc::SYS_kcmp, me, me, KCMP_FILE, a, b) })
}

/// Whether our `epoll` watches, in the `nth` item made under fd number
/// `watched`, the open file description behind our `file`.
pub(crate) fn watches(
    epoll: BorrowedFd<'_>,
    watched: RawFd,
    nth: u32,
    file: BorrowedFd<'_>,
) -> io::Result<bool> {
    let me = process::id();
    let slot = EpollSlot {
        efd: epoll.as_raw_fd().cast_unsigned(),
        tfd: watched.cast_unsigned(),
        toff: nth,
    };
    let fd = libc::c_long::from(file.as_raw_fd());
    // SAFETY: KCMP_EPOLL_TFD reads `slot`, which lives across the call.
    let n = unsafe { libc::syscall(libc::SYS_kcmp, me, me, KCMP_EPOLL_TFD, fd, &raw const slot) };
    Ok(ordering(n)? == Ordering::Equal)
}

/// Whether a task has the list of semaphore adjustments (`semop(2)`) that the
/// calling thread has, or none if that has none.
pub(crate) fn same_undo(task: Pid) -> io::Result<bool> {
    let (me, zero) = (nix::unistd::gettid().as_raw(), 0 as libc::c_long);
    // SAFETY: KCMP_SYSVSEM takes two tasks and touches no memory of ours.
    let n = unsafe { libc::syscall(libc::SYS_kcmp, me, task.as_raw(), KCMP_SYSVSEM, zero, zero) };
    Ok(ordering(n)? == Ordering::Equal)
}

fn ordering(n: libc::c_long) -> io::Result<Ordering> {
    match n {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        3 => Err(io::Error::other("kcmp cannot order the two files")),
        _ => Err(io::Error::last_os_error()),
    }
}
