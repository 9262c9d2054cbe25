//! Resource limits, OOM score and scheduling: set from outside the task.

use std::{fs, io};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::sys::task::{self, SchedAttr};

/// Limits of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Soft and hard limit, by number of the resource.
    rlimits: Vec<(u64, u64)>,
    oom_score_adj: i32,
}

impl Process {
    pub(crate) fn dump(pid: Pid) -> io::Result<Self> {
        let rlimits = (0..task::RLIMITS).map(|n| task::rlimit(pid, n)).collect::<Result<_, _>>()?;
        let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?;
        Ok(Self { rlimits, oom_score_adj: text.trim().parse().unwrap_or(0) })
    }

    /// Sets only what differs: lowering the score and raising a hard limit need
    /// `CAP_SYS_RESOURCE`.
    pub(crate) fn restore(&self, pid: Pid) -> io::Result<()> {
        for (resource, &limit) in (0..task::RLIMITS).zip(&self.rlimits) {
            if task::rlimit(pid, resource)? != limit {
                task::set_rlimit(pid, resource, limit)?;
            }
        }
        let path = format!("/proc/{pid}/oom_score_adj");
        let wanted = self.oom_score_adj.to_string();
        if fs::read_to_string(&path)?.trim() != wanted {
            fs::write(&path, wanted)?;
        }
        Ok(())
    }
}

/// How one thread is scheduled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Thread {
    sched: SchedAttr,
    io_priority: i32,
    /// CPUs it is bound to, where those are not all that the source has.
    cpus: Option<Vec<u8>>,
    timer_slack_ns: u64,
}

impl Thread {
    pub(crate) fn dump(tid: Pid) -> io::Result<Self> {
        let cpus = task::affinity(tid)?;
        let bound = u64::from(cpus.iter().map(|b| b.count_ones()).sum::<u32>()) < online_cpus();
        let slack = fs::read_to_string(format!("/proc/{tid}/timerslack_ns"))?;
        Ok(Self {
            sched: task::sched_attr(tid)?,
            io_priority: task::io_priority(tid)?,
            cpus: bound.then_some(cpus),
            timer_slack_ns: slack.trim().parse().unwrap_or(0),
        })
    }

    pub(crate) fn restore(&self, tid: Pid) -> io::Result<()> {
        let Self { sched, io_priority, cpus, timer_slack_ns } = self;
        if task::sched_attr(tid)? != *sched {
            task::set_sched_attr(tid, sched)?;
        }
        if task::io_priority(tid)? != *io_priority {
            task::set_io_priority(tid, *io_priority)?;
        }
        if let Some(cpus) = cpus
            && let Err(err) = task::set_affinity(tid, cpus)
        {
            // A destination without these CPUs lets it run on those it has.
            tracing::warn!(%tid, %err, "CPU affinity not kept");
        }
        fs::write(format!("/proc/{tid}/timerslack_ns"), timer_slack_ns.to_string())
    }
}

fn online_cpus() -> u64 {
    let n = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN);
    n.ok().flatten().and_then(|n| u64::try_from(n).ok()).unwrap_or(1)
}
