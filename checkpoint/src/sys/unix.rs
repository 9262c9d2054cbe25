//! The file a unix socket is bound to.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// `SIOCUNIXFILE`.
const SIOCUNIXFILE: libc::Ioctl = 0x89e0;

/// Opens the file of a bound socket with `O_PATH`, whatever became of its name.
pub(crate) fn bound_file(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this fd for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Peeks at a stream with room for `room` bytes and a place for one more that
/// cannot be written: returns how many bytes came in parts that fitted whole.
pub(crate) fn peek_whole_parts(socket: BorrowedFd<'_>, room: usize) -> io::Result<usize> {
    let mut buf = vec![0u8; room];
    let mut parts = [
        libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: room },
        libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 },
    ];
    // SAFETY: `msghdr` is plain data, for which zeros are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len();
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most `room` bytes into `buf`; writing to the
    // null page fails, which is what we are after.
    let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    match usize::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) if io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT) => Ok(0),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
