//! `events`: resource statistics of a container.

use std::collections::HashMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use libcgroups::common::CgroupManager;
use libcgroups::stats::{BlkioDeviceStat, MemoryData, Stats};
use libcontainer::container::ContainerStatus;
use liboci_cli::Events;
use serde_json::{Value, json};

use super::print;
use crate::container::{Root, cgroup};

/// Prints one JSON object a line, in runc's form, until the container ends.
pub(crate) fn events(root: &Root, args: &Events) -> Result<u8> {
    let id = &args.container_id;
    if args.interval == 0 {
        bail!("--interval must be at least one second");
    }
    let running = [ContainerStatus::Running, ContainerStatus::Paused];
    let mut container = root.load(id)?;
    if !running.contains(&container.status()) {
        bail!("container {id} is not running");
    }
    let cgroup = cgroup(&container)?;
    loop {
        let stats = cgroup.stats().context("cannot read the statistics of the cgroup")?;
        print(&json!({ "type": "stats", "id": id, "data": stats_data(&stats) }).to_string())?;
        if args.stats {
            return Ok(0);
        }
        thread::sleep(Duration::from_secs(args.interval.into()));
        container.refresh_status()?;
        if !running.contains(&container.status()) {
            return Ok(0);
        }
    }
}

fn stats_data(stats: &Stats) -> Value {
    let usage = &stats.cpu.usage;
    let throttling = &stats.cpu.throttling;
    let memory = &stats.memory;
    let hugetlb: HashMap<_, _> = stats
        .hugetlb
        .iter()
        .map(|(size, data)| {
            let data = json!({
                "usage": data.usage, "max": data.max_usage, "failcnt": data.fail_count,
            });
            (size, data)
        })
        .collect();
    json!({
        "cpu": {
            "usage": {
                "total": usage.usage_total,
                "percpu": usage.per_core_usage_total,
                "kernel": usage.usage_kernel,
                "user": usage.usage_user,
            },
            "throttling": {
                "periods": throttling.periods,
                "throttledPeriods": throttling.throttled_periods,
                "throttledTime": throttling.throttled_time,
            },
        },
        "memory": {
            "cache": memory.cache,
            "usage": memory_data(&memory.memory),
            "swap": memory_data(&memory.memswap),
            "kernel": memory_data(&memory.kernel),
            "kernelTCP": memory_data(&memory.kernel_tcp),
            "raw": memory.stats,
        },
        "pids": { "current": stats.pids.current, "limit": stats.pids.limit },
        "blkio": {
            "ioServiceBytesRecursive": devices(&stats.blkio.service_bytes),
            "ioServicedRecursive": devices(&stats.blkio.serviced),
            "ioQueueRecursive": devices(&stats.blkio.queued),
            "ioServiceTimeRecursive": devices(&stats.blkio.service_time),
            "ioWaitTimeRecursive": devices(&stats.blkio.wait_time),
            "ioMergedRecursive": devices(&stats.blkio.merged),
            "ioTimeRecursive": devices(&stats.blkio.time),
            "sectorsRecursive": devices(&stats.blkio.sectors),
        },
        "hugetlb": hugetlb,
    })
}

fn memory_data(data: &MemoryData) -> Value {
    json!({
        "limit": data.limit, "usage": data.usage, "max": data.max_usage, "failcnt": data.fail_count,
    })
}

fn devices(stats: &[BlkioDeviceStat]) -> Vec<Value> {
    let device = |stat: &BlkioDeviceStat| {
        json!({
            "major": stat.major, "minor": stat.minor, "op": stat.op_type, "value": stat.value,
        })
    };
    stats.iter().map(device).collect()
}
