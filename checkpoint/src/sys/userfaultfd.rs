//! Asynchronous write protection (`userfaultfd(2)`, `UFFD_FEATURE_WP_ASYNC`,
//! Linux 6.7): a write to a protected page goes on at once and is remembered.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

/// Flags with which the process makes the fd: user mode only, which needs no
/// privilege, and the kernel's own writes are noticed all the same.
pub(crate) const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | 1;

const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFD_API: u64 = 0xaa;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xaa, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const MODE_WP: u64 = 1 << 1;

/// A process's userfaultfd, held by us. Closing it ends the protection.
#[derive(Debug)]
pub(crate) struct WriteTracker(OwnedFd);

impl WriteTracker {
    /// Takes over the fd that the process made.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let features = FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_WP_HUGETLBFS_SHMEM;
        let mut api = [UFFD_API, features, 0];
        // SAFETY: the kernel reads and writes the three words of `api`.
        let ret = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
        if ret == -1 { Err(io::Error::last_os_error()) } else { Ok(Self(fd)) }
    }

    /// Makes pages of `start..end` protectable. Again is as good as once.
    pub(crate) fn register(&self, (start, end): (u64, u64)) -> io::Result<()> {
        let mut range = [start, end - start, MODE_WP, 0];
        // SAFETY: the kernel reads and writes the four words of `range`.
        let ret = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, range.as_mut_ptr()) };
        if ret == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
