//! `EPOLL_CTL_ADD` by fd number, which is half of what it registers.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
};

/// Lets `epoll` watch whatever has `number` in the caller's fd table.
pub(crate) fn add(epoll: BorrowedFd<'_>, number: RawFd, events: u32, data: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the kernel reads `event`, which lives across the call; a number
    // that is not open gives EBADF.
    let n =
        unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, number, &raw mut event) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
