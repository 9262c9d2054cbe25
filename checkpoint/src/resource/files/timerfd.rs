//! Timers as files (`timerfd_create(2)`).
//!
//! Made early, armed last. A timer set to a wall-clock time keeps that time;
//! every other one keeps what it had left.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::{
    fs::OFlags,
    time::{
        ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec,
        clock_gettime, timerfd_gettime, timerfd_settime,
    },
};
use serde::{Deserialize, Serialize};

use super::{Doing, Failure, Making, Refusal, set_status, table::Held};
use crate::sys;

const NANOS: i128 = 1_000_000_000;
const ABSTIME: u32 = 1;
const CANCEL_ON_SET: u32 = 2;

/// A timer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// The clock, as `timerfd_create` takes it.
    pub(crate) clock: u32,
    /// Flags of the last `timerfd_settime`.
    pub(crate) set_flags: u32,
    /// Nanoseconds until it expires, or the wall-clock time at which it does;
    /// 0 is disarmed.
    pub(crate) value: u64,
    /// Nanoseconds between expirations.
    pub(crate) interval: u64,
    /// Expirations not read yet.
    pub(crate) ticks: u64,
}

impl Image {
    /// Whether `value` is a time of day.
    fn is_wall_time(&self) -> bool {
        let wall = [TimerfdClockId::Realtime as u32, TimerfdClockId::RealtimeAlarm as u32];
        self.set_flags & ABSTIME != 0 && wall.contains(&self.clock)
    }
}

pub(super) fn dump(held: &Held) -> Result<Image, Refusal> {
    // A periodic timer that expired sleeps until it is looked at. Looking
    // starts it again and counts its ticks, so this comes first; the program
    // cannot tell.
    let now = timerfd_gettime(&held.fd).doing("read the timer")?;
    let info = super::fdinfo::FdInfo::read(
        nix::unistd::Pid::this(),
        std::os::fd::AsRawFd::as_raw_fd(&held.fd),
    )
    .doing("read the timer")?;
    let parse = |key, radix| {
        info.field(key)
            .and_then(|value| u64::from_str_radix(value, radix).ok())
            .ok_or_else(|| Refusal::unmovable(format!("is a timerfd that does not show its {key}")))
    };
    let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let mut image = Image {
        clock: small(parse("clockid", 10)?),
        set_flags: small(parse("settime flags", 8)?),
        value: nanos(now.it_value),
        interval: nanos(now.it_interval),
        ticks: parse("ticks", 10)?,
    };
    if image.value != 0 && image.is_wall_time() {
        image.value = image.value.saturating_add(nanos(clock_gettime(ClockId::Realtime)));
    }
    Ok(image)
}

pub(super) fn open(image: &Image, flags: OFlags) -> Result<OwnedFd, Failure> {
    let clock = match image.clock {
        0 => TimerfdClockId::Realtime,
        1 => TimerfdClockId::Monotonic,
        7 => TimerfdClockId::Boottime,
        8 => TimerfdClockId::RealtimeAlarm,
        9 => TimerfdClockId::BoottimeAlarm,
        _ => return Err(Failure::Damaged("a timer on an unknown clock")),
    };
    let fd = rustix::time::timerfd_create(clock, TimerfdFlags::CLOEXEC).making("make a timerfd")?;
    set_status(fd, flags)
}

/// Starts the timer; ticks last, because starting forgets them.
pub(super) fn arm(image: &Image, fd: BorrowedFd<'_>) -> io::Result<()> {
    let Image { clock: _, set_flags, value, interval, ticks } = image;
    let flags = if image.is_wall_time() { set_flags & (ABSTIME | CANCEL_ON_SET) } else { 0 };
    let spec = Itimerspec { it_interval: timespec(*interval), it_value: timespec(*value) };
    timerfd_settime(fd, TimerfdTimerFlags::from_bits_retain(flags), &spec)?;
    if *ticks != 0 {
        sys::timerfd::set_ticks(fd, *ticks)?;
    }
    Ok(())
}

fn nanos(time: Timespec) -> u64 {
    let total = i128::from(time.tv_sec) * NANOS + i128::from(time.tv_nsec);
    u64::try_from(total).unwrap_or(if total < 0 { 0 } else { u64::MAX })
}

fn timespec(nanos: u64) -> Timespec {
    let (sec, nsec) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
    Timespec { tv_sec: sec.cast_signed(), tv_nsec: nsec.cast_signed() }
}
