//! Ends of processes that are not ours by birth.
//!
//! A container that came here loses its parent when its worker ends, and falls
//! to us as the nearest subreaper. Tokio waits for the children that we
//! started ourselves, so those are kept apart: whoever waits first takes the
//! exit code.

use std::{
    collections::BTreeSet,
    fs, io,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use crate::{daemon::Shim, process::Process};

/// Children started by us; a process has one set of them, so this is global.
static OWN: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// A child started by us.
pub(crate) struct Own {
    child: Child,
    pid: Option<i32>,
}

/// Starts a child of ours.
pub(crate) fn spawn(command: &mut Command) -> io::Result<Own> {
    // Held across the start: it may end before its pid is noted.
    let mut own = lock();
    let child = command.spawn()?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    own.extend(pid);
    Ok(Own { child, pid })
}

impl Deref for Own {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.child
    }
}

impl DerefMut for Own {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // One that still runs stays noted: tokio reaps it when it ends.
        if let (Ok(Some(_)), Some(pid)) = (self.child.try_wait(), self.pid) {
            lock().remove(&pid);
        }
    }
}

/// Reaps adopted children for ever.
pub(crate) async fn run(shim: Arc<Shim>) {
    let mut ended = match signal(SignalKind::child()) {
        Ok(ended) => ended,
        Err(err) => return tracing::error!(%err, "adopted processes will not be reaped"),
    };
    loop {
        for (pid, code) in reap() {
            shim.containers.ended(pid, code);
        }
        ended.recv().await;
    }
}

/// Reaps every adopted child that has ended: pid and exit code, or 128 and the
/// signal.
fn reap() -> Vec<(i32, i32)> {
    let mut reaped = Vec::new();
    for pid in children() {
        if lock().contains(&pid) {
            continue;
        }
        match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => reaped.push((pid, code)),
            Ok(WaitStatus::Signaled(_, signal, _)) => reaped.push((pid, 128 + signal as i32)),
            Ok(_) => {}
            Err(err) => tracing::debug!(pid, %err, "cannot reap"),
        }
    }
    reaped
}

/// Children that fell to us.
pub(crate) fn adopted() -> Vec<Process> {
    let own = lock().clone();
    children().into_iter().filter(|pid| !own.contains(pid)).filter_map(Process::find).collect()
}

/// Pids of all children of this process.
fn children() -> Vec<i32> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()
        })
        .collect()
}

fn lock() -> MutexGuard<'static, BTreeSet<i32>> {
    OWN.lock().unwrap_or_else(PoisonError::into_inner)
}
