//! Which processes make up a tree, read from `/proc`.

use std::fs;

use anyhow::{Context, Result};
use nix::unistd::Pid;

/// One line of `/proc/PID/stat`, fields numbered as in `proc_pid_stat(5)`.
pub struct Stat(Vec<String>);

impl Stat {
    /// Reads the line below `dir`, a process's or a thread's directory.
    pub fn read(dir: &str) -> Result<Self> {
        let line =
            fs::read_to_string(format!("{dir}/stat")).with_context(|| format!("{dir}/stat"))?;
        let (pid, rest) = line.split_once(" (").context("stat without a name")?;
        let (name, rest) = rest.rsplit_once(") ").context("stat without a name")?;
        let rest = rest.split_ascii_whitespace();
        Ok(Self([pid, name].into_iter().chain(rest).map(str::to_owned).collect()))
    }

    /// Field `number`, counted from 1; empty when this kernel lacks it.
    #[must_use]
    pub fn field(&self, number: usize) -> &str {
        self.0.get(number - 1).map_or("", String::as_str)
    }

    /// The parent.
    #[must_use]
    pub fn parent(&self) -> Option<Pid> {
        self.field(4).parse().ok().map(Pid::from_raw)
    }
}

/// `root` and everything below it, parents before children. Processes that end
/// meanwhile are left out.
pub fn tree(root: Pid) -> Result<Vec<Pid>> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Ok(stat) = Stat::read(&format!("/proc/{pid}")) {
            parents.push((Pid::from_raw(pid), stat.parent()));
        }
    }
    parents.sort();
    let mut tree: Vec<Pid> =
        parents.iter().map(|(pid, _)| *pid).filter(|pid| *pid == root).collect();
    let mut next = 0;
    while let Some(&parent) = tree.get(next) {
        let children = parents.iter().filter(|(_, of)| *of == Some(parent));
        tree.extend(children.map(|(pid, _)| *pid));
        next += 1;
    }
    Ok(tree)
}
