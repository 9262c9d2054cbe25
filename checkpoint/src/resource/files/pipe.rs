//! Pipes and FIFOs: `pipe(7)`, `fifo(7)`.
//!
//! A pipe is one object with any number of ends; the content is read by
//! `tee(2)`, which takes nothing out. Ends are made by opening the pipe anew
//! through `/proc/self/fd`, one description per end, so that in the end it has
//! exactly the readers and writers it had.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{Mode, OFlags},
    pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, tee},
};
use serde::{Deserialize, Serialize};

use super::{
    Collector, Doing, Failure, File, Kind, Making, Refusal, Source, Target, root, set_status,
    table::Held,
};

/// Longest packet of a pipe in packet mode.
const PACKET: usize = 4096;

/// A pipe with what is in it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// Path from the container's root, of a FIFO.
    pub(crate) path: Option<Vec<u8>>,
    /// Bytes it has room for.
    pub(crate) capacity: u32,
    /// Content in the portions in which a reader gets it.
    pub(crate) content: Vec<Vec<u8>>,
    /// Whether these portions are packets.
    pub(crate) packets: bool,
}

/// One end of a pipe.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct End {
    /// Index of the pipe.
    pub(crate) pipe: u32,
    /// Whether this reader has seen its last writer go. One that never saw a
    /// writer waits instead.
    pub(crate) hung_up: bool,
}

/// Whether the other side of the pipe is with someone outside the tree.
pub(super) fn leads_out(held: &Held, source: &Source<'_>) -> bool {
    let ends = || source.tables.same_object(held).map(|(_, end)| end);
    let reader = ends().find(|end| end.info.can_read());
    let writer = ends().find(|end| end.info.can_write());
    match (reader, writer) {
        (Some(_), Some(_)) | (None, None) => false,
        (Some(reader), None) => !is_hung_up(reader) && has_writer(reader).unwrap_or(true),
        (None, Some(writer)) => !polled(writer).contains(PollFlags::ERR),
    }
}

fn polled(held: &Held) -> PollFlags {
    let mut fds = [PollFd::new(&held.fd, PollFlags::IN)];
    let _ready = poll(&mut fds, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 }));
    fds[0].revents()
}

fn is_hung_up(reader: &Held) -> bool {
    polled(reader).contains(PollFlags::HUP)
}

