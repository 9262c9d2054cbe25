//! The process tree of a container whose engine has let go of it.

use std::fs;

use nix::unistd::Pid;
use rustix::process::Signal;

use crate::process::Process;

/// Lets every process below `init` and itself run on after it was parked.
///
/// From the leaves up, so that no parent sees a child stopped that runs again.
pub(crate) fn resume(init: Process) {
    if let Err(err) = dunlin_checkpoint::Hold::release(Pid::from_raw(init.pid)) {
        tracing::error!(pid = init.pid, %err, "a container stays without network");
    }
    signal(init, Signal::CONT);
}

/// Ends every process below `init` and itself, stopped or not, without a word
/// to whoever they are connected to.
pub(crate) fn kill(init: Process) {
    for process in members(init) {
        if let Err(err) = dunlin_checkpoint::silence(Pid::from_raw(process.pid)) {
            tracing::warn!(pid = process.pid, %err, "its connections may be reset");
        }
    }
    signal(init, Signal::KILL);
}

fn signal(init: Process, signal: Signal) {
    for process in members(init).into_iter().rev() {
        if let Err(err) = process.signal(signal) {
            tracing::error!(pid = process.pid, %err, "cannot signal a process");
        }
    }
}

/// `init` and everything below it, parents before children.
pub(crate) fn members(init: Process) -> Vec<Process> {
    let mut found = Vec::new();
    if init.is_alive() {
        found.push(init);
    }
    let mut at = 0;
    while let Some(parent) = found.get(at).copied() {
        found.extend(children(parent.pid));
        at += 1;
    }
    found
}

fn children(pid: i32) -> Vec<Process> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()
        })
        .filter_map(Process::find)
        .collect()
}

/// Bytes of memory that `processes` occupy now, shared pages divided among them.
pub(crate) fn memory(processes: &[Process]) -> u64 {
    processes
        .iter()
        .filter_map(|process| {
            let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid)).ok()?;
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        })
        .map(|kib| kib.saturating_mul(1024))
        .sum()
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use super::*;

    #[tokio::test]
    async fn a_whole_tree_is_found_and_ended() {
        let mut child =
            Command::new("sh").args(["-c", "sleep 60 & sleep 60 & wait"]).spawn().unwrap();
        let init = Process::find(child.id().try_into().unwrap()).unwrap();
        let found = loop {
            let found = members(init);
            if found.len() == 3 {
                break found;
            }
            tokio::task::yield_now().await;
        };
        assert_eq!(found[0], init);
        assert!(0 < memory(&found));
        kill(init);
        for process in found {
            assert!(process.gone_within(Duration::from_secs(60)).await, "{process:?}");
        }
        child.wait().unwrap();
    }
}
