//! The shape of a process tree: parents, sessions, process groups, zombies.
//!
//! A session cannot be joined, only inherited at birth or founded, so the order
//! of births is what this file is about. A process whose session is neither its
//! own nor its parent's was left behind by one that has ended: it is born again
//! below a stand-in, which ends and leaves it to the tree's reaper.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// One process of the tree; ids in its own pid namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Node {
    pub(crate) pid: i32,
    /// Differs between two programs that had the pid one after the other.
    pub(crate) generation: u64,
    /// 0 for the root, and for one that entered the pid namespace by `exec`.
    pub(crate) ppid: i32,
    /// 0 when it belongs to a process outside.
    pub(crate) pgid: i32,
    pub(crate) sid: i32,
    /// Signal to the parent at its end.
    pub(crate) exit_signal: i32,
    /// Orphans below it become its children (`PR_SET_CHILD_SUBREAPER`).
    pub(crate) subreaper: bool,
    /// Stopped by job control; whether the parent has waited for that already.
    pub(crate) stopped: Option<bool>,
    /// What is left of it when it is a zombie.
    pub(crate) zombie: Option<Zombie>,
}

/// What a zombie keeps for its parent, and for those who list processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Zombie {
    /// As `wait4(2)` reports it.
    pub(crate) status: i32,
    pub(crate) name: Vec<u8>,
}

/// One step of the tree's creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// `parent` forks `pid`.
    Fork { parent: i32, pid: i32, exit_signal: i32 },
    /// `pid` founds a session.
    NewSession { pid: i32 },
    /// `pid` joins or founds process group `pgid`.
    JoinGroup { pid: i32, pgid: i32 },
    /// `pid` takes in orphans.
    Subreaper { pid: i32 },
    /// `pid` ends as a stand-in and is reaped by `parent`.
    Leave { parent: i32, pid: i32 },
    /// `pid` stops, and the parent waits for that if it has one inside the tree.
    Stop { pid: i32, waited_by: Option<i32> },
    /// `pid` ends and stays a zombie.
    Die { pid: i32, zombie: Zombie },
}

/// The processes of `old` that can stay what they are in `new`, root included.
pub(crate) fn kept(old: &[Node], new: &[Node]) -> BTreeSet<i32> {
    let old: BTreeMap<i32, &Node> = old.iter().map(|n| (n.pid, n)).collect();
    let mut kept = BTreeSet::new();
    // Parents come before their children.
    for (i, node) in new.iter().enumerate() {
        let same = old.get(&node.pid).is_some_and(|o| {
            o.generation == node.generation
                && o.ppid == node.ppid
                && o.sid == node.sid
                && o.exit_signal == node.exit_signal
        });
        if i == 0 || same && (node.ppid == 0 || kept.contains(&node.ppid)) {
            kept.insert(node.pid);
        }
    }
    kept
}

/// The steps that make the tree out of its root, which exists and is in session
/// `root_sid`, and those below it that were `kept` from an earlier shape.
///
/// An error names what the kernel gives no way to create.
pub(crate) fn plan(
    nodes: &[Node],
    root_sid: i32,
    kept: &BTreeSet<i32>,
) -> Result<Vec<Step>, String> {
    let mut plan = Planner::new(nodes, root_sid)?;
    let root = plan.root;
    for node in nodes.iter().filter(|n| n.pid != root && kept.contains(&n.pid)) {
        plan.session.insert(node.pid, node.sid);
        plan.born.insert(node.pid);
    }
    plan.subreapers();
    plan.descend(root)?;
    plan.groups()?;
    plan.stops();
    plan.deaths();
    if plan.born.len() != plan.nodes.len() {
        let lost = plan.nodes.keys().find(|pid| !plan.born.contains(pid));
        return Err(format!("pid {} has no place in the tree", lost.copied().unwrap_or(0)));
    }
    Ok(plan.steps)
}

