//! `update`: new resource limits for a container.

use std::fs::File;
use std::io::{self, BufReader};

use anyhow::{Context, Result, bail};
use libcgroups::common::{CgroupManager, ControllerOpt};
use liboci_cli::Update;
use oci_spec::runtime::{
    LinuxBlockIoBuilder, LinuxCpuBuilder, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResources,
    LinuxResourcesBuilder,
};

use crate::container::{Root, cgroup};

/// Applies them to the container's cgroup.
pub(crate) fn update(root: &Root, args: &Update) -> Result<u8> {
    for (flag, given) in [
        ("--l3-cache-schema", args.l3_cache_schema.is_some()),
        ("--mem-bw-schema", args.mem_bw_schema.is_some()),
    ] {
        if given {
            bail!("{flag} is not supported");
        }
    }
    let container = root.load(&args.container_id)?;
    let resources = match &args.resources {
        Some(path) if path.as_os_str() == "-" => {
            serde_json::from_reader(io::stdin()).context("cannot read resources from stdin")?
        }
        Some(path) => {
            let file =
                File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            serde_json::from_reader(BufReader::new(file))
                .with_context(|| format!("cannot read resources from {}", path.display()))?
        }
        None => from_flags(args)?,
    };
    let options = ControllerOpt {
        resources: &resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    cgroup(&container)?
        .apply(&options)
        .with_context(|| format!("cannot update {}", args.container_id))?;
    Ok(0)
}

/// The resources that flags name, and nothing for those they do not.
fn from_flags(args: &Update) -> Result<LinuxResources> {
    let mut cpu = LinuxCpuBuilder::default().build()?;
    cpu.set_shares(args.cpu_share)
        .set_quota(args.cpu_quota.map(i64::try_from).transpose()?)
        .set_period(args.cpu_period)
        .set_realtime_runtime(args.cpu_rt_runtime.map(i64::try_from).transpose()?)
        .set_realtime_period(args.cpu_rt_period)
        .set_cpus(args.cpuset_cpus.clone())
        .set_mems(args.cpuset_mems.clone());
    let mut memory = LinuxMemoryBuilder::default().build()?;
    memory
        .set_limit(args.memory.map(i64::try_from).transpose()?)
        .set_reservation(args.memory_reservation.map(i64::try_from).transpose()?)
        .set_swap(args.memory_swap);
    let mut resources = LinuxResourcesBuilder::default().build()?;
    resources.set_devices(None).set_cpu(Some(cpu)).set_memory(Some(memory));
    if let Some(limit) = args.pids_limit {
        resources.set_pids(Some(LinuxPidsBuilder::default().limit(limit).build()?));
    }
    if let Some(weight) = args.blkio_weight {
        let block_io = LinuxBlockIoBuilder::default().weight(u16::try_from(weight)?).build()?;
        resources.set_block_io(Some(block_io));
    }
    Ok(resources)
}
