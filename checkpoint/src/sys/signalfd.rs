//! `signalfd(2)` with any mask, real-time signals included.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

/// Makes a signalfd that reports the signals whose bits are set in `mask`
/// (bit 0 is signal 1).
pub(crate) fn create(mask: u64) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads eight bytes of `mask` and nothing else.
    let n = unsafe {
        libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, size_of::<u64>(), libc::O_CLOEXEC)
    };
    let fd = RawFd::try_from(n).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this fd for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