struct Planner<'n> {
    root: i32,
    nodes: BTreeMap<i32, &'n Node>,
    children: BTreeMap<i32, Vec<&'n Node>>,
    /// Session of each process so far.
    session: BTreeMap<i32, i32>,
    born: BTreeSet<i32>,
    /// Processes whose children were seen to.
    visited: BTreeSet<i32>,
    steps: Vec<Step>,
}

impl<'n> Planner<'n> {
    fn new(nodes: &'n [Node], root_sid: i32) -> Result<Self, String> {
        let root = nodes.first().ok_or("an image without processes")?.pid;
        let mut children: BTreeMap<i32, Vec<&Node>> = BTreeMap::new();
        let mut by_pid = BTreeMap::new();
        for node in nodes {
            if by_pid.insert(node.pid, node).is_some() {
                return Err(format!("pid {} twice in the tree", node.pid));
            }
            if node.pid != root {
                children.entry(node.ppid).or_default().push(node);
            }
        }
        Ok(Self {
            root,
            nodes: by_pid,
            children,
            session: BTreeMap::from([(root, root_sid)]),
            born: BTreeSet::from([root]),
            visited: BTreeSet::new(),
            steps: Vec::new(),
        })
    }

    fn subreapers(&mut self) {
        if self.nodes[&self.root].subreaper {
            self.steps.push(Step::Subreaper { pid: self.root });
        }
    }

    /// Founds the session of `pid` and makes its children, those of an older
    /// session first.
    fn descend(&mut self, pid: i32) -> Result<(), String> {
        let node = self.nodes[&pid];
        self.visited.insert(pid);
        let inherited = self.session[&pid];
        let children = self.children.get(&pid).cloned().unwrap_or_default();
        if node.sid == pid && inherited != pid {
            for child in children.iter().filter(|c| c.sid == inherited && c.sid != c.pid) {
                if !self.born.contains(&child.pid) {
                    self.fork(pid, child)?;
                }
            }
            self.steps.push(Step::NewSession { pid });
            self.session.insert(pid, pid);
        }
        for child in children {
            if self.born.contains(&child.pid) {
                if !self.visited.contains(&child.pid) {
                    self.descend(child.pid)?;
                }
                continue;
            }
            if child.sid == child.pid || child.sid == self.session[&pid] {
                self.fork(pid, child)?;
            } else {
                self.adopt(pid, child)?;
            }
        }
        Ok(())
    }

    fn fork(&mut self, parent: i32, child: &Node) -> Result<(), String> {
        self.birth(parent, child.pid, child.exit_signal);
        if child.subreaper {
            self.steps.push(Step::Subreaper { pid: child.pid });
        }
        self.descend(child.pid)
    }

    fn birth(&mut self, parent: i32, pid: i32, exit_signal: i32) {
        self.steps.push(Step::Fork { parent, pid, exit_signal });
        self.session.insert(pid, self.session[&parent]);
        self.born.insert(pid);
    }

    /// Makes an orphan of a session whose leader has ended, or lives elsewhere.
    fn adopt(&mut self, reaper: i32, child: &Node) -> Result<(), String> {
        let node = self.nodes[&reaper];
        if reaper != self.root && !node.subreaper {
            return Err(format!(
                "pid {} is in session {}, which its parent {reaper} is not in",
                child.pid, child.sid
            ));
        }
        let leader = child.sid;
        if leader == 0 {
            return Err(format!("the session of pid {} is led from outside", child.pid));
        }
        if self.nodes.contains_key(&leader) {
            if self.session.get(&leader) != Some(&leader) {
                let lives = "lives elsewhere and does not exist yet";
                return Err(format!("session {leader} of pid {} {lives}", child.pid));
            }
            // A stand-in below the leader; it becomes an orphan's parent and ends.
            let stand_in = self.free_pid();
            self.birth(leader, stand_in, libc::SIGCHLD);
            self.fork(stand_in, child)?;
            self.steps.push(Step::Leave { parent: leader, pid: stand_in });
            self.born.remove(&stand_in);
        } else {
            self.birth(reaper, leader, libc::SIGCHLD);
            self.steps.push(Step::NewSession { pid: leader });
            self.session.insert(leader, leader);
            let orphans: Vec<&Node> = self.children[&reaper]
                .iter()
                .copied()
                .filter(|c| c.sid == leader && !self.born.contains(&c.pid))
                .collect();
            for orphan in orphans {
                self.fork(leader, orphan)?;
            }
            self.steps.push(Step::Leave { parent: reaper, pid: leader });
            self.born.remove(&leader);
        }
        Ok(())
    }

