//! Content without a name in the file system: anonymous shared memory, memfds
//! (`memfd_create(2)`), deleted files. Each travels once, whoever maps it or
//! has it open.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, File},
    io::{self, IoSlice},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::{FileExt, MetadataExt},
    },
};

use nix::{
    sys::memfd::{MemFdCreateFlag, memfd_create},
    unistd::{Pid, Whence, lseek},
};
use serde::{Deserialize, Serialize};

use super::{
    files::ghost::Deleted,
    pages::{Sent, encode_runs},
};
use crate::{
    image::{ImageSink, Kind},
    proc::{Vma, VmaKind},
    sys,
};

/// An object: its inode on the source, or a number above all of those for a
/// deleted file, whose inode is only unique on its own file system.
pub(crate) type ObjectId = u64;

/// What an object is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum ObjectKind {
    /// `MAP_SHARED | MAP_ANONYMOUS`.
    Anonymous,
    Memfd {
        name: Vec<u8>,
        seals: i32,
    },
    Deleted(Deleted),
}

/// Ids of deleted files count up from here.
const FIRST_DELETED: ObjectId = 1 << 63;

/// One object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Object {
    pub(crate) id: ObjectId,
    kind: ObjectKind,
    size: u64,
}

/// How a deleted file that is mapped is dealt with.
pub(crate) enum Nature {
    /// As an object of the image.
    Object,
    /// As System V shared memory, of which it is a segment.
    Segment,
    /// Not at all: what it is.
    Unmovable(&'static str),
    /// It is an ordinary file.
    File,
}

/// What the file behind `vma` is.
pub(crate) fn nature(vma: &Vma) -> Nature {
    match &vma.kind {
        VmaKind::File { path, .. } if path.starts_with(b"/memfd:") => Nature::Object,
        VmaKind::File { path, deleted: true, .. } if path == b"/dev/zero" => Nature::Object,
        VmaKind::File { path, deleted: true, .. } if path.starts_with(b"/SYSV") => Nature::Segment,
        VmaKind::File { path, .. } if path.starts_with(b"/[aio]") => {
            Nature::Unmovable("is the ring of an AIO context")
        }
        VmaKind::File { path, .. } if path.starts_with(b"anon_inode:") => {
            Nature::Unmovable("is the memory of a kernel object")
        }
        VmaKind::File { deleted: true, .. } => Nature::Object,
        _ => Nature::File,
    }
}

/// The objects met during a dump, each with a file to read it by.
#[derive(Default)]
pub(crate) struct Objects {
    found: BTreeMap<ObjectId, (Object, File)>,
    /// Deleted files by device and inode.
    deleted: BTreeMap<(u64, u64), ObjectId>,
}

impl Objects {
    /// Takes in a memfd that someone has open, unless it is known already.
    pub(crate) fn hold_memfd(&mut self, fd: BorrowedFd<'_>, name: &[u8]) -> io::Result<ObjectId> {
        let file = File::from(fd.try_clone_to_owned()?);
        let id = file.metadata()?.ino();
        if !self.found.contains_key(&id) {
            let seals = rustix::fs::fcntl_get_seals(&file)?.bits().cast_signed();
            let kind = ObjectKind::Memfd { name: name.to_vec(), seals };
            self.hold(id, kind, file)?;
        }
        Ok(id)
    }

    /// Takes in a deleted file that last had `path`, unless it is known already.
    pub(crate) fn hold_deleted(&mut self, fd: BorrowedFd<'_>, path: &[u8]) -> io::Result<ObjectId> {
        let stat = rustix::fs::fstat(fd)?;
        if let Some(id) = self.deleted.get(&(stat.st_dev, stat.st_ino)) {
            return Ok(*id);
        }
        let id = FIRST_DELETED + self.deleted.len() as u64;
        // The owner's description may be one for writing only.
        let file = File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        self.hold(id, ObjectKind::Deleted(Deleted::of(fd, path)?), file)?;
        self.deleted.insert((stat.st_dev, stat.st_ino), id);
        Ok(id)
    }

    fn hold(&mut self, id: ObjectId, kind: ObjectKind, file: File) -> io::Result<()> {
        let size = file.metadata()?.size();
        self.found.insert(id, (Object { id, kind, size }, file));
        Ok(())
    }

    /// The object behind `vma` of `pid`, if it is one.
    pub(crate) fn identify(&mut self, pid: Pid, vma: &Vma) -> io::Result<Option<ObjectId>> {
        let VmaKind::File { path, id: (_, inode), .. } = &vma.kind else { return Ok(None) };
        match nature(vma) {
            Nature::Object => {}
            Nature::File | Nature::Segment => return Ok(None),
            Nature::Unmovable(what) => return Err(io::Error::other(what)),
        }
        if self.found.contains_key(inode) {
            return Ok(Some(*inode));
        }
        let file = map_file(pid, vma)?;
        match path.strip_prefix(b"/memfd:") {
            Some(name) => return self.hold_memfd(file.as_fd(), name).map(Some),
            None if path == b"/dev/zero" => self.hold(*inode, ObjectKind::Anonymous, file)?,
            None => return self.hold_deleted(file.as_fd(), path).map(Some),
        }
        Ok(Some(*inode))
    }

    pub(crate) fn len(&self) -> usize {
        self.found.len()
    }

    /// Sends every object without its content.
    pub(crate) fn announce(&self, sink: &mut dyn ImageSink) -> io::Result<()> {
        self.found
            .values()
            .try_for_each(|(object, _)| crate::image::put(sink, Kind::Object, object).map(drop))
    }

