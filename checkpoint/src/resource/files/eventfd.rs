//! Event counters (`eventfd(2)`).

use std::os::fd::OwnedFd;

use rustix::{event::EventfdFlags, fs::OFlags};
use serde::{Deserialize, Serialize};

use super::{Failure, Making, Refusal, set_status, table::Held};

/// A counter and how it is read.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// Its value.
    pub(crate) count: u64,
    /// Whether a read takes one instead of all.
    pub(crate) semaphore: bool,
}

pub(super) fn dump(held: &Held) -> Result<Image, Refusal> {
    let count = held.info.field("eventfd-count");
    let count = count.and_then(|count| u64::from_str_radix(count, 16).ok());
    let count = count.ok_or_else(|| Refusal::unmovable("is an eventfd without a count"))?;
    let semaphore = held.info.field("eventfd-semaphore").ok_or_else(|| {
        Refusal::new("is an eventfd whose kind is not shown", "use Linux 6.7 or later")
    })?;
    Ok(Image { count, semaphore: semaphore == "1" })
}

pub(super) fn open(image: &Image, flags: OFlags) -> Result<OwnedFd, Failure> {
    let Image { count, semaphore } = image;
    let kind = if *semaphore { EventfdFlags::SEMAPHORE } else { EventfdFlags::empty() };
    let fd = rustix::event::eventfd(0, kind | EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .making("make an eventfd")?;
    if *count != 0 {
        rustix::io::write(&fd, &count.to_ne_bytes()).making("set the count of an eventfd")?;
    }
    set_status(fd, flags)
}
