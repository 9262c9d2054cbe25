//! Terminal requests that have no wrapper (`ioctl_tty(2)`).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// Reads the terminal's settings: `struct termios2`, 44 bytes.
pub(crate) const GET_SETTINGS: Get<44> = Get(0x802c_542a);
/// Sets them.
pub(crate) const SET_SETTINGS: Set = Set(0x402c_542b);
/// Window size: rows, columns and pixels, four `u16`.
pub(crate) const GET_SIZE: Get<8> = Get(0x5413);
/// Sets it.
pub(crate) const SET_SIZE: Set = Set(0x5414);
/// Number of a pair, asked of its master.
pub(crate) const GET_NUMBER: Get<4> = Get(0x8004_5430);
/// Whether the slave cannot be opened.
pub(crate) const GET_LOCK: Get<4> = Get(0x8004_5439);
/// Sets that.
pub(crate) const SET_LOCK: Set = Set(0x4004_5431);
/// Whether the master reads packets.
pub(crate) const GET_PACKETS: Get<4> = Get(0x8004_5438);
/// Sets that.
pub(crate) const SET_PACKETS: Set = Set(0x5420);
/// The device behind `/dev/tty`.
pub(crate) const GET_DEVICE: Get<4> = Get(0x8004_5432);
/// Bytes to read.
pub(crate) const GET_QUEUED: Get<4> = Get(0x541b);

/// A request that fills `N` bytes.
pub(crate) struct Get<const N: usize>(libc::Ioctl);

/// A request that takes bytes.
pub(crate) struct Set(libc::Ioctl);

impl<const N: usize> Get<N> {
    /// Asks it of a terminal.
    pub(crate) fn of(&self, tty: BorrowedFd<'_>) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        // SAFETY: the request writes `N` bytes, as its definition above says.
        let n = unsafe { libc::ioctl(tty.as_raw_fd(), self.0, bytes.as_mut_ptr()) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
    }
}

impl Get<4> {
    /// The same as a number.
    pub(crate) fn number(&self, tty: BorrowedFd<'_>) -> io::Result<u32> {
        self.of(tty).map(u32::from_ne_bytes)
    }
}

impl Set {
    /// Makes it of a terminal; `bytes` is of the size that the request takes.
    pub(crate) fn to<const N: usize>(&self, tty: BorrowedFd<'_>, bytes: [u8; N]) -> io::Result<()> {
        // The largest that any of them takes.
        let mut padded = [0; 44];
        padded[..N].copy_from_slice(&bytes);
        // SAFETY: no request above reads more than the 44 bytes of `padded`.
        let n = unsafe { libc::ioctl(tty.as_raw_fd(), self.0, padded.as_ptr()) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Opens the other side of a master, wherever its file is (`TIOCGPTPEER`).
pub(crate) fn open_slave(master: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    const TIOCGPTPEER: libc::Ioctl = 0x5441;
    // SAFETY: the argument is a number.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this fd for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
