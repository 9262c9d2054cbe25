//! `info` and `--version`.

use std::fs;

use anyhow::{Context, Result};
use libcgroups::common::get_cgroup_setup;
use nix::sys::utsname::uname;

use super::print;

/// Prints our version in the form of `runc --version`, which callers parse.
pub(crate) fn version() -> Result<u8> {
    print(&format!("dunlin version {}", env!("CARGO_PKG_VERSION")))?;
    print(&format!("spec: {}", oci_spec::runtime::VERSION))?;
    Ok(0)
}

/// Prints what this host offers to containers, one fact a line.
pub(crate) fn info() -> Result<u8> {
    version()?;
    let uname = uname().context("cannot ask for the kernel's name")?;
    fact("Kernel", &uname.release().to_string_lossy())?;
    fact("Architecture", &uname.machine().to_string_lossy())?;
    fact("Operating system", &operating_system().unwrap_or_else(|| "unknown".into()))?;
    fact("Cores", &std::thread::available_parallelism()?.to_string())?;
    let meminfo = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    fact("Memory", total.unwrap_or("unknown").trim())?;
    fact("Cgroups", &get_cgroup_setup().context("cannot find the cgroups")?.to_string())?;
    for (name, file) in [
        ("Cgroup", "cgroup"),
        ("Ipc", "ipc"),
        ("Mount", "mnt"),
        ("Network", "net"),
        ("Pid", "pid"),
        ("Time", "time"),
        ("User", "user"),
        ("Uts", "uts"),
    ] {
        let present = fs::symlink_metadata(format!("/proc/self/ns/{file}")).is_ok();
        fact(&format!("{name} namespace"), if present { "available" } else { "missing" })?;
    }
    let bounding = caps::read(None, caps::CapSet::Bounding).context("cannot read capabilities")?;
    for cap in [
        caps::Capability::CAP_CHECKPOINT_RESTORE,
        caps::Capability::CAP_SYS_ADMIN,
        caps::Capability::CAP_SYS_PTRACE,
    ] {
        let present = bounding.contains(&cap);
        fact(&cap.to_string(), if present { "available" } else { "missing" })?;
    }
    Ok(0)
}

fn fact(name: &str, value: &str) -> Result<()> {
    print(&format!("{name:<24}{value}"))
}

fn operating_system() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release")
        .or_else(|_| fs::read_to_string("/usr/lib/os-release"))
        .ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(name.trim_matches('"').to_owned())
}
