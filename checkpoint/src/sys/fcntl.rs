//! The commands of `fcntl(2)` about signals and leases.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_GETOWNER_UIDS: i32 = 17;

/// Whom a file tells that it is ready (`F_SETOWN_EX`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub(crate) kind: i32,
    /// In the caller's pid namespace; 0 is nobody.
    pub(crate) pid: i32,
}
const _: () = assert!(size_of::<Owner>() == 8);

fn done(n: i32) -> io::Result<i32> {
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n) }
}

/// Reads the owner (`F_GETOWN_EX`).
pub(crate) fn owner(fd: BorrowedFd<'_>) -> io::Result<Owner> {
    let mut owner = Owner::default();
    // SAFETY: the kernel writes one `f_owner_ex` into `owner`.
    done(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) })?;
    Ok(owner)
}

/// Sets the owner, in the name of the calling thread's user (`F_SETOWN_EX`).
pub(crate) fn set_owner(fd: BorrowedFd<'_>, owner: Owner) -> io::Result<()> {
    // SAFETY: the kernel reads one `f_owner_ex` from `owner`.
    done(unsafe { libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, &raw const owner) })?;
    Ok(())
}

/// Real and effective user in whose name the owner was set (`F_GETOWNER_UIDS`).
pub(crate) fn owner_uids(fd: BorrowedFd<'_>) -> io::Result<[u32; 2]> {
    let mut uids = [0; 2];
    // SAFETY: the kernel writes two user ids into `uids`.
    done(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWNER_UIDS, uids.as_mut_ptr()) })?;
    Ok(uids)
}

/// The signal that tells it; 0 is `SIGIO` (`F_GETSIG`).
pub(crate) fn signal(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: the command takes no argument.
    done(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) })
}

/// Sets that signal (`F_SETSIG`).
pub(crate) fn set_signal(fd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    done(unsafe { libc::fcntl(fd.as_raw_fd(), F_SETSIG, signal) })?;
    Ok(())
}

/// Takes a lease, `F_RDLCK` or `F_WRLCK` (`F_SETLEASE`).
pub(crate) fn set_lease(fd: BorrowedFd<'_>, kind: i32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    done(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, kind) })?;
    Ok(())
}
