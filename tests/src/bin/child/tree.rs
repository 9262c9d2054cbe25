//! Trees of processes: who descends from whom, groups, sessions, the dead.

use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, getpgrp, getpid, getppid, getsid, setpgid, setsid};

use crate::fork::{Fork, fork, on_question, ready};
use crate::sys::{self, Mapping, PAGE};
use crate::world::Scenario;

const SELF: Pid = Pid::from_raw(0);

/// Who we are and where we belong.
fn relations() -> Result<[Pid; 4]> {
    Ok([getpid(), getppid(), getpgrp(), getsid(None)?])
}

/// Checks that `check` is content and nothing about `relations` changed.
fn unchanged(check: impl FnOnce() -> Result<()>) -> Result<()> {
    let before = relations()?;
    on_question(|| {
        let after = relations()?;
        ensure!(before == after, "pid, parent, group, session were {before:?} and are {after:?}");
        check()
    })
}

/// A child that only wants to stay where it belongs.
fn member(settle: impl FnOnce() -> Result<()>) -> Result<Fork> {
    fork(|| {
        settle()?;
        unchanged(|| Ok(()))
    })
}

fn ask_all(children: &mut Vec<Fork>) -> Result<()> {
    children.drain(..).try_for_each(Fork::ask)
}

/// Sessions and process groups of several shapes.
pub(crate) fn tree_sessions() -> Result<Scenario> {
    let session = fork(|| {
        setsid()?;
        let leader = member(|| Ok(setpgid(SELF, SELF)?))?;
        let follower = member(|| Ok(setpgid(SELF, leader.0)?))?;
        let beside = member(|| Ok(()))?;
        unchanged(|| ask_all(&mut vec![leader, follower, beside]))
    })?;
    let leader = member(|| Ok(setpgid(SELF, SELF)?))?;
    let follower = member(|| Ok(setpgid(SELF, leader.0)?))?;
    let check = |(children, before): &mut (Vec<Fork>, [Pid; 4])| {
        ensure!(*before == relations()?, "the root's relations changed");
        ask_all(children)
    };
    let spoil = |(children, _): &mut (Vec<Fork>, [Pid; 4])| Ok(setpgid(children[2].0, getpid())?);
    Scenario::new((vec![session, leader, follower], relations()?), check, spoil)
}

/// Starts a process that starts `heir` and ends; returns the heir, which by
/// then is a child of ours.
fn orphan(lead: fn() -> Result<()>) -> Result<Fork> {
    set_child_subreaper(true)?;
    let shared = Mapping::shared(PAGE)?;
    let own = getpid();
    let parent = fork(|| {
        lead()?;
        let heir = fork(|| {
            let (group, session) = (getpgrp(), getsid(None)?);
            on_question(|| {
                ensure!(getppid() == own, "the orphan's parent is {}", getppid());
                ensure!(getpgrp() == group, "the orphan's group is {}", getpgrp());
                ensure!(getsid(None)? == session, "the orphan's session is {:?}", getsid(None));
                Ok(())
            })
        })?;
        for (to, byte) in shared.bytes().iter().zip(heir.0.as_raw().to_ne_bytes()) {
            to.store(byte, Ordering::SeqCst);
        }
        ready()
    })?;
    parent.content()?;
    let mut heir = [0; 4];
    for (to, from) in heir.iter_mut().zip(shared.bytes()) {
        *to = from.load(Ordering::SeqCst);
    }
    Ok(Fork(Pid::from_raw(i32::from_ne_bytes(heir))))
}

/// A process whose parent ended belongs to the nearest reaper.
pub(crate) fn tree_orphans() -> Result<Scenario> {
    let mut heirs = vec![orphan(|| Ok(()))?, orphan(|| Ok(()))?];
    heirs.push(member(|| Ok(()))?);
    let spoil = |heirs: &mut Vec<Fork>| Ok(setpgid(heirs[2].0, SELF)?);
    Scenario::new(heirs, ask_all, spoil)
}

