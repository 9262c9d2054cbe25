//! Socket options by number (`getsockopt(2)`, `setsockopt(2)`).
//!
//! The engine carries options as the kernel's own bytes: a typed wrapper per
//! option would say the same in more words.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Reads an option into `value` and returns how many bytes it has.
pub(crate) fn get(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: &mut [u8],
) -> io::Result<usize> {
    let mut len = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes into `value`.
    let n = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len)
    };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(len as usize) }
}

/// Reads an option that is an `int`.
pub(crate) fn get_int(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value = [0; 4];
    get(socket, level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

/// Sets an option to the bytes of `value`.
pub(crate) fn set(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let len = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `len` bytes of `value`.
    let n =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), len) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets an option that is an `int`.
pub(crate) fn set_int(socket: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    set(socket, level, name, &value.to_ne_bytes())
}

/// Bytes sent and not yet read by the peer or acknowledged (`SIOCOUTQ`).
pub(crate) fn sent(socket: BorrowedFd<'_>) -> io::Result<i32> {
    let mut bytes = 0;
    // SAFETY: the kernel writes one `int` into `bytes`.
    let n = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

/// Bytes of a TCP connection that are queued and have not been sent once
/// (`SIOCOUTQNSD`).
pub(crate) fn unsent(socket: BorrowedFd<'_>) -> io::Result<i32> {
    const SIOCOUTQNSD: libc::Ioctl = 0x894b;
    let mut bytes = 0;
    // SAFETY: the kernel writes one `int` into `bytes`.
    let n = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCOUTQNSD, &raw mut bytes) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

/// Attaches a packet filter, as `SO_GET_FILTER` gave it (`SO_ATTACH_FILTER`).
pub(crate) fn attach_filter(socket: BorrowedFd<'_>, program: &[[u8; 8]]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    let size = libc::socklen_t::try_from(size_of_val(&program)).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `program` and the `len` instructions of eight
    // bytes it points to, which it copies unaligned, and writes neither.
    let n = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size,
        )
    };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
