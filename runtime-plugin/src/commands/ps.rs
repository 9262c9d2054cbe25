//! `ps`: the processes of a container.

use std::process::Command;

use anyhow::{Context, Result, bail};
use libcgroups::common::CgroupManager;
use liboci_cli::Ps;

use super::print;
use crate::container::{Root, cgroup};

/// Lists them, by pid or through `ps(1)`.
pub(crate) fn ps(root: &Root, args: &Ps) -> Result<u8> {
    let container = root.load(&args.container_id)?;
    let pids = cgroup(&container)?.get_all_pids().context("cannot list the cgroup")?;
    let pids: Vec<i32> = pids.into_iter().map(nix::unistd::Pid::as_raw).collect();
    match args.format.as_str() {
        "json" => print(&serde_json::to_string(&pids)?)?,
        "table" => print(&table(&pids, &args.ps_options)?)?,
        other => bail!("unknown format {other}; it is table or json"),
    }
    Ok(0)
}

/// The lines of `ps` that belong to `pids`, below its header.
fn table(pids: &[i32], options: &[String]) -> Result<String> {
    let mut command = Command::new("ps");
    if options.is_empty() {
        command.arg("-ef")
    } else {
        command.args(options)
    };
    let output = command.output().context("cannot run ps")?;
    if !output.status.success() {
        bail!("ps failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header
        .split_whitespace()
        .position(|name| name == "PID")
        .context("the output of ps has no column PID")?;
    let ours = lines.filter(|line| {
        let pid = line.split_whitespace().nth(column).and_then(|field| field.parse().ok());
        pid.is_some_and(|pid| pids.contains(&pid))
    });
    Ok(std::iter::once(header).chain(ours).collect::<Vec<_>>().join("\n"))
}
