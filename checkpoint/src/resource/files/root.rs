//! Paths as the container sees them.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
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
    mounts: HashMap<u64, Mount>,
}

/// One mount of the container.
struct Mount {
    device: (u32, u32),
    /// Where it is, as the container sees it.
    point: PathBuf,
}

impl Root {
    pub(super) fn of(init: Pid) -> io::Result<Self> {
        let link = format!("/proc/{init}/root");
        let fd = rustix::fs::open(
            link.as_str(),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mounts = fs::read(format!("/proc/{init}/mountinfo"))?
            .split(|byte| *byte == b'\n')
            .filter_map(mount)
            .collect();
        Ok(Self { fd, prefix: fs::read_link(link)?, mounts })
    }

    /// The path of a file inside the container; `None` when it is outside.
    pub(super) fn path(&self, held: &Held) -> Option<PathBuf> {
        if !self.mounts.contains_key(&held.info.mnt_id) {
            return None;
        }
        self.inside(held.path())
    }

    /// The same of a path whose mount is not in question.
    pub(super) fn inside(&self, link: &Path) -> Option<PathBuf> {
        Some(Path::new("/").join(link.strip_prefix(&self.prefix).ok()?))
    }

    /// Mount points of the file system with this device number.
    pub(super) fn mounts_of(&self, device: (u32, u32)) -> impl Iterator<Item = &Path> {
        let here = self.mounts.values().filter(move |mount| mount.device == device);
        here.map(|mount| &*mount.point)
    }

    /// Opens a path of the container.
    pub(super) fn open(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        resolve(self.fd.as_fd(), path, flags)
    }

    /// Whether `path` still leads to this very file.
    pub(super) fn leads_to(&self, path: &Path, held: &Held) -> bool {
        let found = self
            .open(path.as_os_str().as_bytes(), OFlags::PATH | OFlags::NOFOLLOW)
            .and_then(|fd| Ok(rustix::fs::fstat(fd)?));
        found.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == held.object())
    }
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime …`: id, parent, device, root, mount point.
fn mount(line: &[u8]) -> Option<(u64, Mount)> {
    let mut words = line.split(|byte| *byte == b' ');
    let text = |word: &[u8]| String::from_utf8(word.to_vec()).ok();
    let id = text(words.next()?)?.parse().ok()?;
    let device = text(words.nth(1)?)?;
    let (major, minor) = device.split_once(':')?;
    let point = unescape(words.nth(1)?);
    let device = (major.parse().ok()?, minor.parse().ok()?);
    Some((id, Mount { device, point: PathBuf::from(std::ffi::OsString::from_vec(point)) }))
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(mut word: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(word.len());
    while let Some((first, rest)) = word.split_first() {
        let escaped = rest
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(escaped.unwrap_or(*first));
        word = if escaped.is_some() { &rest[3..] } else { rest };
    }
    out
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
