//! Watches on files and directories (`inotify(7)`).
//!
//! The kernel shows a watched file by its inode and handle, not by its path.
//! Events that nobody has read can only be read by taking them out, so they
//! are lost, by name.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
};

use rustix::fs::{OFlags, inotify};
use serde::{Deserialize, Serialize};

use super::{
    Collector, Doing, Failure, Making, Refusal, Source, Target, root, set_status, table::Held,
};
use crate::sys;

/// An inotify instance: its watches by number.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image(Vec<Watch>);

/// One watch.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Watch {
    wd: i32,
    mask: u32,
    /// From the container's root.
    path: Vec<u8>,
}

/// A watch as the kernel shows it.
struct Shown {
    wd: i32,
    inode: u64,
    device: (u32, u32),
    mask: u32,
    handle_kind: i32,
    handle: Vec<u8>,
}

pub(super) fn dump(
    held: &Held,
    source: &Source<'_>,
    out: &mut Collector<'_>,
) -> Result<Image, Refusal> {
    if rustix::io::ioctl_fionread(&held.fd).doing("read the length of its queue")? > 0 {
        out.losses.push("drops inotify events nobody has read yet".to_owned());
    }
    let lines = held.info.rest.lines().filter(|line| line.starts_with("inotify "));
    let watches = lines.map(|line| {
        let shown = parse(line)
            .ok_or_else(|| Refusal::unmovable("is an inotify instance in an unknown form"))?;
        let path = find(&shown, source).map_err(|err| {
            Refusal::new(
                format!("watches a file whose path cannot be found: {err}"),
                "remove the watch, or use a file system with file handles",
            )
        })?;
        let path = path.as_os_str().as_bytes().to_vec();
        Ok(Watch { wd: shown.wd, mask: shown.mask, path })
    });
    let mut watches = watches.collect::<Result<Vec<_>, Refusal>>()?;
    watches.sort_by_key(|watch| watch.wd);
    Ok(Image(watches))
}

/// `inotify wd:1 ino:3c4a7 sdev:fe00000 mask:3f ignored_mask:0 fhandle-bytes:8
/// fhandle-type:1 f_handle:a7c4030000000000`.
fn parse(line: &str) -> Option<Shown> {
    let field = |key: &str| {
        let words = line.split_whitespace();
        words.filter_map(|word| word.split_once(':')).find(|(name, _)| *name == key)
    };
    let hex = |key: &str| u64::from_str_radix(field(key)?.1, 16).ok();
    let small = |key: &str| u32::try_from(hex(key)?).ok();
    let device = small("sdev")?;
    let handle = field("f_handle").map_or("", |(_, handle)| handle);
    Some(Shown {
        wd: field("wd")?.1.parse().ok()?,
        inode: hex("ino")?,
        device: (device >> 20, device & 0xf_ffff),
        mask: small("mask")?,
        handle_kind: small("fhandle-type").unwrap_or(0).cast_signed(),
        handle: (0..handle.len() / 2)
            .map(|at| u8::from_str_radix(handle.get(2 * at..2 * at + 2)?, 16).ok())
            .collect::<Option<_>>()?,
    })
}

/// The path of a watched file, on whichever mount of its file system shows it.
fn find(shown: &Shown, source: &Source<'_>) -> io::Result<PathBuf> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for mount in source.root.mounts_of(shown.device) {
        let found =
            source.root.open(mount.as_os_str().as_bytes(), OFlags::RDONLY).and_then(|mount| {
                let file =
                    sys::inotify::open_by_handle(mount.as_fd(), shown.handle_kind, &shown.handle)?;
                let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
                let path = source.root.inside(&link).ok_or(io::ErrorKind::NotFound)?;
                let again = source
                    .root
                    .open(path.as_os_str().as_bytes(), OFlags::PATH | OFlags::NOFOLLOW)?;
                if rustix::fs::fstat(&again)?.st_ino != shown.inode {
                    return Err(io::ErrorKind::NotFound.into());
                }
                Ok(path)
            });
        match found {
            Ok(path) => return Ok(path),
            Err(err) => last = err,
        }
    }
    Err(last)
}

pub(super) fn open(image: &Image, flags: OFlags, target: &Target<'_>) -> Result<OwnedFd, Failure> {
    let made = inotify::init(inotify::CreateFlags::CLOEXEC).making("make an inotify instance")?;
    for Watch { wd, mask, path } in &image.0 {
        let file = root::resolve(target.root, path, OFlags::PATH | OFlags::NOFOLLOW);
        let file = file.map_err(|err| Failure::Missing {
            object: format!("watched file {}", String::from_utf8_lossy(path)),
            reason: err.to_string(),
        })?;
        sys::inotify::set_next_wd(made.as_fd(), *wd).making("number a watch")?;
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let events = inotify::WatchFlags::from_bits_retain(*mask);
        let got = inotify::add_watch(&made, link, events).making("watch a file")?;
        if got != *wd {
            return Err(Failure::Damaged("a watch that was made under another number"));
        }
    }
    set_status(made, flags)
}
