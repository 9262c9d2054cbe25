//! What inotify lacks wrappers for: choosing a watch's number, and finding a
//! file by the handle that `/proc` shows.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// `_IOW('I', 0, __s32)`.
const INOTIFY_IOC_SETNEXTWD: libc::Ioctl = 0x4004_4900;
/// Longest handle (`MAX_HANDLE_SZ`).
const LONGEST: usize = 128;

#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; LONGEST],
}
const _: () = assert!(size_of::<Handle>() == 8 + LONGEST);

/// Lets the next watch have the number `wd`.
pub(crate) fn set_next_wd(inotify: BorrowedFd<'_>, wd: i32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    let n = unsafe { libc::ioctl(inotify.as_raw_fd(), INOTIFY_IOC_SETNEXTWD, wd) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens the file with this handle on the mount that `mount` is on, `O_PATH`
/// (`open_by_handle_at(2)`).
pub(crate) fn open_by_handle(
    mount: BorrowedFd<'_>,
    kind: i32,
    handle: &[u8],
) -> io::Result<OwnedFd> {
    let mut raw = Handle { bytes: 0, kind, data: [0; LONGEST] };
    raw.bytes = u32::try_from(handle.len()).map_err(io::Error::other)?;
    raw.data.get_mut(..handle.len()).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(handle);
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the kernel reads the handle with the length that it states.
    let n = unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw const raw, flags)
    };
    let fd = RawFd::try_from(n).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this fd for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
