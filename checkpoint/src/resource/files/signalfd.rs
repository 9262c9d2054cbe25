//! Signals as a file (`signalfd(2)`): only its mask is its own, what it
//! reports are the pending signals of whoever reads it.

use std::os::fd::OwnedFd;

use rustix::fs::OFlags;

use super::{Failure, Making, Refusal, set_status, table::Held};
use crate::sys;

pub(super) fn dump(held: &Held) -> Result<u64, Refusal> {
    let mask = held.info.field("sigmask");
    mask.and_then(|mask| u64::from_str_radix(mask, 16).ok())
        .ok_or_else(|| Refusal::unmovable("is a signalfd without a mask"))
}

pub(super) fn open(mask: u64, flags: OFlags) -> Result<OwnedFd, Failure> {
    set_status(sys::signalfd::create(mask).making("make a signalfd")?, flags)
}
