//! Timers that are running, and timers that are about to fire.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;

use crate::sys::{self, TimerSpec};
use crate::world::Scenario;

const HOUR: i64 = 3600;

/// What is left must be what was set, less the time that passed meanwhile.
fn close(set: TimerSpec, left: TimerSpec) -> Result<()> {
    ensure!(
        set.interval == left.interval,
        "interval {:?} became {:?}",
        set.interval,
        left.interval
    );
    let (set, left) = (set.value.0, left.value.0);
    ensure!(left <= set && (set == 0) == (left == 0), "of {set} s {left} s are left");
    ensure!(set - left < 600, "of {set} s only {left} s are left");
    Ok(())
}

const ITIMERS: [(i32, TimerSpec); 3] = [
    (libc::ITIMER_REAL, TimerSpec { interval: (7, 5000), value: (HOUR, 0) }),
    (libc::ITIMER_VIRTUAL, TimerSpec { interval: (0, 0), value: (2 * HOUR, 0) }),
    (libc::ITIMER_PROF, TimerSpec { interval: (9, 8000), value: (3 * HOUR, 0) }),
];

/// The three interval timers of a process.
pub(crate) fn timers_interval() -> Result<Scenario> {
    for (which, spec) in ITIMERS {
        sys::setitimer(which, spec)?;
    }
    let check = |_: &mut ()| {
        ITIMERS.into_iter().try_for_each(|(which, set)| {
            close(set, sys::getitimer(which)?).with_context(|| format!("itimer {which}"))
        })
    };
    let spoil = |_: &mut ()| {
        let none = TimerSpec { interval: (0, 0), value: (0, 0) };
        sys::setitimer(libc::ITIMER_VIRTUAL, none)
    };
    Scenario::new((), check, spoil)
}

static FIRED: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_alarm(_signal: i32) {
    FIRED.fetch_add(1, Ordering::SeqCst);
}

/// An alarm that rings after the move, once.
pub(crate) fn timers_alarm() -> Result<Scenario> {
    sys::handle(Signal::SIGALRM, on_alarm, 0)?;
    sys::setitimer(libc::ITIMER_REAL, TimerSpec { interval: (0, 0), value: (1, 500_000) })?;
    let check = |limit: &mut i64| {
        let mut meanwhile = SigSet::thread_get_mask()?;
        let mut alarm = SigSet::empty();
        alarm.add(Signal::SIGALRM);
        alarm.thread_block()?;
        meanwhile.remove(Signal::SIGALRM);
        while FIRED.load(Ordering::SeqCst) == 0 {
            let pending = sys::is_pending(libc::SIGALRM)?;
            let left = sys::getitimer(libc::ITIMER_REAL)?.value;
            ensure!(pending || left != (0, 0), "the alarm is lost");
            meanwhile.suspend()?;
        }
        ensure!(sys::getitimer(libc::ITIMER_REAL)?.value == (0, 0), "it rings again");
        ensure!(FIRED.load(Ordering::SeqCst) == 1, "it rang twice");
        ensure!(
            clock_gettime(ClockId::CLOCK_MONOTONIC)?.tv_sec() < *limit,
            "it rang much too late"
        );
        Ok(())
    };
    let spoil = |_: &mut i64| {
        sys::setitimer(libc::ITIMER_REAL, TimerSpec { interval: (0, 0), value: (0, 0) })
    };
    let limit = clock_gettime(ClockId::CLOCK_MONOTONIC)?.tv_sec() + 600;
    Scenario::new(limit, check, spoil)
}

/// Timers made with `timer_create`: ids with gaps, several clocks, all ways
/// to be told, running and not.
pub(crate) fn timers_posix() -> Result<Scenario> {
    let signal = libc::SIGRTMIN() + 3;
    sys::block(&[signal])?;
    let spec = |interval, value| TimerSpec { interval: (interval, 0), value: (value, 0) };
    let wanted = [
        (libc::CLOCK_REALTIME, libc::SIGEV_SIGNAL, spec(10, HOUR)),
        (libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, spec(0, 0)),
        (libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, spec(0, 2 * HOUR)),
        (libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, spec(0, 0)),
        (libc::CLOCK_BOOTTIME, libc::SIGEV_THREAD_ID, spec(5, 3 * HOUR)),
        (libc::CLOCK_PROCESS_CPUTIME_ID, libc::SIGEV_SIGNAL, spec(0, HOUR)),
        (libc::CLOCK_THREAD_CPUTIME_ID, libc::SIGEV_SIGNAL, spec(3, HOUR)),
        (libc::CLOCK_REALTIME, libc::SIGEV_SIGNAL, spec(0, 0)),
    ];
    let mut timers = Vec::new();
    for (clock, notify, spec) in wanted {
        let id = sys::timer_create(clock, notify, signal, 40, gettid().as_raw())?;
        sys::timer_settime(id, spec)?;
        timers.push((id, spec));
    }
    for gone in [3, 1] {
        sys::timer_delete(timers.remove(gone).0)?;
    }
    let check = |timers: &mut Vec<(i32, TimerSpec)>| {
        for (id, set) in timers.iter() {
            let left = sys::timer_gettime(*id).with_context(|| format!("timer {id}"))?;
            close(*set, left).with_context(|| format!("timer {id}"))?;
        }
        let new = sys::timer_create(libc::CLOCK_REALTIME, libc::SIGEV_NONE, 0, 0, 0)?;
        ensure!(timers.iter().all(|(id, _)| *id != new), "id {new} was given out again");
        timers.iter().try_for_each(|(id, _)| sys::timer_delete(*id))
    };
    let spoil = |timers: &mut Vec<(i32, TimerSpec)>| sys::timer_delete(timers[2].0);
    Scenario::new(timers, check, spoil)
}

/// A timer whose signal is pending and which goes on expiring.
pub(crate) fn timers_overrun() -> Result<Scenario> {
    let signal = libc::SIGRTMIN() + 3;
    sys::block(&[signal])?;
    let id = sys::timer_create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, signal, 77, 0)?;
    // One millisecond.
    sys::timer_settime(id, TimerSpec { interval: (0, 1_000_000), value: (0, 1_000_000) })?;
    let check = |(id, signal): &mut (i32, i32)| {
        // What was pending when the child moved is no longer the timer's: each
        // move may leave one such signal in front of those to come.
        for _ in 0..10 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let info = sys::wait_signal(*signal, Some(5)).context("the timer stands still")?;
            ensure!(info.code == libc::SI_TIMER && info.value == 77, "{info:?}");
            if sys::timer_getoverrun(*id)? > 0 {
                return Ok(());
            }
        }
        bail!("no overrun after 20 ms")
    };
    let spoil = |(id, _): &mut (i32, i32)| {
        sys::timer_settime(*id, TimerSpec { interval: (0, 0), value: (0, 1) })
    };
    Scenario::new((id, signal), check, spoil)
}
