//! Files without a name: deleted while open, made by `O_TMPFILE`, memfds.
//!
//! Their content travels as an object of the image (see
//! [`shared`](crate::resource::shared)), once for all that have it open or
//! mapped; here are the descriptions of it. Extended attributes stay behind.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::PermissionsExt},
    },
    path::Path,
};

use nix::unistd::fchown;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom, Timestamps, fstatfs};
use serde::{Deserialize, Serialize};

use super::{
    Collector, Doing, Failure, Making, Refusal, Target,
    root::{self, Parent},
    table::Held,
};
use crate::resource::shared::ObjectId;

const HUGETLBFS: i64 = 0x9584_58f6;
const TMPFS: i64 = 0x0102_1994;

/// A description of a file without a name.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// The object with its content.
    object: ObjectId,
    /// Where the next read or write happens.
    pos: u64,
}

/// A deleted file, without its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Deleted {
    /// The last path it had, from the container's root.
    pub(crate) path: Vec<u8>,
    /// Whether it may be linked to a name again, as `O_TMPFILE` allows.
    linkable: bool,
    mode: u32,
    owner: (u32, u32),
    /// Seconds and nanoseconds of the last access and modification.
    times: [(i64, i64); 2],
}

/// A deleted directory.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Directory(Deleted);

impl Deleted {
    /// What is to be known of a deleted file that had `path`.
    pub(crate) fn of(file: BorrowedFd<'_>, path: &[u8]) -> io::Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        let nsec = |n: u64| n.cast_signed();
        Ok(Self {
            path: path.to_vec(),
            // The name that the kernel gives to what never had one.
            linkable: path.ends_with(format!("/#{}", stat.st_ino).as_bytes()),
            mode: stat.st_mode & 0o7777,
            owner: (stat.st_uid, stat.st_gid),
            times: [
                (stat.st_atime, nsec(stat.st_atime_nsec)),
                (stat.st_mtime, nsec(stat.st_mtime_nsec)),
            ],
        })
    }

    /// Makes the file again, empty; nobody else ever sees it.
    pub(crate) fn create(&self, root: BorrowedFd<'_>) -> io::Result<File> {
        let Self { path, linkable, mode, owner: _, times: _ } = self;
        let Parent { fd: parent, name } = Parent::open(root, path)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(*mode);
        if !linkable {
            let made = rustix::fs::openat(
                &parent,
                name,
                flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW,
                mode,
            );
            match made {
                Ok(fd) => {
                    rustix::fs::unlinkat(&parent, name, AtFlags::empty())?;
                    return Ok(File::from(fd));
                }
                // Another file has the name by now.
                Err(rustix::io::Errno::EXIST) => (),
                Err(err) => return Err(err.into()),
            }
        }
        Ok(File::from(rustix::fs::openat(&parent, ".", flags | OFlags::TMPFILE, mode)?))
    }

    /// Gives it its owner, mode and times, once it is filled.
    pub(crate) fn finish(&self, file: &File) -> io::Result<()> {
        let Self { path: _, linkable: _, mode, owner: (uid, gid), times } = self;
        fchown(file.as_raw_fd(), Some((*uid).into()), Some((*gid).into()))?;
        file.set_permissions(fs::Permissions::from_mode(*mode))?;
        let [last_access, last_modification] =
            times.map(|(tv_sec, tv_nsec)| rustix::fs::Timespec { tv_sec, tv_nsec });
        Ok(rustix::fs::futimens(file, &Timestamps { last_access, last_modification })?)
    }
}

/// Whether the file was unlinked on a file system that is memory, and that the
/// destination makes anew.
pub(super) fn is_on_tmpfs(held: &Held) -> bool {
    held.path().as_os_str().as_bytes().ends_with(b" (deleted)")
        && fstatfs(&held.fd).is_ok_and(|fs| fs.f_type == TMPFS)
}

/// Whether the file is a memfd.
pub(super) fn is_memfd(held: &Held) -> bool {
    memfd_name(held).is_some()
}

fn memfd_name(held: &Held) -> Option<&[u8]> {
    let link = held.path().as_os_str().as_bytes();
    link.strip_prefix(b"/memfd:")?.strip_suffix(b" (deleted)")
}

pub(super) fn dump_memfd(held: &Held, out: &mut Collector<'_>) -> Result<Image, Refusal> {
    let name = memfd_name(held).unwrap_or_default();
    if fstatfs(&held.fd).doing("tell its file system")?.f_type == HUGETLBFS {
        return Err(Refusal::unmovable("is a memfd of huge pages"));
    }
    let object = out.objects.hold_memfd(held.fd.as_fd(), name).doing("read its seals")?;
    Ok(Image { object, pos: held.info.pos })
}

/// A file whose last name is gone.
pub(super) fn dump(held: &Held, path: &Path, out: &mut Collector<'_>) -> Result<Image, Refusal> {
    let object = out.objects.hold_deleted(held.fd.as_fd(), last_name(path));
    Ok(Image { object: object.doing("look at it")?, pos: held.info.pos })
}

pub(super) fn dump_directory(held: &Held, path: &Path) -> Result<Directory, Refusal> {
    Deleted::of(held.fd.as_fd(), last_name(path)).doing("look at it").map(Directory)
}

fn last_name(path: &Path) -> &[u8] {
    let path = path.as_os_str().as_bytes();
    path.strip_suffix(b" (deleted)").unwrap_or(path)
}

/// Opens the object once more.
pub(super) fn open(image: &Image, flags: OFlags, target: &Target<'_>) -> Result<OwnedFd, Failure> {
    let Image { object, pos } = image;
    let object = target.objects.get(*object).ok_or(Failure::Damaged("its content is missing"))?;
    let path = format!("/proc/self/fd/{}", object.as_raw_fd());
    // `O_TMPFILE` left the directory's flag behind.
    let flags = ((flags & super::regular::REOPEN) - OFlags::DIRECTORY) | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty()).making("open a file without a name")?;
    if *pos != 0 {
        rustix::fs::seek(&fd, SeekFrom::Start(*pos)).making("set the position of a file")?;
    }
    Ok(fd)
}

/// Makes a directory for the moment it takes to open it.
pub(super) fn open_directory(
    image: &Directory,
    flags: OFlags,
    target: &Target<'_>,
) -> Result<OwnedFd, Failure> {
    let Directory(deleted) = image;
    let path = String::from_utf8_lossy(&deleted.path);
    let missing = |err: io::Error| Failure::Missing {
        object: format!("a place for the deleted directory {path}"),
        reason: err.to_string(),
    };
    let Parent { fd: parent, name } = Parent::open(target.root, &deleted.path).map_err(missing)?;
    let mode = Mode::from_raw_mode(deleted.mode);
    rustix::fs::mkdirat(&parent, name, mode).map_err(|err| missing(err.into()))?;
    let opened = root::resolve(parent.as_fd(), name.as_bytes(), flags & super::regular::REOPEN);
    rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR).making("remove a directory")?;
    let fd = opened.map_err(missing)?;
    if FileType::from_raw_mode(rustix::fs::fstat(&fd).making("look at it")?.st_mode)
        != FileType::Directory
    {
        return Err(Failure::Damaged("a deleted directory that is none"));
    }
    if !flags.contains(OFlags::PATH) {
        deleted.finish(&File::from(fd.try_clone().making("duplicate it")?)).making("finish it")?;
    }
    Ok(fd)
}
