//! Epoll instances (`epoll(7)`).
//!
//! The kernel keys a registration by description and by the *number* the fd
//! had, which may be closed or mean something else by now. The engine makes
//! them on a thread with an fd table of its own, where it can put any
//! description under any number. A one-shot registration that has fired and
//! waits for its re-arming comes back able to report errors and hang-ups,
//! which the kernel adds to every registration.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    thread,
};

use nix::{errno::Errno, sched::CloneFlags, unistd};
use rustix::{
    event::epoll::{self, CreateFlags},
    fs::OFlags,
};
use serde::{Deserialize, Serialize};

use super::{EpollItem, Failure, Kind, Making, Refusal, Source, set_status, table::Held};
use crate::sys::{self, kcmp};

/// An epoll instance.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// What it watches.
    pub(crate) items: Vec<Item>,
}

/// One registration.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Item {
    /// Number the fd had when it was registered.
    pub(crate) tfd: RawFd,
    /// The description.
    pub(crate) file: u32,
    /// Events of interest and mode bits.
    pub(crate) events: u32,
    /// The program's own word.
    pub(crate) data: u64,
}

impl Image {
    pub(super) fn is_sound(&self, files: usize) -> bool {
        self.items.iter().all(|item| (item.file as usize) < files && item.tfd >= 0)
    }
}

pub(super) fn dump(id: usize, held: &Held, source: &Source<'_>) -> Result<Image, Refusal> {
    let mut items: Vec<Item> = Vec::new();
    for line in held.info.rest.lines().filter(|line| line.starts_with("tfd:")) {
        let (tfd, events, data) = parse(line)
            .ok_or_else(|| Refusal::unmovable("is an epoll that is shown in an unknown form"))?;
        let nth = items.iter().filter(|item| item.tfd == tfd).count();
        let nth = u32::try_from(nth).unwrap_or(u32::MAX);
        let watched = |file: &usize| {
            let file = source.tables.held[*file].fd.as_fd();
            kcmp::watches(held.fd.as_fd(), tfd, nth, file).unwrap_or(false)
        };
        // Nearly always the fd still has its number.
        let file = source
            .tables
            .beside(id, tfd)
            .find(watched)
            .or_else(|| (0..source.tables.held.len()).find(watched));
        match file {
            Some(file) => {
                let file = u32::try_from(file).unwrap_or(u32::MAX);
                items.push(Item { tfd, file, events, data });
            }
            // Running on, the program may have changed it under our eyes.
            None if !source.frozen => (),
            None => {
                return Err(Refusal::new(
                    format!(
                        "is an epoll that watches fd {tfd}, whose file only someone outside the tree still has"
                    ),
                    "remove the registration",
                ));
            }
        }
    }
    Ok(Image { items })
}

/// `tfd:        5 events:       19 data:    abcd  pos:0 ino:1 sdev:2`.
fn parse(line: &str) -> Option<(RawFd, u32, u64)> {
    let mut words = line.split_whitespace();
    let mut after = |key: &str| (words.next()? == key).then(|| words.next())?;
    let tfd = after("tfd:")?.parse().ok()?;
    let events = u32::from_str_radix(after("events:")?, 16).ok()?;
    let data = u64::from_str_radix(after("data:")?, 16).ok()?;
    Some((tfd, events, data))
}

pub(super) fn open(flags: OFlags) -> Result<OwnedFd, Failure> {
    set_status(epoll::create(CreateFlags::CLOEXEC).making("make an epoll")?, flags)
}

/// Registers everything on all epolls; returns what only a task can register.
pub(super) fn wire(
    image: &super::Image,
    files: &[OwnedFd],
) -> Result<Vec<(i32, EpollItem)>, (usize, Failure)> {
    let mut own = Vec::new();
    let mut left = Vec::new();
    for (id, file) in image.files.iter().enumerate() {
        let Kind::Epoll(epoll) = &file.kind else { continue };
        for item in &epoll.items {
            let in_task = matches!(image.files[item.file as usize].kind, Kind::SignalFd(_));
            match in_task.then(|| task_with(image, id, item)).flatten() {
                Some(task) => left.push(task),
                None => own.push((id, *item)),
            }
        }
    }
    if own.is_empty() {
        return Ok(left);
    }
    let work = || {
        nix::sched::unshare(CloneFlags::CLONE_FILES)
            .map_err(|err| (own[0].0, failed(err.into())))?;
        own.iter().try_for_each(|(id, item)| {
            register(&files[*id], &files[item.file as usize], item)
                .map_err(|err| (*id, failed(err)))
        })
    };
    thread::scope(|scope| {
        scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    Ok(left)
}

fn failed(source: io::Error) -> Failure {
    Failure::Failed { what: "register a file".into(), source }
}

/// A task that has both fds under the numbers of the registration.
fn task_with(image: &super::Image, epoll: usize, item: &Item) -> Option<(i32, EpollItem)> {
    image.tables.iter().find_map(|table| {
        let epfd = table.fds.iter().find(|fd| fd.file as usize == epoll)?.fd;
        table.fds.iter().find(|fd| fd.fd == item.tfd && fd.file == item.file)?;
        let Item { tfd, file: _, events, data } = *item;
        Some((table.pid, EpollItem { epfd, tfd, events, data }))
    })
}

/// Registers `file` under the number it once had. Runs on a thread with an fd
/// table of its own, so that whatever has that number can step aside.
fn register(epoll: &OwnedFd, file: &OwnedFd, item: &Item) -> io::Result<()> {
    let Item { tfd, file: _, events, data } = *item;
    if file.as_raw_fd() == tfd {
        return sys::epoll::add(epoll.as_fd(), tfd, events, data);
    }
    // The numbers above `tfd` are free of the clash.
    let epoll = rustix::io::fcntl_dupfd_cloexec(epoll, tfd.saturating_add(1))?;
    let aside = match unistd::dup(tfd) {
        Ok(aside) => Some(aside),
        Err(Errno::EBADF) => None,
        Err(err) => return Err(err.into()),
    };
    unistd::dup2(file.as_raw_fd(), tfd)?;
    let added = sys::epoll::add(epoll.as_fd(), tfd, events, data);
    match aside {
        Some(aside) => {
            unistd::dup2(aside, tfd)?;
            unistd::close(aside)?;
        }
        None => unistd::close(tfd)?,
    }
    added
}
