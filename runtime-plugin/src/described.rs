//! Files beside an image that say in words what lies in it, under the names by
//! which callers of CRIU ask for them: `cgroup.img`, `netns-*.img`,
//! `pidns-*.img`, `remap-fpath.img`, `tcp-stream-*.img`.
//!
//! JSON, for people and for those who look whether something was taken along.
//! Nothing reads them back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use libcgroups::common::CgroupManager;
use libcontainer::container::Container;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::{Value, json};

use crate::container::cgroup;
use crate::manifest::write;

/// What a cgroup is set to, v1 and v2.
const PROPERTIES: [&str; 16] = [
    "cgroup.max.depth",
    "cgroup.max.descendants",
    "cgroup.subtree_control",
    "cgroup.type",
    "cpu.cfs_period_us",
    "cpu.cfs_quota_us",
    "cpu.max",
    "cpu.shares",
    "cpu.weight",
    "cpuset.cpus",
    "cpuset.mems",
    "memory.high",
    "memory.limit_in_bytes",
    "memory.low",
    "memory.max",
    "pids.max",
];

/// Namespaces that may be somebody else's, as runc names them to CRIU.
const EXTERNAL: [(LinuxNamespaceType, &str, &str); 2] = [
    (LinuxNamespaceType::Network, "netns", "extRootNetNS"),
    (LinuxNamespaceType::Pid, "pidns", "extRootPidNS"),
];

/// Describes a container whose image is in `dir`. To be called before it ends.
pub(crate) fn save(container: &Container, dir: &Path, with_cgroup_properties: bool) -> Result<()> {
    let init = container.pid().context("the container has no init")?;
    let put = |name: &str, value: &Value| write(&dir.join(name), &value.to_string());
    put("cgroup.img", &cgroups(init, with_cgroup_properties)?)?;
    let spec = Spec::load(container.bundle().join("config.json"))?;
    for (kind, name, key) in EXTERNAL {
        if let Some(path) = joined(&spec, kind) {
            put(&format!("{name}-1.img"), &json!({ "external": key, "path": path }))?;
        }
    }
    let mut deleted = BTreeSet::new();
    let mut sockets = BTreeSet::new();
    for pid in cgroup(container)?.get_all_pids().context("cannot list the cgroup")? {
        for link in links(pid) {
            let link = link.to_string_lossy();
            if let Some(path) = link.strip_suffix(" (deleted)") {
                deleted.insert(path.to_owned());
            }
            let inode = link.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
            sockets.extend(inode.and_then(|inode| inode.parse::<u64>().ok()));
        }
    }
    if !deleted.is_empty() {
        put("remap-fpath.img", &json!({ "deleted": deleted }))?;
    }
    for (inode, addresses) in established(init) {
        if sockets.contains(&inode) {
            put(&format!("tcp-stream-{inode:x}.img"), &json!(addresses))?;
        }
    }
    Ok(())
}

/// The path of a namespace that the container joined.
fn joined(spec: &Spec, kind: LinuxNamespaceType) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|namespace| namespace.typ() == kind)?.path().clone()
}

/// The cgroups of `init`, by their controllers.
fn cgroups(init: Pid, with_properties: bool) -> Result<Value> {
    let text = fs::read_to_string(format!("/proc/{init}/cgroup"))?;
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut all = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (words.next(), words.next()) else { continue };
        let mut group = BTreeMap::from([("path", json!(path))]);
        if with_properties && let Some(mount) = mount_of(&mounts, controllers) {
            let dir = mount.join(path.trim_start_matches('/'));
            let set = PROPERTIES.into_iter().filter_map(|name| {
                let value = fs::read_to_string(dir.join(name)).ok()?;
                Some((name, value.trim().to_owned()))
            });
            group.insert("properties", json!(set.collect::<BTreeMap<_, _>>()));
        }
        all.insert(controllers, group);
    }
    Ok(json!(all))
}

/// Where the hierarchy of `controllers` is mounted; that of none is version 2.
fn mount_of(mounts: &str, controllers: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, point, kind, options, ..] = words[..] else { return None };
        let is_it = match kind {
            "cgroup2" => controllers.is_empty(),
            "cgroup" => controllers.split(',').all(|one| options.split(',').any(|o| o == one)),
            _ => false,
        };
        is_it.then(|| PathBuf::from(point))
    })
}

/// What the fds of a process lead to; a zombie has none.
fn links(pid: Pid) -> impl Iterator<Item = PathBuf> {
    let dir = fs::read_dir(format!("/proc/{pid}/fd"));
    dir.into_iter().flatten().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
}

/// Established TCP connections of the network namespace of `init` by inode:
/// local and remote address, as `/proc/net/tcp` has them.
fn established(init: Pid) -> Vec<(u64, [String; 2])> {
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/{init}/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [_, local, remote, "01", _, _, _, _, _, inode, ..] = words[..] else { continue };
            if let Ok(inode) = inode.parse() {
                found.push((inode, [local.to_owned(), remote.to_owned()]));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_a_hierarchy_is_found() {
        let mounts = "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
                      none /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let mount = |controllers| mount_of(mounts, controllers);
        assert_eq!(mount("cpu,cpuacct"), Some("/sys/fs/cgroup/cpu,cpuacct".into()));
        assert_eq!(mount(""), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount("pids"), None);
    }
}
