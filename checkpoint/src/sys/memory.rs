//! Another process's memory: `process_vm_readv(2)`, `/proc/PID/mem`, and
//! `PAGEMAP_SCAN` (`ioctl_pagemap_scan(2)`, Linux 6.7).

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use libc::c_void;
use nix::unistd::Pid;

/// Size of a page, in bytes.
pub(crate) const PAGE_LEN: usize = 4096;
/// The same, to count with addresses.
pub(crate) const PAGE: u64 = PAGE_LEN as u64;

/// Reads the `remote` ranges `(addr, len)` one after the other into `buf`.
///
/// Returns the bytes read: fewer than asked at a page that is not readable.
pub(crate) fn read(pid: Pid, buf: &mut [u8], remote: &[(u64, u64)]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let remote = iovecs(remote);
    // SAFETY: `local` covers exactly `buf`, which we borrow mutably for the
    // whole call; remote addresses are resolved in the target, never in ours.
    let n = unsafe {
        let (iov, len) = (remote.as_ptr(), remote.len() as u64);
        libc::process_vm_readv(pid.as_raw(), &raw const local, 1, iov, len, 0)
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes `data` to the `remote` ranges `(addr, len)` one after the other.
///
/// Returns the bytes written: fewer than asked at a page that is not writable.
pub(crate) fn write(pid: Pid, data: &[u8], remote: &[(u64, u64)]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let remote = iovecs(remote);
    // SAFETY: `local` covers exactly `data`, which the call only reads; remote
    // addresses are resolved in the target, never in ours.
    let n = unsafe {
        let (iov, len) = (remote.as_ptr(), remote.len() as u64);
        libc::process_vm_writev(pid.as_raw(), &raw const local, 1, iov, len, 0)
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Longest list of ranges one call takes (`UIO_MAXIOV`).
pub(crate) const MAX_RANGES: usize = 1024;

fn iovecs(ranges: &[(u64, u64)]) -> Vec<libc::iovec> {
    let size = |n| usize::try_from(n).expect("x86-64");
    ranges
        .iter()
        .map(|&(addr, len)| libc::iovec { iov_base: size(addr) as *mut c_void, iov_len: size(len) })
        .collect()
}

/// Reads exactly `buf` at `addr`.
pub(crate) fn read_exact(pid: Pid, buf: &mut [u8], addr: u64) -> io::Result<()> {
    let len = buf.len();
    match read(pid, buf, &[(addr, len as u64)])? {
        n if n == len => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Writes exactly `data` at `addr`.
pub(crate) fn write_exact(pid: Pid, data: &[u8], addr: u64) -> io::Result<()> {
    match write(pid, data, &[(addr, data.len() as u64)])? {
        n if n == data.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// `/proc/PID/mem`: reaches pages that the process itself may not read or
/// write, as long as they are private (`FOLL_FORCE`).
pub(crate) struct ForcedMemory(File);

impl ForcedMemory {
    pub(crate) fn open(pid: Pid) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem")).map(Self)
    }

    pub(crate) fn read(&self, buf: &mut [u8], addr: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, addr)
    }

    pub(crate) fn write(&self, data: &[u8], addr: u64) -> io::Result<()> {
        self.0.write_all_at(data, addr)
    }
}

/// Categories of a page in a scan.
pub(crate) mod category {
    /// Written since it was last protected by [`super::scan_and_protect`].
    pub(crate) const WRITTEN: u64 = 1 << 1;
    /// Backed by a file and not (yet) a private copy; shared memory too.
    pub(crate) const FILE: u64 = 1 << 2;
    /// In memory.
    pub(crate) const PRESENT: u64 = 1 << 3;
    /// On swap.
    pub(crate) const SWAPPED: u64 = 1 << 4;
    /// The shared zero page: never written.
    pub(crate) const PFNZERO: u64 = 1 << 5;
}

/// What a scan reports: pages that have all of `all`, one of `any` and none of
/// `none`.
#[derive(Clone, Copy)]
pub(crate) struct Filter {
    pub(crate) all: u64,
    pub(crate) any: u64,
    pub(crate) none: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}
const _: () = assert!(size_of::<PageRegion>() == 24);

#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<ScanArg>() == 96);

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// Ranges `(start, end)` of `pid`'s pages in `from..to` that match `filter`, in
/// order, neighbours joined.
pub(crate) fn scan(pid: Pid, from: u64, to: u64, filter: Filter) -> io::Result<Vec<(u64, u64)>> {
    walk(pid, (from, to), filter, 0)
}

/// The same, and lets the next write to each of these pages be noticed. The
/// range is registered with a userfaultfd for that; if not, that is an error.
pub(crate) fn scan_and_protect(
    pid: Pid,
    from: u64,
    to: u64,
    filter: Filter,
) -> io::Result<Vec<(u64, u64)>> {
    const PM_SCAN_WP_MATCHING: u64 = 1;
    const PM_SCAN_CHECK_WPASYNC: u64 = 2;
    walk(pid, (from, to), filter, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC)
}

fn walk(
    pid: Pid,
    (from, to): (u64, u64),
    filter: Filter,
    flags: u64,
) -> io::Result<Vec<(u64, u64)>> {
    const REGIONS: usize = 4096;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut buf = vec![PageRegion::default(); REGIONS];
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut start = from;
    loop {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags,
            start,
            end: to,
            walk_end: 0,
            vec: buf.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            max_pages: 0,
            category_inverted: filter.none,
            category_mask: filter.all | filter.none,
            category_anyof_mask: filter.any,
            return_mask: filter.all | filter.any,
        };
        // SAFETY: `arg` and the region buffer it points to outlive the call;
        // the kernel writes at most `vec_len` regions.
        let n = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        for region in &buf[..n.min(REGIONS)] {
            match found.last_mut() {
                Some(last) if last.1 == region.start => last.1 = region.end,
                _ => found.push((region.start, region.end)),
            }
        }
        // `walk_end` is stale after more than 512 regions: it means something
        // only when the buffer was filled.
        if n < REGIONS {
            return Ok(found);
        }
        start = arg.walk_end;
    }
}

/// Anonymous shared memory of `len` bytes, as a file that others can map.
pub(crate) fn shared_anonymous(len: u64) -> io::Result<std::os::fd::OwnedFd> {
    let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = at as usize;
    let end = start + len.next_multiple_of(4096);
    let path = format!("/proc/self/map_files/{start:x}-{end:x}");
    let file = OpenOptions::new().read(true).write(true).open(path);
    // SAFETY: the mapping made above, which nothing refers to.
    unsafe { libc::munmap(at, len) };
    file.map(Into::into)
}
