//! Two nodes and one counting container that is handed over between them.
//!
//! The container's own numbers are the proof: it writes the name of the host
//! it runs on and one more than before into a file that both hosts share. A
//! second copy would write a number twice, a lost one none.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::Path,
    process::Command,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use dunlin_api::{
    Problem,
    rest::{ContainerId, MigrateRequest, Migration, Status},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use uuid::Uuid;

use crate::{
    bundle::Bundle,
    hosts::{Host, Hosts},
    node::{self, Node},
    worker::program,
};

/// The container's id.
pub const ID: &str = "counter";

/// The hosts' names.
pub const NAMES: [&str; 2] = ["a", "b"];

/// How long anything may take until all is settled again.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Two nodes and one counting container; dropping it removes all of it.
pub struct Pair {
    nodes: [Option<Node>; 2],
    hosts: Hosts,
    shared: TempDir,
    flags: Vec<String>,
    /// Bytes of the log that were read, the last number in them, and where.
    seen: Mutex<(u64, u64, usize)>,
    /// What a host looks like with and without the container.
    clean: BTreeMap<(usize, bool), Look>,
}

/// What could be left behind on a host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Look {
    processes: Vec<String>,
    cgroups: Vec<String>,
    mounts: Vec<String>,
    interfaces: Vec<String>,
    files: Vec<String>,
}

impl Pair {
    /// Makes the hosts, starts their shims with `flags` and the container on
    /// the first, and moves it there and back to learn what is usual.
    pub fn set(flags: &[&str]) -> Result<Self> {
        let hosts = Hosts::new(&NAMES)?;
        let shared = tempfile::tempdir()?;
        for name in NAMES {
            let host = &hosts[name];
            fs::create_dir(host.folder().join("faults"))?;
            let mut bundle = Bundle::on(host, ID)?;
            bundle.program_as(&program("heartbeat")?, Path::new("/bin/heartbeat"))?;
            bundle.args(["/bin/heartbeat"]).save()?;
            fs::write(bundle.rootfs().join("where"), format!("{name}\n"))?;
            share(&bundle.folder().join("config.json"), shared.path())?;
        }
        let flags = flags.iter().copied().map(ToOwned::to_owned).collect();
        let mut pair = Self {
            nodes: [None, None],
            hosts,
            shared,
            flags,
            seen: Mutex::default(),
            clean: BTreeMap::new(),
        };
        pair.revive(0)?;
        pair.revive(1)?;
        node::run_container(&pair.hosts["a"], ID)?;
        pair.counts_on()?;
        for at in [0, 1] {
            pair.learn(at);
            pair.must_move(at)?;
        }
        // What a first move leaves for good (directories, say) is usual.
        pair.clean.clear();
        for at in [0, 1] {
            pair.learn(at);
            pair.must_move(at)?;
        }
        Ok(pair)
    }

    /// A node.
    #[must_use]
    #[allow(clippy::missing_panics_doc, reason = "both run but while one is replaced")]
    pub fn node(&self, at: usize) -> &Node {
        self.nodes[at].as_ref().expect("the node runs")
    }

    /// A host.
    #[must_use]
    pub fn host(&self, at: usize) -> &Host {
        &self.hosts[NAMES[at]]
    }