/// Groups and sessions that outlive the process they are named after.
pub(crate) fn tree_leaderless() -> Result<Scenario> {
    let group = orphan(|| Ok(setpgid(SELF, SELF)?))?;
    let session = orphan(|| Ok(setsid().map(drop)?))?;
    let spoil = |heirs: &mut Vec<Fork>| Ok(kill(heirs[0].0, Signal::SIGKILL)?);
    Scenario::new(vec![group, session], ask_all, spoil)
}

/// Children that ended and were not collected.
pub(crate) fn tree_zombies() -> Result<Scenario> {
    let exited = fork(|| {
        ready()?;
        sys::exit(7)
    })?;
    let killed = fork(|| on_question(|| Ok(())))?;
    kill(killed.0, Signal::SIGKILL)?;
    let leader = fork(|| {
        setsid()?;
        ready()?;
        sys::exit(255)
    })?;
    for child in [exited, killed, leader] {
        waitid(Id::Pid(child.0), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)?;
    }
    let check = |zombies: &mut [Fork; 3]| {
        let [exited, killed, leader] = zombies.map(|zombie| zombie.0);
        for expected in [
            WaitStatus::Exited(exited, 7),
            WaitStatus::Signaled(killed, Signal::SIGKILL, false),
            WaitStatus::Exited(leader, 255),
        ] {
            let status = waitpid(expected.pid(), Some(WaitPidFlag::WNOHANG))?;
            ensure!(status == expected, "{status:?} instead of {expected:?}");
        }
        Ok(())
    };
    let spoil = |zombies: &mut [Fork; 3]| Ok(waitpid(zombies[1].0, None).map(drop)?);
    Scenario::new([exited, killed, leader], check, spoil)
}

/// A child under job control: stopped, and continued later.
pub(crate) fn tree_stopped() -> Result<Scenario> {
    let child = member(|| Ok(setpgid(SELF, SELF)?))?;
    kill(child.0, Signal::SIGSTOP)?;
    waitpid(child.0, Some(WaitPidFlag::WUNTRACED))?;
    let check = |child: &mut Fork| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.0))?;
        ensure!(stat.contains(") T "), "it is not stopped: {stat}");
        kill(child.0, Signal::SIGCONT)?;
        let status = waitpid(child.0, Some(WaitPidFlag::WCONTINUED))?;
        ensure!(status == WaitStatus::Continued(child.0), "{status:?} after SIGCONT");
        child.ask()
    };
    let spoil = |child: &mut Fork| {
        kill(child.0, Signal::SIGCONT)?;
        Ok(waitpid(child.0, Some(WaitPidFlag::WCONTINUED)).map(drop)?)
    };
    Scenario::new(child, check, spoil)
}

fn chain(length: u32) -> Result<Fork> {
    fork(|| {
        let next = if length > 1 { Some(chain(length - 1)?) } else { None };
        unchanged(|| next.map_or(Ok(()), Fork::ask))
    })
}

/// Parent, child, grandchild and so on, sixteen of them.
pub(crate) fn tree_deep() -> Result<Scenario> {
    let spoil = |first: &mut Fork| Ok(setpgid(first.0, SELF)?);
    Scenario::new(chain(16)?, |first| first.ask(), spoil)
}

static ENDED: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_child(_signal: i32) {
    ENDED.fetch_add(1, Ordering::SeqCst);
}

/// Sixty-four children, whose end their parent hears of.
pub(crate) fn tree_wide() -> Result<Scenario> {
    sys::handle(Signal::SIGCHLD, on_child, nix::libc::SA_RESTART)?;
    let children = (0..64).map(|_| member(|| Ok(()))).collect::<Result<Vec<_>>>()?;
    let check = |children: &mut Vec<Fork>| {
        ensure!(ENDED.load(Ordering::SeqCst) == 0, "SIGCHLD, but no child ended");
        let last = children.pop().context("no child")?;
        ask_all(children)?;
        ensure!(ENDED.load(Ordering::SeqCst) > 0, "no SIGCHLD");
        last.ask()
    };
    let spoil = |children: &mut Vec<Fork>| Ok(kill(children[40].0, Signal::SIGKILL)?);
    Scenario::new(children, check, spoil)
}
