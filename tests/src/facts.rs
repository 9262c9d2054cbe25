//! What `/proc` says about a tree, in a form that a move must not change.
//!
//! Numbers the kernel hands out anew (inodes of pipes, pids as the host sees
//! them) are replaced by the order in which they are met, so who shares what
//! with whom stays visible.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use nix::libc;
use nix::unistd::Pid;

use crate::maps;
use crate::proc::{Stat, tree};

/// Keys such as `7/fd/3`, where 7 is the pid as the tree itself sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts(BTreeMap<String, String>);

/// Lines of `status` that a clock, the host's pids or the page cache decide.
const RESTLESS: &[&str] = &[
    "State",
    "Tgid",
    "Ngid",
    "Pid",
    "PPid",
    "FDSize",
    "NStgid",
    "NSpid",
    "NSpgid",
    "NSsid",
    "VmPeak",
    "VmPin",
    "VmHWM",
    "VmRSS",
    "RssAnon",
    "RssFile",
    "RssShmem",
    "VmPTE",
    "VmSwap",
    "SigQ",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
];

/// Fields of `stat` that belong to the process itself.
const LASTING: &[(usize, &str)] = &[
    (7, "tty"),
    (18, "priority"),
    (19, "nice"),
    (26, "start_code"),
    (27, "end_code"),
    (28, "start_stack"),
    (38, "exit_signal"),
    (40, "rt_priority"),
    (41, "policy"),
    (45, "start_data"),
    (46, "end_data"),
    (47, "start_brk"),
    (48, "arg_start"),
    (49, "arg_end"),
    (50, "env_start"),
    (51, "env_end"),
    (52, "exit_code"),
];

/// Files whose whole text must stay.
const FILES: &[&str] = &[
    "cmdline",
    "environ",
    "limits",
    "oom_score_adj",
    "timerslack_ns",
    "personality",
    "coredump_filter",
    "uid_map",
    "gid_map",
];

/// Gives numbers that mean nothing by themselves a name by order of appearance.
#[derive(Default)]
pub(crate) struct Names(BTreeMap<String, usize>);

impl Names {
    pub(crate) fn of(&mut self, thing: &str) -> String {
        let next = self.0.len() + 1;
        format!("#{}", self.0.entry(thing.to_owned()).or_insert(next))
    }
}

impl Facts {
    /// Reads the tree below `root`, a pid of the caller's namespace.
    pub fn read(root: Pid) -> Result<Self> {
        let mut facts = Self(BTreeMap::new());
        let mut names = Names::default();
        let mut tasks = Vec::new();
        for pid in tree(root)? {
            let dir = format!("/proc/{pid}");
            tasks.push((inner(&dir, "NSpid")?.parse::<i32>()?, dir));
        }
        tasks.sort();
        for (pid, dir) in tasks {
            facts.process(&pid.to_string(), &dir, &mut names).with_context(|| dir.clone())?;
        }
        Ok(facts)
    }

    /// What the two do not agree on, one line each.
    #[must_use]
    pub fn differences(&self, after: &Self) -> Vec<String> {
        let keys: std::collections::BTreeSet<_> = self.0.keys().chain(after.0.keys()).collect();
        let told = |facts: &Self, key: &str| {
            facts.0.get(key).map_or("nothing".into(), |value| format!("{value:?}"))
        };
        let differ = keys.into_iter().filter(|key| self.0.get(*key) != after.0.get(*key));
        differ
            .map(|key| format!("{key}: {} became {}", told(self, key), told(after, key)))
            .collect()
    }

    fn process(&mut self, pid: &str, dir: &str, names: &mut Names) -> Result<()> {
        let stat = Stat::read(dir)?;
        let state = if "TtZX".contains(stat.field(3)) { stat.field(3) } else { "alive" };
        self.put(pid, "state", state);
        let parent = stat.parent().map(|parent| inner(&format!("/proc/{parent}"), "NSpid"));
        // The root's parent lies outside of the tree.
        self.put(pid, "parent", parent.context("no parent")?.unwrap_or_else(|_| "outside".into()));
        for key in ["NSpgid", "NSsid"] {
            self.put(pid, key, inner(dir, key)?);
        }
        if state == "Z" {
            // What `wait` and `ps` tell of it is all that is left.
            for (field, name) in [(38, "exit_signal"), (52, "exit_code")] {
                self.put(pid, name, stat.field(field));
            }
            self.put(pid, "name", stat.field(2));
            return Ok(());
        }
        self.task(pid, dir)?;
        for file in FILES {
            let text = fs::read(format!("{dir}/{file}")).with_context(|| (*file).to_owned())?;
            self.put(pid, file, String::from_utf8_lossy(&text));
        }
        self.put(pid, "timers", timers(&fs::read_to_string(format!("{dir}/timers"))?));
        self.put(pid, "auxv", format!("{:02x?}", fs::read(format!("{dir}/auxv"))?));
        for link in ["exe", "cwd", "root"] {
            self.put(pid, link, target(&format!("{dir}/{link}"))?);
        }
        for (key, value) in maps::read(dir, names)? {
            self.put(pid, &format!("maps/{key}"), value);
        }
        for task in fs::read_dir(format!("{dir}/task"))? {
            let task = format!("{dir}/task/{}", task?.file_name().to_string_lossy());
            let tid = inner(&task, "NSpid")?;
            self.task(&format!("{pid}/task/{tid}"), &task)?;
        }
        self.fds(pid, dir, names)
    }

