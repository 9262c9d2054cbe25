//! Interval timers (`setitimer(2)`) and POSIX timers (`timer_create(2)`).
//!
//! The kernel shows their state only to their owner. Arming is the last step
//! before thaw: a timer armed earlier would fire into a half-built process.
//! What a timer has left is carried, not when it ends, so that clocks of two
//! hosts need not agree.

use std::io;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::{
    proc,
    stub::{Batch, Buf, Results, args},
};

/// `struct itimerval` or `struct itimerspec`: interval, then what is left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Spec {
    interval: (u64, u64),
    left: (u64, u64),
}

impl Spec {
    fn read(results: &Results<'_>, buf: Buf) -> Self {
        let word = |i: usize| results.u64(buf, i * 8);
        Self { interval: (word(0), word(1)), left: (word(2), word(3)) }
    }

    fn bytes(self) -> Vec<u8> {
        [self.interval.0, self.interval.1, self.left.0, self.left.1]
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect()
    }

    /// While its signal is pending a periodic timer shows nothing left, and
    /// setting that would stop it: one unit keeps it going.
    fn kept_alive(mut self) -> Self {
        if self.interval != (0, 0) && self.left == (0, 0) {
            self.left = (0, 1);
        }
        self
    }
}

/// One POSIX timer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PosixTimer {
    id: i32,
    clock: i32,
    signal: i32,
    /// `SIGEV_SIGNAL`, `SIGEV_NONE` or `SIGEV_THREAD_ID`.
    notify: i32,
    /// Thread told, with `SIGEV_THREAD_ID`.
    tid: i32,
    value: u64,
    spec: Spec,
}

/// The timers of one process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// Wall, user CPU and total CPU time.
    interval: [Spec; 3],
    posix: Vec<PosixTimer>,
}

/// Questions asked by [`ask`].
pub(crate) struct Asked {
    interval: [Buf; 3],
    posix: Vec<(PosixTimer, Buf)>,
}

const ITIMERS: [u64; 3] = [0, 1, 2];

/// Asks for the timers of `pid`; `ns_tid` translates a thread id of ours into
/// one of the process's own pid namespace.
pub(crate) fn ask(
    pid: Pid,
    ns_tid: impl Fn(i32) -> Option<i32>,
    batch: &mut Batch,
) -> io::Result<Asked> {
    let interval = ITIMERS.map(|which| {
        let buf = batch.space(32);
        batch.call(libc::SYS_getitimer, args![which, buf]);
        buf
    });
    let text = proc::text(&format!("{pid}/timers"))?;
    let posix = parse(&text, ns_tid)
        .ok_or(io::ErrorKind::InvalidData)?
        .into_iter()
        .map(|timer| {
            let buf = batch.space(32);
            batch.call(libc::SYS_timer_gettime, args![timer.id, buf]);
            (timer, buf)
        })
        .collect();
    Ok(Asked { interval, posix })
}

/// Parses `/proc/PID/timers` (`proc(5)`).
fn parse(text: &str, ns_tid: impl Fn(i32) -> Option<i32>) -> Option<Vec<PosixTimer>> {
    let mut timers = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let id = line.strip_prefix("ID: ")?.trim().parse().ok()?;
        let (signal, value) = lines.next()?.strip_prefix("signal: ")?.split_once('/')?;
        let (kind, target) = lines.next()?.strip_prefix("notify: ")?.split_once('/')?;
        let clock = lines.next()?.strip_prefix("ClockID: ")?.trim().parse().ok()?;
        let (to, number) = target.split_once('.')?;
        let tid = if to == "tid" { ns_tid(number.parse().ok()?)? } else { 0 };
        let notify = match (kind, to) {
            ("none", _) => libc::SIGEV_NONE,
            (_, "tid") => libc::SIGEV_THREAD_ID,
            _ => libc::SIGEV_SIGNAL,
        };
        timers.push(PosixTimer {
            id,
            clock,
            signal: signal.parse().ok()?,
            notify,
            tid,
            value: u64::from_str_radix(value.trim(), 16).ok()?,
            spec: Spec::default(),
        });
    }
    Some(timers)
}

/// The timers, each with the time it had left.
pub(crate) fn answer(asked: Asked, results: &Results<'_>) -> Image {
    let Asked { interval, posix } = asked;
    Image {
        interval: interval.map(|buf| Spec::read(results, buf)),
        posix: posix
            .into_iter()
            .map(|(timer, buf)| PosixTimer { spec: Spec::read(results, buf), ..timer })
            .collect(),
    }
}

/// `prctl(2)`: `timer_create` takes the id it is given (Linux 6.15).
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

/// Creates the POSIX timers, disarmed.
pub(crate) fn create(image: &Image, batch: &mut Batch) {
    if image.posix.is_empty() {
        return;
    }
    batch.call(libc::SYS_prctl, args![PR_TIMER_CREATE_RESTORE_IDS, 1_u64, 0_u64, 0_u64, 0_u64]);
    // The kernel lists the newest first.
    for timer in image.posix.iter().rev() {
        // struct sigevent: value, signal, notify, thread id.
        let mut event = vec![0; 64];
        event[..8].copy_from_slice(&timer.value.to_le_bytes());
        event[8..12].copy_from_slice(&timer.signal.to_le_bytes());
        event[12..16].copy_from_slice(&timer.notify.to_le_bytes());
        event[16..20].copy_from_slice(&timer.tid.to_le_bytes());
        let event = batch.bytes(&event);
        let id = batch.bytes(&timer.id.to_le_bytes());
        batch.call(libc::SYS_timer_create, args![timer.clock, event, id]);
    }
    batch.call(libc::SYS_prctl, args![PR_TIMER_CREATE_RESTORE_IDS, 0_u64, 0_u64, 0_u64, 0_u64]);
}

/// Arms all of them.
pub(crate) fn arm(image: &Image, batch: &mut Batch) {
    let null = 0_u64;
    for (which, spec) in ITIMERS.into_iter().zip(image.interval) {
        if spec != Spec::default() {
            let new = batch.bytes(&spec.kept_alive().bytes());
            batch.call(libc::SYS_setitimer, args![which, new, null]);
        }
    }
    for timer in &image.posix {
        if timer.spec != Spec::default() {
            let new = batch.bytes(&timer.spec.kept_alive().bytes());
            batch.call(libc::SYS_timer_settime, args![timer.id, 0_u64, new, null]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_timers_of_each_kind() {
        let text = "ID: 3\nsignal: 14/00000000deadbeef\nnotify: signal/pid.12\nClockID: 1\n\
                    ID: 7\nsignal: 0/0\nnotify: none/pid.12\nClockID: 0\n\
                    ID: 9\nsignal: 34/5\nnotify: signal/tid.112\nClockID: -6\n";
        let timers = parse(text, |tid| Some(tid - 100)).unwrap();
        let seen: Vec<_> =
            timers.iter().map(|t| (t.id, t.signal, t.notify, t.tid, t.value, t.clock)).collect();
        let expected = [
            (3, 14, libc::SIGEV_SIGNAL, 0, 0xdead_beef, 1),
            (7, 0, libc::SIGEV_NONE, 0, 0, 0),
            (9, 34, libc::SIGEV_THREAD_ID, 12, 5, -6),
        ];
        assert_eq!(seen, expected);
    }
}