    /// A pid that nothing in the image uses.
    fn free_pid(&self) -> i32 {
        let used = |pid: &i32| {
            self.nodes.contains_key(pid)
                || self.nodes.values().any(|n| n.sid == *pid || n.pgid == *pid)
                || self.session.contains_key(pid)
        };
        (2..).find(|pid| !used(pid)).expect("fewer processes than pids")
    }

    /// Leaders found their groups before others join; a group whose leader has
    /// ended gets a stand-in that founds it and leaves once it is populated.
    fn groups(&mut self) -> Result<(), String> {
        let mut groups: BTreeMap<i32, Vec<&Node>> = BTreeMap::new();
        for node in self.nodes.values() {
            groups.entry(node.pgid).or_default().push(node);
        }
        for (pgid, members) in groups {
            if pgid == 0 {
                continue;
            }
            let session = members[0].sid;
            // The group of a session's leader exists since the session does,
            // and outlives the leader: its pid is not free for a stand-in.
            let founded = session == pgid;
            let stand_in = !founded && !self.nodes.contains_key(&pgid);
            if stand_in {
                let forker = members.iter().find(|m| self.session.get(&m.pid) == Some(&session));
                let forker = forker.ok_or_else(|| format!("process group {pgid} has no member"))?;
                let parent = forker.pid;
                self.birth(parent, pgid, libc::SIGCHLD);
                self.steps.push(Step::JoinGroup { pid: pgid, pgid });
            } else if !founded {
                self.steps.push(Step::JoinGroup { pid: pgid, pgid });
            }
            for member in members.iter().filter(|m| m.pid != pgid) {
                self.steps.push(Step::JoinGroup { pid: member.pid, pgid });
            }
            if stand_in {
                let parent = members[0].pid;
                self.steps.push(Step::Leave { parent, pid: pgid });
                self.born.remove(&pgid);
            }
        }
        Ok(())
    }

    fn stops(&mut self) {
        for node in self.nodes.values() {
            if let Some(waited) = node.stopped {
                let parent = (waited && self.nodes.contains_key(&node.ppid)).then_some(node.ppid);
                self.steps.push(Step::Stop { pid: node.pid, waited_by: parent });
            }
        }
    }

