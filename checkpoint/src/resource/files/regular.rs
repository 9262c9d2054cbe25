//! Files that have a path: regular files, directories, anything `O_PATH`.

use std::os::{fd::OwnedFd, unix::ffi::OsStrExt};

use rustix::fs::{FileType, OFlags, SeekFrom};
use serde::{Deserialize, Serialize};

use super::{
    Collector, Doing, Failure, Kind, Making, Refusal, Source, Target, ghost, root, table::Held,
};

/// Flags that `open` takes again; never one that creates or empties a file.
pub(super) const REOPEN: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::NONBLOCK)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::DIRECT)
    .union(OFlags::NOATIME)
    .union(OFlags::PATH)
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW);

/// What an `O_PATH` open takes; the rest means nothing to it.
const REOPEN_PATH: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW);

/// A file by its path in the container.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// From the container's root.
    pub(crate) path: Vec<u8>,
    /// The type bits of its mode.
    pub(crate) file_type: u32,
    /// Its size, so that another file of that name is noticed.
    pub(crate) size: u64,
    /// Where the next read or write happens.
    pub(crate) pos: u64,
}

pub(super) fn dump(
    held: &Held,
    source: &Source<'_>,
    out: &mut Collector<'_>,
) -> Result<Kind, Refusal> {
    let is_path = held.info.oflags().contains(OFlags::PATH);
    if !is_path && ghost::is_memfd(held) {
        return ghost::dump_memfd(held, out).map(Kind::Ghost);
    }
    let Some(path) = source.root.path(held) else {
        return Err(Refusal::new(
            format!("is {}, outside the container's mounts", held.link()),
            "mount it into the container, or close it first",
        ));
    };
    if !source.root.leads_to(&path, held) {
        match held.file_type() {
            FileType::RegularFile if held.stat.st_nlink == 0 && !is_path => {
                return ghost::dump(held, &path, out).map(Kind::Ghost);
            }
            FileType::Directory if held.stat.st_nlink == 0 => {
                return ghost::dump_directory(held, &path).map(Kind::GhostDirectory);
            }
            // Its other names stay behind with the file system.
            FileType::RegularFile if !is_path && ghost::is_on_tmpfs(held) => {
                out.losses.push(format!("is {}, which keeps no other name", held.link()));
                return ghost::dump(held, &path, out).map(Kind::Ghost);
            }
            _ => (),
        }
        return Err(Refusal::new(
            format!("is {}, which is renamed, deleted or hidden by a mount", held.link()),
            "close it first",
        ));
    }
    let pos = held.info.pos;
    if held.file_type() == FileType::Directory && pos != 0 && !is_path {
        // The position is the filesystem's own cookie.
        out.losses.push(format!(
            "is {}, a directory being listed: on another filesystem entries may be met twice or not at all",
            held.link()
        ));
    }
    Ok(Kind::Regular(Image {
        path: path.as_os_str().as_bytes().to_vec(),
        file_type: held.stat.st_mode & libc::S_IFMT,
        size: size(&held.fd, held.file_type()).doing("read its size")?,
        pos: if is_path { 0 } else { pos },
    }))
}

/// The size where it means the same on both hosts.
fn size(fd: &OwnedFd, file_type: FileType) -> rustix::io::Result<u64> {
    if file_type != FileType::RegularFile {
        return Ok(0);
    }
    Ok(rustix::fs::fstat(fd)?.st_size.cast_unsigned())
}

pub(super) fn open(image: &Image, flags: OFlags, target: &Target<'_>) -> Result<OwnedFd, Failure> {
    let Image { path, file_type, size: expected, pos } = image;
    let missing = |reason: String| Failure::Missing {
        object: format!("file {}", String::from_utf8_lossy(path)),
        reason,
    };
    // Looked at before it is opened: opening a FIFO or a device acts on it.
    let found = root::resolve(target.root, path, OFlags::PATH | OFlags::NOFOLLOW)
        .map_err(|err| missing(err.to_string()))?;
    let mode = rustix::fs::fstat(&found).making("look at a file")?.st_mode;
    if mode & libc::S_IFMT != *file_type {
        return Err(missing(format!(
            "is of type {:o} here, was {file_type:o}",
            mode & libc::S_IFMT
        )));
    }
    let is_path = flags.contains(OFlags::PATH);
    if !is_path && *file_type != libc::S_IFREG && *file_type != libc::S_IFDIR {
        return Err(Failure::Damaged("neither a file nor a directory"));
    }
    let flags = flags & if is_path { REOPEN_PATH } else { REOPEN };
    let fd = root::resolve(target.root, path, flags).map_err(|err| missing(err.to_string()))?;
    let size = size(&fd, FileType::from_raw_mode(mode)).making("read the size of a file")?;
    if size != *expected {
        return Err(missing(format!("is {size} bytes long here, was {expected}")));
    }
    if *pos != 0 && !is_path {
        rustix::fs::seek(&fd, SeekFrom::Start(*pos)).making("set the position of a file")?;
    }
    Ok(fd)
}
