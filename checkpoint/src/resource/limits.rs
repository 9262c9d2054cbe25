//! Resource limits, OOM score and scheduling.

use std::{fs, io, sync::OnceLock};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::{
    proc,
    stub::{Batch, Buf, Call, Results, args},
    sys::task::{self, SchedAttr},
};

/// Limits of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Soft and hard limit, by number of the resource (`getrlimit(2)`).
    rlimits: Vec<(u64, u64)>,
    oom_score_adj: i32,
    /// Mappings that go into a core file, as `/proc/PID/coredump_filter` has it.
    coredump_filter: u32,
}

/// How many resources there are.
const RLIMITS: usize = 16;

/// Questions asked by [`ask`].
pub(crate) struct Asked(Buf);

/// Asks a process for its limits: for one of another user the kernel tells us
/// nothing without `CAP_SYS_RESOURCE`.
pub(crate) fn ask(batch: &mut Batch) -> Asked {
    let all = batch.space(RLIMITS * 16);
    for resource in 0..RLIMITS {
        let old = all.skip(resource * 16);
        batch.call(libc::SYS_prlimit64, args![0_u64, resource as u64, 0_u64, old]);
    }
    Asked(all)
}

/// Puts the limits of `pid` together.
pub(crate) fn answer(asked: &Asked, results: &Results<'_>, pid: Pid) -> io::Result<Process> {
    let rlimits = (0..RLIMITS).map(|n| n * 16);
    let rlimits = rlimits.map(|at| (results.u64(asked.0, at), results.u64(asked.0, at + 8)));
    let oom = proc::text(&format!("{pid}/oom_score_adj"))?;
    let filter = proc::text(&format!("{pid}/coredump_filter"))?;
    Ok(Process {
        rlimits: rlimits.collect(),
        oom_score_adj: oom.trim().parse().unwrap_or(0),
        coredump_filter: u32::from_str_radix(filter.trim(), 16).unwrap_or(0),
    })
}

impl Process {
    /// Sets the limits. Raising a hard one needs `CAP_SYS_RESOURCE`.
    pub(crate) fn restore(&self, batch: &mut Batch) {
        for (resource, (soft, hard)) in (0_u64..).zip(&self.rlimits) {
            let new = batch.bytes(&[soft.to_le_bytes(), hard.to_le_bytes()].concat());
            batch.call(libc::SYS_prlimit64, args![0_u64, resource, new, 0_u64]);
        }
    }

    /// Sets what is set from outside. The score only if it differs: lowering it
    /// needs `CAP_SYS_RESOURCE`.
    pub(crate) fn restore_scores(&self, pid: Pid) -> io::Result<()> {
        fs::write(format!("/proc/{pid}/coredump_filter"), format!("{:#x}", self.coredump_filter))?;
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
    /// Asks a thread for what is told to nobody else.
    pub(crate) fn ask(batch: &mut Batch) -> Call {
        batch.call(libc::SYS_prctl, args![libc::PR_GET_TIMERSLACK])
    }

    /// Puts it together with what the kernel tells of thread `tid`.
    pub(crate) fn answer(slack: Call, results: &Results<'_>, tid: Pid) -> io::Result<Self> {
        let cpus = task::affinity(tid)?;
        let bound = u64::from(cpus.iter().map(|b| b.count_ones()).sum::<u32>()) < online_cpus();
        Ok(Self {
            sched: task::sched_attr(tid)?,
            io_priority: task::io_priority(tid)?,
            cpus: bound.then_some(cpus),
            timer_slack_ns: results.get(slack)?,
        })
    }

    /// Adds the call by which a thread sets its own timer slack: 0 would be the
    /// slack it was born with, and is what real-time threads report.
    pub(crate) fn restore_slack(&self, batch: &mut Batch) {
        if self.timer_slack_ns != 0 {
            batch.call(libc::SYS_prctl, args![libc::PR_SET_TIMERSLACK, self.timer_slack_ns]);
        }
    }

    /// Sets the rest from outside.
    pub(crate) fn restore(&self, tid: Pid) -> io::Result<()> {
        let Self { sched, io_priority, cpus, timer_slack_ns: _ } = self;
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
        Ok(())
    }
}

fn online_cpus() -> u64 {
    // The C library opens a file for it.
    static ONLINE: OnceLock<u64> = OnceLock::new();
    *ONLINE.get_or_init(|| {
        let n = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN);
        n.ok().flatten().and_then(|n| u64::try_from(n).ok()).unwrap_or(1)
    })
}