    /// Sends every object and its content.
    pub(crate) fn dump(&self, sink: &mut dyn ImageSink) -> io::Result<Sent> {
        let mut sent = Sent::default();
        let mut buf = vec![0; 256 << 10];
        for (object, file) in self.found.values() {
            crate::image::put(sink, Kind::Object, object)?;
            let content = send_content(object.id, file, &mut buf, sink)?;
            sent.pages += content.pages;
            sent.bytes += content.bytes;
        }
        Ok(sent)
    }
}

/// Sends what `file`, which holds an object, has in it.
pub(crate) fn send_content(
    id: ObjectId,
    file: &File,
    buf: &mut [u8],
    sink: &mut dyn ImageSink,
) -> io::Result<Sent> {
    let mut sent = Sent::default();
    let mut at = 0;
    while let Some((start, end)) = next_data(file, at)? {
        at = end;
        for offset in (start..end).step_by(buf.len()) {
            let len = usize::try_from(end - offset).unwrap_or(usize::MAX).min(buf.len());
            file.read_exact_at(&mut buf[..len], offset)?;
            let head = encode_runs(id, &[(offset, len as u64)]);
            let parts = [IoSlice::new(&head), IoSlice::new(&buf[..len])];
            sink.put(Kind::ObjectPages as u16, &parts)?;
            sent.pages += (len as u64).div_ceil(sys::memory::PAGE);
            sent.bytes += (head.len() + len) as u64;
        }
    }
    Ok(sent)
}

/// Opens the file behind a mapping, whatever became of its name.
pub(crate) fn map_file(pid: Pid, vma: &Vma) -> io::Result<File> {
    File::open(format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end))
}

/// The next range that is not a hole.
fn next_data(file: &File, from: u64) -> io::Result<Option<(u64, u64)>> {
    let seek = |from: u64, whence| {
        let from = i64::try_from(from).map_err(|_| nix::Error::EINVAL)?;
        lseek(file.as_raw_fd(), from, whence).map(i64::cast_unsigned)
    };
    match seek(from, Whence::SeekData) {
        Ok(start) => Ok(Some((start, seek(start, Whence::SeekHole)?))),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(err) => Err(err.into()),
    }
}

/// The objects on the destination, held by the engine until all map them.
#[derive(Default)]
pub(crate) struct Created {
    files: BTreeMap<ObjectId, (Object, File)>,
}

impl Created {
    /// Creates an empty object of the right size; `root` is the container's
    /// root directory.
    pub(crate) fn create(&mut self, object: Object, root: BorrowedFd<'_>) -> io::Result<()> {
        if let Some((known, file)) = self.files.get_mut(&object.id)
            && known.kind == object.kind
        {
            // Announced before, it may have grown or shrunk since.
            if known.size != object.size {
                file.set_len(object.size)?;
            }
            *known = object;
            return Ok(());
        }
        let file = match &object.kind {
            ObjectKind::Anonymous => File::from(sys::memory::shared_anonymous(object.size)?),
            ObjectKind::Memfd { name, .. } => {
                let name = CString::new(name.clone())?;
                let flags = MemFdCreateFlag::MFD_CLOEXEC | MemFdCreateFlag::MFD_ALLOW_SEALING;
                let file = File::from(memfd_create(&name, flags)?);
                file.set_len(object.size)?;
                file
            }
            ObjectKind::Deleted(deleted) => {
                let file = deleted.create(root)?;
                file.set_len(object.size)?;
                file
            }
        };
        self.files.insert(object.id, (object, file));
        Ok(())
    }

    /// Fills ranges `(offset, length)` of an object.
    pub(crate) fn fill(&self, id: ObjectId, runs: &[(u64, u64)], data: &[u8]) -> io::Result<()> {
        let (object, file) = self.files.get(&id).ok_or(io::ErrorKind::InvalidData)?;
        fill_file(file, object.size, runs, data)
    }

    /// The file of an object.
    pub(crate) fn get(&self, id: ObjectId) -> Option<BorrowedFd<'_>> {
        self.files.get(&id).map(|(_, file)| file.as_fd())
    }

    /// Seals what was sealed and finishes what was deleted: after everybody
    /// has mapped it.
    pub(crate) fn seal(&self) -> io::Result<()> {
        for (object, file) in self.files.values() {
            if let ObjectKind::Deleted(deleted) = &object.kind {
                deleted.finish(file)?;
            }
            if let ObjectKind::Memfd { seals, .. } = object.kind
                && seals != 0
            {
                let seals = nix::fcntl::SealFlag::from_bits_retain(seals);
                nix::fcntl::fcntl(file.as_raw_fd(), nix::fcntl::FcntlArg::F_ADD_SEALS(seals))?;
            }
        }
        Ok(())
    }
}

/// Fills ranges `(offset, length)` of a file that holds `size` bytes of an object.
pub(crate) fn fill_file(
    file: &File,
    size: u64,
    runs: &[(u64, u64)],
    data: &[u8],
) -> io::Result<()> {
    let mut data = data;
    for &(offset, len) in runs {
        if offset.checked_add(len).is_none_or(|end| end > size.next_multiple_of(4096)) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let (part, rest) = data.split_at(usize::try_from(len).expect("fits the record"));
        file.write_all_at(part, offset)?;
        data = rest;
    }
    Ok(())
}

/// The size of the file behind a mapping, in bytes.
pub(crate) fn file_size(pid: Pid, vma: &Vma) -> io::Result<u64> {
    fs::metadata(format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end)).map(|m| m.size())
}