/// Tells an empty pipe without writers from one with: both poll alike when the
/// reader never saw a writer.
fn has_writer(reader: &Held) -> io::Result<bool> {
    let (_read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    match tee(&reader.fd, &write, 1, SpliceFlags::NONBLOCK) {
        Ok(0) => Ok(false),
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(true),
        Err(err) => Err(err.into()),
    }
}

pub(super) fn dump(
    held: &Held,
    source: &Source<'_>,
    out: &mut Collector<'_>,
) -> Result<End, Refusal> {
    let pipe = match out.pipe_ids.get(&held.object()) {
        Some(known) => *known,
        None => {
            let image = dump_pipe(held, source)?;
            let id = u32::try_from(out.pipes.len()).unwrap_or(u32::MAX);
            out.pipes.push(image);
            out.pipe_ids.insert(held.object(), id);
            id
        }
    };
    Ok(End { pipe, hung_up: held.info.can_read() && is_hung_up(held) })
}

fn dump_pipe(held: &Held, source: &Source<'_>) -> Result<Image, Refusal> {
    if leads_out(held, source) {
        return Err(Refusal::new(
            "is a pipe whose other end is outside the container",
            "close it first; only stdin, stdout and stderr may lead out",
        ));
    }
    let is_fifo = held.path().is_absolute();
    let path = is_fifo.then(|| source.root.path(held)).flatten();
    if is_fifo && !path.as_ref().is_some_and(|path| source.root.leads_to(path, held)) {
        return Err(Refusal::new(
            format!("is the FIFO {}, deleted or outside the container's mounts", held.link()),
            "close it first",
        ));
    }
    let capacity = fcntl_getpipe_size(&held.fd).doing("read the size of a pipe")?;
    let reader = source.tables.same_object(held).find(|(_, end)| end.info.can_read());
    let content = match reader {
        // Without a reader nobody can ever see it.
        Some((_, reader)) if source.frozen => {
            content(reader, capacity).doing("read the content of a pipe")?
        }
        _ => Vec::new(),
    };
    let direct = source
        .tables
        .same_object(held)
        .any(|(_, end)| end.info.can_write() && end.info.oflags().contains(OFlags::DIRECT));
    Ok(Image {
        path: path.map(|path| path.as_os_str().as_bytes().to_vec()),
        capacity: u32::try_from(capacity).unwrap_or(u32::MAX),
        packets: direct || content.len() > 1,
        content,
    })
}

/// Everything in the pipe, in the portions a reader would get.
fn content(reader: &Held, capacity: usize) -> io::Result<Vec<Vec<u8>>> {
    let queued =
        usize::try_from(rustix::io::ioctl_fionread(&reader.fd)?).map_err(io::Error::other)?;
    if queued == 0 {
        return Ok(Vec::new());
    }
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    fcntl_setpipe_size(&write, capacity)?;
    let copied = tee(&reader.fd, &write, capacity, SpliceFlags::NONBLOCK)?;
    if copied != queued {
        return Err(io::Error::other(format!("{copied} of {queued} bytes copied")));
    }
    let mut portions = Vec::new();
    let mut left = queued;
    while left > 0 {
        let mut portion = vec![0; left];
        let len = rustix::io::read(&read, &mut portion)?;
        portion.truncate(len);
        portions.push(portion);
        left -= len;
    }
    Ok(portions)
}

/// Makes every pipe with all its ends.
pub(super) fn open(
    pipes: &[Image],
    files: &[File],
    target: &Target<'_>,
    made: &mut [Option<OwnedFd>],
) -> Result<(), (usize, Failure)> {
    let mut ends: Vec<Vec<usize>> = vec![Vec::new(); pipes.len()];
    for (id, file) in files.iter().enumerate() {
        if let Kind::Pipe(end) = &file.kind {
            ends[end.pipe as usize].push(id);
        }
    }
    for (pipe, ends) in pipes.iter().zip(&ends) {
        let Some(&first) = ends.first() else { continue };
        let through = create(pipe, target).map_err(|err| (first, err))?;
        // `O_PATH` keeps a way in without being a reader or a writer.
        let way_in = reopen(&through, OFlags::PATH).map_err(|err| (first, err))?;
        let mut waiting = Vec::new();
        let has_writer = ends.iter().any(|id| can_write(&files[*id]));
        for id in ends {
            let (file, end) = (&files[*id], *id);
            let Kind::Pipe(End { pipe: _, hung_up }) = &file.kind else { continue };
            if !has_writer && !hung_up {
                waiting.push(end);
                continue;
            }
            made[end] = Some(open_end(&through, file).map_err(|err| (end, err))?);
        }
        drop(through);
        for end in waiting {
            made[end] = Some(open_end(&way_in, &files[end]).map_err(|err| (end, err))?);
        }
    }
    Ok(())
}

fn can_write(file: &File) -> bool {
    OFlags::from_bits_retain(file.flags) & OFlags::ACCMODE != OFlags::RDONLY
}

fn open_end(through: &OwnedFd, file: &File) -> Result<OwnedFd, Failure> {
    let flags = OFlags::from_bits_retain(file.flags);
    set_status(reopen(through, (flags & OFlags::ACCMODE) | OFlags::NONBLOCK)?, flags)
}

fn reopen(fd: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Failure> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).making("open an end of a pipe")
}

/// Makes and fills one pipe; returns a reading and writing description.
fn create(image: &Image, target: &Target<'_>) -> Result<OwnedFd, Failure> {
    let Image { path, capacity, content, packets } = image;
    let both = OFlags::RDWR | OFlags::NONBLOCK;
    let fd = match path {
        Some(path) => {
            let missing = |reason: String| Failure::Missing {
                object: format!("FIFO {}", String::from_utf8_lossy(path)),
                reason,
            };
            let found = root::resolve(target.root, path, OFlags::PATH | OFlags::NOFOLLOW)
                .map_err(|err| missing(err.to_string()))?;
            let mode = rustix::fs::fstat(&found).making("look at a FIFO")?.st_mode;
            if mode & libc::S_IFMT != libc::S_IFIFO {
                return Err(missing("is no FIFO here".to_owned()));
            }
            reopen(&found, both)?
        }
        None => {
            let (read, _write) = pipe_with(PipeFlags::CLOEXEC).making("make a pipe")?;
            reopen(&read, both)?
        }
    };
    let capacity = *capacity as usize;
    if fcntl_getpipe_size(&fd).making("read the size of a pipe")? != capacity {
        fcntl_setpipe_size(&fd, capacity).making("set the size of a pipe")?;
    }
    if content.iter().map(Vec::len).sum::<usize>() > capacity {
        return Err(Failure::Damaged("more content than the pipe has room for"));
    }
    for portion in content {
        let packet = *packets && portion.len() <= PACKET;
        let mode = if packet { OFlags::DIRECT } else { OFlags::empty() };
        rustix::fs::fcntl_setfl(&fd, both | mode).making("set the mode of a pipe")?;
        let written = rustix::io::write(&fd, portion).making("fill a pipe")?;
        if written != portion.len() {
            return Err(Failure::Damaged("more content than the pipe has room for"));
        }
    }
    Ok(fd)
}