    /// The last number written, each one more than the one before, and where.
    pub fn count(&self) -> Result<(u64, usize)> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, mut last, mut at) = *seen;
        let mut log = File::open(self.shared.path().join("log"))?;
        log.seek(SeekFrom::Start(start))?;
        let mut text = String::new();
        log.read_to_string(&mut text)?;
        // The last line may be half written.
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        for line in whole.lines() {
            let (host, number) = line.split_once(' ').context("a line is damaged")?;
            let number: u64 = number.parse().with_context(|| format!("{line:?}"))?;
            ensure!(
                number == last + 1,
                "{last} was followed by {line:?}: two copies, or a lost one"
            );
            last = number;
            at = NAMES.iter().position(|name| *name == host).context("an unknown host")?;
        }
        *seen = (start + whole.len() as u64, last, at);
        Ok((last, at))
    }

    /// Waits until it counts on; says where.
    pub fn counts_on(&self) -> Result<usize> {
        let start = self.count().map_or(0, |(last, _)| last);
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.count() {
                Ok((last, at)) if start + 3 <= last => return Ok(at),
                Err(err) if start != 0 => return Err(err),
                _ => {}
            }
            ensure!(Instant::now() < deadline, "nobody counts: {}", self.said());
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Kills a shim.
    pub fn kill_shim(&self, at: usize) -> Result<()> {
        Ok(kill(Pid::from_raw(self.node(at).pid().try_into()?), Signal::SIGKILL)?)
    }

    /// Starts a shim anew, and ends what is left of the old one.
    pub fn revive(&mut self, at: usize) -> Result<()> {
        // The old one must be gone before the new one takes its journal.
        self.nodes[at] = None;
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        self.nodes[at] = Some(Node::start_with(&self.hosts[NAMES[at]], &flags)?);
        Ok(())
    }

    /// Waits until a shim has ended by itself.
    pub fn await_end(&mut self, at: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.has_ended(at) {
            ensure!(Instant::now() < deadline, "the shim of {} does not end", NAMES[at]);
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Whether a shim has ended by itself.
    pub fn has_ended(&mut self, at: usize) -> bool {
        self.nodes[at].as_mut().is_none_or(Node::has_ended)
    }

    /// Workers of a shim: its children that have `word` among their arguments.
    #[must_use]
    pub fn workers(&self, at: usize, word: &str) -> Vec<i32> {
        let all = children(self.node(at).pid());
        all.into_iter()
            .filter(|pid| has_argument(Path::new(&format!("/proc/{pid}")), word))
            .collect()
    }

    /// Kills workers of a shim; says how many.
    pub fn kill_worker(&self, at: usize, word: &str) -> usize {
        let all = self.workers(at, word);
        all.iter().filter(|pid| kill(Pid::from_raw(**pid), Signal::SIGKILL).is_ok()).count()
    }

    /// Kills a shim that is not to come back at once.
    pub fn stop(&mut self, at: usize) -> Result<()> {
        self.nodes[at].take().map(drop).context("it is stopped already")
    }

    /// Kills whatever on a host has `word` among its arguments.
    pub fn end_all(&self, at: usize, word: &str) -> Result<()> {
        for entry in fs::read_dir(self.host(at).outside("/proc"))?.flatten() {
            if has_argument(&entry.path(), word) {
                let pid = entry.file_name().to_string_lossy().into_owned();
                self.host(at).run(Command::new("kill").args(["-KILL", &pid]))?;
            }
        }
        Ok(())
    }

    /// Starts a migration away from `at`.
    pub fn start(&self, at: usize) -> Result<Migration, Problem> {
        let id: ContainerId = ID
            .parse()
            .map_err(|err| Problem::new(dunlin_api::ErrorCode::Internal, ID, format!("{err}")))?;
        let request = MigrateRequest::to(self.node(1 - at).url());
        self.node(at).ask(async |client| client.migrate(&id, &request).await)
    }

    /// Waits until no migration is under way, and gives the node that has the
    /// container, which counts on there; there is exactly one.
    pub fn settled(&self) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        let at = loop {
            let over = [0, 1].iter().all(|at| {
                let all = self.node(*at).ask(async |client| client.migrations().await);
                all.is_ok_and(|all| all.iter().all(|migration| migration.state.is_final()))
            });
            let at: Vec<_> = (0..2).filter(|at| self.has_it(*at)).collect();
            if let ([at], true) = (&at[..], over) {
                break *at;
            }
            ensure!(Instant::now() < deadline, "not settled, runs at {at:?}: {}", self.said());
            thread::sleep(Duration::from_millis(20));
        };
        let counts = self.counts_on()?;
        ensure!(counts == at, "it counts on {}: {}", NAMES[counts], self.said());
        Ok(at)
    }

    /// Moves it away from `at`, which must succeed.
    pub fn must_move(&self, at: usize) -> Result<usize> {
        let migration = self.start(at).with_context(|| self.said())?;
        let there = self.settled()?;
        ensure!(there != at, "it did not move: {:?}: {}", self.find(at, migration.id), self.said());
        Ok(there)
    }

    /// A migration as one of the nodes sees it.
    pub fn find(&self, at: usize, id: Uuid) -> Result<Migration, Problem> {
        self.node(at).ask(async |client| client.migration(id).await)
    }

    fn has_it(&self, at: usize) -> bool {
        let Ok(all) = self.node(at).ask(async |client| client.containers().await) else {
            return false;
        };
        all.iter().any(|found| found.id.as_str() == ID && found.status == Status::Running)
    }

    /// What both shims and their last workers logged.
    #[must_use]
    pub fn said(&self) -> String {
        let logs = NAMES.map(|name| {
            let log = fs::read_to_string(self.hosts[name].folder().join("shim.log"));
            let log = log.unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            format!("{name}:\n{}", lines[lines.len().saturating_sub(60)..].join("\n"))
        });
        logs.join("\n")
    }

    /// Lets a point fail at its next passing.
    pub fn arm(&self, at: usize, point: &str, kind: &str) -> Result<()> {
        Ok(fs::write(self.host(at).folder().join("faults").join(point), kind)?)
    }

    /// Waits until the point is reached.
    pub fn reached(&self, at: usize, point: &str) -> Result<()> {
        let mark = self.host(at).folder().join("faults").join(format!("{point}.reached"));
        let deadline = Instant::now() + PATIENCE;
        while !mark.exists() {
            ensure!(Instant::now() < deadline, "{point} is not reached: {}", self.said());
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Forgets all points of a host; who is held at one goes on.
    pub fn disarm(&self, at: usize) -> Result<()> {
        for file in fs::read_dir(self.host(at).folder().join("faults"))? {
            fs::remove_file(file?.path())?;
        }
        Ok(())
    }

    /// Waits until both hosts look as they did before anything failed.
    pub fn nothing_leaked(&self, holder: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for at in [0, 1] {
            let clean = &self.clean[&(at, at == holder)];
            loop {
                let now = self.look(at);
                if now == *clean {
                    break;
                }
                if deadline < Instant::now() {
                    bail!("left on {}:\n{now:#?}\ninstead of\n{clean:#?}", NAMES[at]);
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// Takes what is there for usual, with the container at `holder`.
    fn learn(&mut self, holder: usize) {
        for at in [0, 1] {
            let look = self.look(at);
            self.clean.insert((at, at == holder), look);
        }
    }

    fn look(&self, at: usize) -> Look {
        let host = self.host(at);
        let sorted = |mut list: Vec<String>| {
            list.sort();
            list
        };
        let proc = host.outside("/proc");
        let pids = fs::read_dir(&proc).into_iter().flatten().flatten();
        let processes = pids.filter_map(|pid| {
            let comm = fs::read_to_string(pid.path().join("comm")).ok()?;
            Some(comm.trim().to_owned())
        });
        let tops = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let tops = tops.map(|top| top.path()).chain([Path::new("/sys/fs/cgroup").to_owned()]);
        let cgroups = tops.flat_map(|top| {
            let mut found = Vec::new();
            walk(&top.join(host.cgroup().trim_start_matches('/')), true, &mut found);
            found
        });
        let read = |name: &str| fs::read_to_string(proc.join("1").join(name)).unwrap_or_default();
        let (mounts, interfaces) = (read("mounts"), read("net/dev"));
        let places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        let names = interfaces.lines().skip(2).filter_map(|line| line.split(':').next());
        let mut files = Vec::new();
        walk(&host.outside("/run/dunlin"), false, &mut files);
        Look {
            processes: sorted(processes.collect()),
            cgroups: sorted(cgroups.collect()),
            mounts: sorted(places.map(ToOwned::to_owned).collect()),
            interfaces: sorted(names.map(|name| name.trim().to_owned()).collect()),
            files: sorted(files),
        }
    }
}

/// Everything below `path`, itself included.
fn walk(path: &Path, dirs_only: bool, found: &mut Vec<String>) {
    if !path.symlink_metadata().is_ok_and(|meta| meta.is_dir() || !dirs_only) {
        return;
    }
    found.push(path.display().to_string());
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        walk(&entry.path(), dirs_only, found);
    }
}

/// Gives every container of a bundle the same folder at `/shared`.
fn share(config: &Path, folder: &Path) -> Result<()> {
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(config)?)?;
    let mounts = spec["mounts"].as_array_mut().context("a bundle has mounts")?;
    mounts.push(serde_json::json!({
        "destination": "/shared", "type": "bind", "source": folder, "options": ["rbind", "rw"],
    }));
    Ok(fs::write(config, serde_json::to_vec(&spec)?)?)
}

fn has_argument(proc: &Path, word: &str) -> bool {
    let line = fs::read(proc.join("cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|arg| arg == word.as_bytes())
}

fn children(pid: u32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()
        })
        .collect()
}
