//! Which processes and threads there are.

use std::{collections::BTreeSet, fs, io};

use nix::unistd::Pid;

/// Thread ids of `pid`, as the caller's pid namespace numbers them.
pub(crate) fn threads(pid: Pid) -> io::Result<Vec<Pid>> {
    numbers(&format!("/proc/{pid}/task"))
}

/// `root` and all its descendants, parents first; where `root` is the init of a
/// pid namespace, every process in it.
///
/// A snapshot: processes come and go while it is taken.
pub(crate) fn processes_below(root: Pid) -> io::Result<Vec<Pid>> {
    let mut found = Vec::from([root]);
    let mut known = BTreeSet::from([root]);
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        next += 1;
        for child in children(pid)? {
            if known.insert(child) {
                found.push(child);
            }
        }
    }
    // Processes that entered by `exec` have their parent outside.
    let namespace = |pid| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    if super::Status::of(root)?.tgid() == 1
        && let Some(home) = namespace(root)
    {
        for pid in numbers("/proc")? {
            if !known.contains(&pid) && namespace(pid).as_ref() == Some(&home) {
                known.insert(pid);
                found.push(pid);
            }
        }
    }
    Ok(found)
}

fn children(pid: Pid) -> io::Result<Vec<Pid>> {
    let mut all = Vec::new();
    for tid in threads(pid).unwrap_or_default() {
        // Gone since: its children are somebody else's now, met elsewhere.
        let Ok(text) = super::text(&format!("{pid}/task/{tid}/children")) else {
            continue;
        };
        all.extend(text.split_whitespace().filter_map(|w| w.parse().ok()).map(Pid::from_raw));
    }
    Ok(all)
}

fn numbers(dir: &str) -> io::Result<Vec<Pid>> {
    let mut all: Vec<Pid> = fs::read_dir(dir)?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .collect();
    all.sort_unstable();
    Ok(all)
}