    /// What each thread has of its own.
    fn task(&mut self, at: &str, dir: &str) -> Result<()> {
        let stat = Stat::read(dir)?;
        for (field, name) in LASTING {
            self.put(at, &format!("stat/{name}"), stat.field(*field));
        }
        for line in fs::read_to_string(format!("{dir}/status"))?.lines() {
            let (key, value) = line.split_once(':').context("status without a key")?;
            if key == "SigBlk" {
                // Whether SIGUSR2 is blocked tells only if the task is inside
                // `sigsuspend`, waiting for our question, at this moment.
                let mask = u64::from_str_radix(value.trim(), 16)? & !(1 << (libc::SIGUSR2 - 1));
                self.put(at, "status/SigBlk", format!("{mask:016x}"));
            } else if !RESTLESS.contains(&key) {
                self.put(at, &format!("status/{key}"), value.trim());
            }
        }
        Ok(())
    }

    fn fds(&mut self, pid: &str, dir: &str, names: &mut Names) -> Result<()> {
        let mut fds = Vec::new();
        for fd in fs::read_dir(format!("{dir}/fd"))? {
            fds.push(fd?.file_name().to_string_lossy().parse::<i32>()?);
        }
        fds.sort_unstable();
        for fd in fds {
            let mut link = target(&format!("{dir}/fd/{fd}"))?;
            if let Some((kind, _)) = link.split_once(":[") {
                link = format!("{kind} {}", names.of(&link));
            }
            self.put(pid, &format!("fd/{fd}"), link);
            let info = fs::read_to_string(format!("{dir}/fdinfo/{fd}"))?;
            self.put(pid, &format!("fdinfo/{fd}"), fdinfo(&info));
        }
        Ok(())
    }

    fn put(&mut self, at: &str, key: &str, value: impl Into<String>) {
        self.0.insert(format!("{at}/{key}"), value.into());
    }
}

/// The innermost of the ids in a line such as `NSpid: 4711 1`.
fn inner(dir: &str, key: &str) -> Result<String> {
    let status =
        fs::read_to_string(format!("{dir}/status")).with_context(|| format!("{dir}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let id = line.and_then(|ids| ids.split_ascii_whitespace().next_back());
    Ok(id.with_context(|| format!("no {key} in {dir}/status"))?.to_owned())
}

fn target(link: &str) -> Result<String> {
    Ok(fs::read_link(link).with_context(|| link.to_owned())?.to_string_lossy().into_owned())
}

/// POSIX timers in the order of their ids; the kernel's order is no lasting one.
fn timers(text: &str) -> String {
    let lines = text.lines().map(|line| match line.rsplit_once('.') {
        // `notify: signal/pid.4711` names the task as the host sees it.
        Some((how, pid)) => {
            let told = inner(&format!("/proc/{pid}"), "NSpid");
            format!("{how}.{}", told.unwrap_or_else(|_| "gone".into()))
        }
        None => line.to_owned(),
    });
    let lines: Vec<_> = lines.collect();
    let mut timers: Vec<_> = lines.chunks(4).map(|timer| timer.join("\n")).collect();
    timers.sort_unstable();
    timers.join("\n")
}

/// Leaves out inode and mount numbers, and what is left of a running timer.
fn fdinfo(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        let key = line.split(':').next().unwrap_or_default();
        if ["mnt_id", "ino", "it_value", "eventfd-id", "Pid"].contains(&key) {
            continue;
        }
        // epoll adds ` pos:0 ino:b sdev:d` to each of its targets.
        let line = line.split(" pos:").next().unwrap_or_default();
        lines.push(
            match (key, line.strip_prefix("flags:\t").map(|flags| u32::from_str_radix(flags, 8))) {
                // Opened again, a pipe has O_LARGEFILE, which means nothing here.
                (_, Some(Ok(flags))) => format!("flags:\t{:o}", flags & !0o100_000),
                // Any watch that is armed has EPOLLERR and EPOLLHUP; a one-shot that
                // has fired has not, which only firing it again could restore.
                ("tfd", _) if line.contains("events: 400000") => {
                    line.replace("40000018", "40000000")
                }
                // `lock:` begins with the line's number and holds the host's pid.
                ("lock", _) => {
                    let fields = line.split_ascii_whitespace().enumerate();
                    let fields =
                        fields.filter(|(n, _)| ![1, 5].contains(n)).map(|(_, field)| field);
                    fields.collect::<Vec<_>>().join(" ")
                }
                _ => line.to_owned(),
            },
        );
    }
    // epoll lists its targets by their addresses in the kernel.
    lines.sort_unstable();
    lines.join("\n")
}
