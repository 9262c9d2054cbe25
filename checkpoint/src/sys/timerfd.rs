//! The one thing about timerfds that has no wrapper: setting unread ticks.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `_IOW('T', 0, __u64)`.
const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400;

/// Sets how many expirations the next read reports (`TFD_IOC_SET_TICKS`).
pub(crate) fn set_ticks(timer: BorrowedFd<'_>, ticks: u64) -> io::Result<()> {
    // SAFETY: the kernel reads eight bytes of `ticks`, which lives across the call.
    let n = unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
