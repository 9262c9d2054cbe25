//! Paths as the container sees them.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::unistd::Pid;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::table::Held;

/// The container's root directory and the mounts below it, on the source.
pub(super) struct Root {
    fd: OwnedFd,
    /// Where it is in the paths the kernel shows us: `/` unless the tree is
    /// merely chrooted.
    prefix: PathBuf,
    mounts: HashSet<u64>,
}

impl Root {
    pub(super) fn of(init: Pid) -> io::Result<Self> {
        let link = format!("/proc/{init}/root");
        let fd = rustix::fs::open(
            link.as_str(),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mounts = fs::read_to_string(format!("/proc/{init}/mountinfo"))?
            .lines()
            .filter_map(|line| line.split(' ').next()?.parse().ok())
            .collect();
        Ok(Self { fd, prefix: fs::read_link(link)?, mounts })
    }

    /// The path of a file inside the container; `None` when it is outside.
    pub(super) fn path(&self, held: &Held) -> Option<PathBuf> {
        if !self.mounts.contains(&held.info.mnt_id) {
            return None;
        }
        self.inside(held.path())
    }

    /// The same of a path whose mount is not in question.
    pub(super) fn inside(&self, link: &Path) -> Option<PathBuf> {
        Some(Path::new("/").join(link.strip_prefix(&self.prefix).ok()?))
    }

    /// Whether `path` still leads to this very file.
    pub(super) fn leads_to(&self, path: &Path, held: &Held) -> bool {
        let found =
            resolve(self.fd.as_fd(), path.as_os_str().as_bytes(), OFlags::PATH | OFlags::NOFOLLOW)
                .and_then(|fd| Ok(rustix::fs::fstat(fd)?));
        found.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == held.object())
    }
}

/// Opens a path of the container; no `..`, symlink or mount leads out of `root`.
pub(super) fn resolve(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let path = OsStr::from_bytes(path);
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), how)?)
}

/// The directory that a path of the container leads into.
pub(super) struct Parent<'a> {
    pub(super) fd: OwnedFd,
    pub(super) name: &'a OsStr,
}

impl<'a> Parent<'a> {
    pub(super) fn open(root: BorrowedFd<'_>, path: &'a [u8]) -> io::Result<Self> {
        let at = path.iter().rposition(|byte| *byte == b'/').ok_or(io::ErrorKind::InvalidInput)?;
        let (parent, name) = (&path[..=at], &path[at + 1..]);
        if matches!(name, b"" | b"." | b"..") {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let fd = resolve(root, parent, OFlags::PATH | OFlags::DIRECTORY)?;
        Ok(Self { fd, name: OsStr::from_bytes(name) })
    }
}
