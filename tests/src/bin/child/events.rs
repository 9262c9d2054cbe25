//! Descriptors that wait for events.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::sys;
use crate::world::Scenario;

/// Counters, one of them a semaphore.
pub(crate) fn events_eventfd() -> Result<Scenario> {
    let counter = EventFd::from_value_and_flags(7, EfdFlags::EFD_NONBLOCK)?;
    let flags = EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    let semaphore = EventFd::from_value_and_flags(2, flags)?;
    let empty = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK)?;
    let check = |[counter, semaphore, empty]: &mut [EventFd; 3]| {
        ensure!(counter.read()? == 7, "the counter");
        ensure!(semaphore.read()? == 1 && semaphore.read()? == 1, "the semaphore");
        ensure!(semaphore.read() == Err(Errno::EAGAIN), "the semaphore counts more");
        ensure!(empty.read() == Err(Errno::EAGAIN), "the empty one is not");
        empty.write(3)?;
        ensure!(empty.read()? == 3, "it does not count on");
        Ok(())
    };
    let spoil = |events: &mut [EventFd; 3]| Ok(events[0].write(1).map(drop)?);
    Scenario::new([counter, semaphore, empty], check, spoil)
}

struct Watched {
    epoll: Epoll,
    outer: Epoll,
    level: EventFd,
    edge: EventFd,
    once: EventFd,
    _shadow: EventFd,
}

fn ready(epoll: &Epoll) -> Result<Vec<u64>> {
    let mut events = [EpollEvent::empty(); 8];
    let n = epoll.wait(&mut events, EpollTimeout::ZERO)?;
    let mut data: Vec<_> = events[..n].iter().map(EpollEvent::data).collect();
    data.sort_unstable();
    Ok(data)
}

/// What is watched and how: level, edge, one-shot that is used up, nested.
pub(crate) fn events_epoll() -> Result<Scenario> {
    let new = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK);
    let (level, edge, once, shadow) = (new()?, new()?, new()?, new()?);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let outer = Epoll::new(EpollCreateFlags::empty())?;
    let input = EpollFlags::EPOLLIN;
    epoll.add(&level, EpollEvent::new(input, u64::MAX - 1))?;
    epoll.add(&edge, EpollEvent::new(input | EpollFlags::EPOLLET, 2))?;
    epoll.add(&once, EpollEvent::new(input | EpollFlags::EPOLLONESHOT, 3))?;
    once.write(1)?;
    ensure!(ready(&epoll)? == [3], "the one-shot does not fire");
    epoll.add(&shadow, EpollEvent::new(EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, 4))?;
    ensure!(ready(&epoll)? == [4], "an event counter can always be written");
    outer.add(&epoll.0, EpollEvent::new(input, 9))?;
    let check = |world: &mut Watched| {
        // Restoring an edge-triggered watch may report its state once more.
        let first = ready(&world.epoll)?;
        ensure!(first.iter().all(|data| *data == 4), "ready without reason: {first:?}");
        ensure!(ready(&world.outer)?.is_empty(), "the outer one is ready without reason");
        world.level.write(1)?;
        world.edge.write(1)?;
        ensure!(ready(&world.outer)? == [9], "nested");
        ensure!(ready(&world.epoll)? == [2, u64::MAX - 1], "level and edge");
        ensure!(ready(&world.epoll)? == [u64::MAX - 1], "level only");
        let mut again = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 30);
        world.epoll.modify(&world.once, &mut again)?;
        ensure!(ready(&world.epoll)? == [30, u64::MAX - 1], "the one-shot, armed again");
        Ok(())
    };
    let spoil = |world: &mut Watched| Ok(world.epoll.delete(&world.edge)?);
    Scenario::new(Watched { epoll, outer, level, edge, once, _shadow: shadow }, check, spoil)
}

/// Signals taken by reading: one pending, one to come.
pub(crate) fn events_signalfd() -> Result<Scenario> {
    let later = libc::SIGRTMIN() + 3;
    sys::block(&[libc::SIGUSR1, later])?;
    let mut mask = nix::sys::signal::SigSet::empty();
    mask.add(Signal::SIGUSR1);
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    raise(Signal::SIGUSR1)?;
    let check = |signals: &mut SignalFd| {
        let info = signals.read_signal()?.context("nothing was pending")?;
        ensure!(info.ssi_signo == 10, "signal {}", info.ssi_signo);
        ensure!(signals.read_signal()?.is_none(), "it was pending twice");
        raise(Signal::SIGUSR1)?;
        ensure!(signals.read_signal()?.is_some(), "a new signal does not arrive");
        Ok(())
    };
    let spoil = |signals: &mut SignalFd| Ok(signals.read_signal().map(drop)?);
    Scenario::new(signals, check, spoil)
}

/// Timers that are read: running, expired and unread, and set to none.
pub(crate) fn events_timerfd() -> Result<Scenario> {
    let new = |clock| TimerFd::new(clock, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC);
    let hour = TimeSpec::from_duration(Duration::from_secs(3600));
    let second = TimeSpec::from_duration(Duration::from_secs(1));
    let none = TimerSetTimeFlags::empty();
    let running = new(ClockId::CLOCK_MONOTONIC)?;
    running.set(Expiration::IntervalDelayed(hour, second), none)?;
    let expired = new(ClockId::CLOCK_BOOTTIME)?;
    let soon = TimeSpec::from_duration(Duration::from_millis(1));
    expired.set(Expiration::OneShot(soon), none)?;
    poll(&mut [PollFd::new(expired.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    let absolute = new(ClockId::CLOCK_REALTIME)?;
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME)?;
    absolute.set(Expiration::OneShot(now + hour), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
    let unset = new(ClockId::CLOCK_MONOTONIC)?;
    let check = |[running, expired, absolute, unset]: &mut [TimerFd; 4]| {
        for timer in [&*running, absolute, unset] {
            ensure!(ticks(timer)?.is_none(), "a timer expired early");
        }
        let Some(Expiration::IntervalDelayed(left, every)) = running.get()? else {
            bail!("the running timer is {:?}", running.get())
        };
        ensure!((3000..=3600).contains(&left.tv_sec()) && every.tv_sec() == 1, "{left} is left");
        let Some(Expiration::OneShot(left)) = absolute.get()? else {
            bail!("the absolute timer is {:?}", absolute.get())
        };
        ensure!((3000..=3600).contains(&left.tv_sec()), "{left} is left");
        ensure!(unset.get()?.is_none(), "the timer that was off is on");
        let missed = ticks(expired)?.context("what expired unread is lost")?;
        ensure!(missed == 1, "expired {missed} times");
        ensure!(ticks(expired)?.is_none(), "it expired again");
        Ok(())
    };
    let spoil = |timers: &mut [TimerFd; 4]| Ok(timers[1].unset()?);
    Scenario::new([running, expired, absolute, unset], check, spoil)
}

/// How often a timer expired since it was read last.
fn ticks(timer: &TimerFd) -> Result<Option<u64>> {
    let mut ticks = [0; 8];
    match nix::unistd::read(timer.as_fd().as_raw_fd(), &mut ticks) {
        Ok(8) => Ok(Some(u64::from_ne_bytes(ticks))),
        Err(Errno::EAGAIN) => Ok(None),
        other => Err(anyhow!("reading a timer gave {other:?}")),
    }
}