    /// Zombies end when all the tree stands; children first.
    fn deaths(&mut self) {
        let zombies = self.nodes.values().rev();
        let steps: Vec<Step> = zombies
            .filter_map(|n| Some(Step::Die { pid: n.pid, zombie: n.zombie.clone()? }))
            .collect();
        self.steps.extend(steps);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(pid: i32, ppid: i32, pgid: i32, sid: i32) -> Node {
        let exit_signal = libc::SIGCHLD;
        Node {
            pid,
            generation: 0,
            ppid,
            pgid,
            sid,
            exit_signal,
            subreaper: false,
            stopped: None,
            zombie: None,
        }
    }

    /// Executes a plan on paper and returns `(pid, ppid, pgid, sid)` of all.
    fn execute(nodes: &[Node], root_sid: i32) -> Vec<(i32, i32, i32, i32)> {
        let root = nodes[0].pid;
        let mut all = BTreeMap::from([(root, (nodes[0].ppid, root_sid, root_sid))]);
        for step in plan(nodes, root_sid, &BTreeSet::new()).unwrap() {
            match step {
                Step::Fork { parent, pid, .. } => {
                    let (_, pgid, sid) = all[&parent];
                    let in_use = |&(_, pgid, sid): &(i32, i32, i32)| pgid == pid || sid == pid;
                    assert!(!all.values().any(in_use), "pid {pid} is taken");
                    assert!(all.insert(pid, (parent, pgid, sid)).is_none());
                }
                Step::NewSession { pid } => {
                    let me = all.get_mut(&pid).unwrap();
                    (me.1, me.2) = (pid, pid);
                }
                Step::JoinGroup { pid, pgid } => {
                    let sid = all[&pid].2;
                    assert!(pid == pgid || all.values().any(|p| p.1 == pgid && p.2 == sid));
                    all.get_mut(&pid).unwrap().1 = pgid;
                }
                Step::Leave { parent, pid } => {
                    assert_eq!(all.remove(&pid).unwrap().0, parent);
                    for p in all.values_mut().filter(|p| p.0 == pid) {
                        p.0 = root;
                    }
                }
                Step::Subreaper { .. } | Step::Stop { .. } | Step::Die { .. } => {}
            }
        }
        all.into_iter().map(|(pid, (ppid, pgid, sid))| (pid, ppid, pgid, sid)).collect()
    }

    fn check(nodes: &[Node], root_sid: i32) {
        let mut wanted: Vec<_> = nodes.iter().map(|n| (n.pid, n.ppid, n.pgid, n.sid)).collect();
        wanted.sort_unstable();
        assert_eq!(execute(nodes, root_sid), wanted);
    }

    #[test]
    fn children_keep_the_session_their_parent_has_left() {
        check(&[node(1, 0, 1, 1), node(2, 1, 2, 2), node(3, 2, 1, 1), node(4, 2, 2, 2)], 1);
    }

    #[test]
    fn orphans_of_a_dead_leader_keep_its_session() {
        check(&[node(1, 0, 1, 1), node(7, 1, 5, 5), node(8, 1, 5, 5)], 1);
    }

    #[test]
    fn orphans_of_a_living_session_come_home() {
        check(&[node(1, 0, 1, 1), node(5, 1, 5, 5), node(9, 1, 5, 5)], 1);
    }

    #[test]
    fn a_group_outlives_its_leader() {
        check(&[node(1, 0, 1, 1), node(5, 1, 4, 1), node(6, 1, 4, 1)], 1);
    }

    #[test]
    fn a_stranger_session_is_named() {
        let err =
            plan(&[node(1, 0, 1, 1), node(2, 1, 2, 2), node(3, 2, 9, 9)], 1, &BTreeSet::new())
                .unwrap_err();
        assert!(err.contains("pid 3") && err.contains("session 9"), "{err}");
    }

    #[test]
    fn what_is_kept_is_not_made_again() {
        let old = [node(1, 0, 1, 1), node(2, 1, 1, 1), node(3, 2, 1, 1), node(4, 1, 1, 1)];
        let mut new = vec![node(1, 0, 1, 1), node(2, 1, 1, 1), node(3, 2, 1, 1), node(5, 2, 1, 1)];
        assert_eq!(kept(&old, &new), BTreeSet::from([1, 2, 3]));
        let born = |new: &[Node]| {
            let steps = plan(new, 1, &kept(&old, new)).unwrap();
            let forks = steps.into_iter().filter_map(|step| match step {
                Step::Fork { parent, pid, .. } => Some((parent, pid)),
                _ => None,
            });
            forks.collect::<Vec<_>>()
        };
        assert_eq!(born(&new), [(2, 5)]);
        // Another program under the same pid: it and its children are new.
        new[1].generation = 7;
        assert_eq!(kept(&old, &new), BTreeSet::from([1]));
        assert_eq!(born(&new), [(1, 2), (2, 3), (2, 5)]);
    }
}
