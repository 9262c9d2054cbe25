//! The machine that was measured.

use std::{fmt, fs};

use anyhow::{Context, Result};
use serde::Serialize;

/// What a figure depends on.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    processor: String,
    processors: usize,
    memory_mib: u64,
    kernel: String,
    system: String,
    commit: Option<String>,
}

impl Machine {
    /// Describes this machine.
    pub(super) fn look() -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let release = fs::read_to_string("/etc/os-release")?;
        let memory_kib: u64 = field(&meminfo, "MemTotal:")
            .and_then(|text| text.trim_end_matches(" kB").parse().ok())
            .context("no MemTotal in /proc/meminfo")?;
        let processor = field(&cpuinfo, "model name\t:").unwrap_or("unknown").to_owned();
        Ok(Self {
            processor,
            processors: std::thread::available_parallelism()?.get(),
            memory_mib: memory_kib >> 10,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            system: field(&release, "PRETTY_NAME=")
                .unwrap_or("unknown")
                .trim_matches('"')
                .to_owned(),
            commit: commit(),
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, processors, memory_mib, kernel, system, commit } = self;
        writeln!(f, "{processors} x {processor}, {memory_mib} MiB, Linux {kernel}, {system}")?;
        match commit {
            Some(commit) => writeln!(f, "commit {commit}"),
            None => Ok(()),
        }
    }
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// The commit that was built, marked when something was changed since.
fn commit() -> Option<String> {
    let output = std::process::Command::new("git")
        .args(["describe", "--always", "--dirty"])
        .current_dir(crate::root())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
