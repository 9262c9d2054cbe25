//! A counting container is handed over again and again while something is
//! killed or cut at a random instant. Whatever it was: one copy runs on, and
//! the numbers that it writes itself prove that it was never two or none.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may panic like the tests")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use dunlin_api::rest::{ContainerId, MigrateRequest, Migration, Status};
use dunlin_tests::{
    bundle::Bundle,
    hosts::Hosts,
    node::{self, Node},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

const ID: &str = "counter";
const NAMES: [&str; 2] = ["a", "b"];
const FLAGS: [&str; 1] = ["--silence-ms=500"];

/// How long anything may take until all is settled again.
const PATIENCE: Duration = Duration::from_secs(40);

/// What is done to a migration.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// Nothing: it must succeed.
    None,
    SourceWorker,
    DestinationWorker,
    SourceShim,
    DestinationShim,
    BothShims,
    /// The source's host is off the net for longer than the silence allowed.
    Link,
    Cancel,
}

const FAULTS: [Fault; 8] = [
    Fault::None,
    Fault::SourceWorker,
    Fault::DestinationWorker,
    Fault::SourceShim,
    Fault::DestinationShim,
    Fault::BothShims,
    Fault::Link,
    Fault::Cancel,
];

/// Two hosts, one counting container.
struct Stage {
    nodes: [Option<Node>; 2],
    hosts: Hosts,
    shared: TempDir,
}

impl Stage {
    fn set() -> Self {
        let hosts = Hosts::new(&NAMES).unwrap();
        let shared = tempfile::tempdir().unwrap();
        for name in NAMES {
            let mut bundle = Bundle::on(&hosts[name], ID).unwrap();
            let count = "i=0; while :; do i=$((i+1)); echo $i >>/shared/log; sleep 0.005; done";
            bundle.busybox().unwrap().args(["sh", "-c", count]).save().unwrap();
            share(&bundle.folder().join("config.json"), shared.path());
        }
        let nodes = NAMES.map(|name| Some(Node::start_with(&hosts[name], &FLAGS).unwrap()));
        node::run_container(&hosts["a"], ID).unwrap();
        Self { nodes, hosts, shared }
    }

    fn node(&self, at: usize) -> &Node {
        self.nodes[at].as_ref().unwrap()
    }

    fn log(&self) -> PathBuf {
        self.shared.path().join("log")
    }

    /// The numbers written so far, each one more than the one before.
    fn count(&self) -> u64 {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        // The last line may be half written.
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        let mut last = 0;
        for line in whole.lines() {
            let number: u64 = line.parse().unwrap_or_else(|_| panic!("{line:?} is no number"));
            assert_eq!(number, last + 1, "two copies wrote, or one went back in time");
            last = number;
        }
        last
    }

    /// Waits until it counts on.
    fn counts_on(&self) {
        let (start, deadline) = (self.count(), Instant::now() + PATIENCE);
        while self.count() < start + 3 {
            assert!(Instant::now() < deadline, "nobody counts: {}", self.said());
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Starts a shim anew where it was killed.
    fn revive(&mut self, at: usize) {
        // The old one must be gone before the new one takes its journal.
        self.nodes[at] = None;
        self.nodes[at] = Some(Node::start_with(&self.hosts[NAMES[at]], &FLAGS).unwrap());
    }

    /// Workers of a shim: processes below it with `word` among their arguments.
    fn kill_worker(&self, at: usize, word: &str) {
        for pid in children(self.node(at).pid()) {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if line.split(|byte| *byte == 0).any(|arg| arg == word.as_bytes()) {
                kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
            }
        }
    }

    fn kill_shim(&self, at: usize) {
        kill(Pid::from_raw(self.node(at).pid().try_into().unwrap()), Signal::SIGKILL).unwrap();
    }

    fn link(&self, at: usize, state: &str) {
        let mut command = Command::new("ip");
        self.hosts[NAMES[at]].run(command.args(["link", "set", "up0", state])).unwrap();
    }

    /// Waits until no migration is under way, and gives the node that has the
    /// container; there is exactly one.
    fn settled(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let over = [0, 1].iter().all(|at| {
                let all = self.node(*at).ask(async |client| client.migrations().await);
                all.is_ok_and(|all| all.iter().all(|migration| migration.state.is_final()))
            });
            let at: Vec<_> = (0..2).filter(|at| self.has_it(*at)).collect();
            if let ([at], true) = (&at[..], over) {
                return *at;
            }
            assert!(Instant::now() < deadline, "not settled, runs at {at:?}: {}", self.said());
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn has_it(&self, at: usize) -> bool {
        let containers = self.node(at).ask(async |client| client.containers().await).unwrap();
        containers.iter().any(|found| found.id.as_str() == ID && found.status == Status::Running)
    }

    fn said(&self) -> String {
        let logs = NAMES.map(|name| {
            let log = fs::read_to_string(self.hosts[name].folder().join("shim.log"));
            format!("{name}:\n{}", log.unwrap_or_default())
        });
        logs.join("\n")
    }

    fn start(&self, at: usize) -> Migration {
        let (id, to): (ContainerId, _) = (ID.parse().unwrap(), self.node(1 - at).url());
        let request = MigrateRequest::to(to);
        let started = self.node(at).ask(async |client| client.migrate(&id, &request).await);
        started.unwrap_or_else(|problem| panic!("{problem}: {}", self.said()))
    }

    /// Migrates away from `at`, with a fault after `delay`; gives where it is then.
    fn hand_over(&mut self, at: usize, fault: Fault, delay: Duration) -> usize {
        let migration = self.start(at);
        thread::sleep(delay);
        let there = 1 - at;
        match fault {
            Fault::None => {}
            Fault::SourceWorker => self.kill_worker(at, "source-worker"),
            Fault::DestinationWorker => self.kill_worker(there, "receive"),
            Fault::SourceShim => {
                self.kill_shim(at);
                self.revive(at);
            }
            Fault::DestinationShim => {
                self.kill_shim(there);
                self.revive(there);
            }
            Fault::BothShims => {
                self.kill_shim(at);
                self.kill_shim(there);
                self.revive(at);
                self.revive(there);
            }
            Fault::Link => {
                self.link(at, "down");
                thread::sleep(Duration::from_millis(800));
                self.link(at, "up");
            }
            Fault::Cancel => {
                // Too late is an answer, too.
                self.node(at).ask(async |client| client.cancel(migration.id).await).ok();
            }
        }
        let now = self.settled();
        if matches!(fault, Fault::None) {
            assert_eq!(now, there, "did not move: {}", self.said());
        }
        now
    }
}

/// Gives every container of a bundle the same folder at `/shared`.
fn share(config: &Path, folder: &Path) {
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    spec["mounts"].as_array_mut().unwrap().push(serde_json::json!({
        "destination": "/shared", "type": "bind", "source": folder, "options": ["rbind", "rw"],
    }));
    fs::write(config, serde_json::to_vec(&spec).unwrap()).unwrap();
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

/// Numbers that look random and are the same for the same seed (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn always_exactly_one_copy() {
    let rounds: u64 = std::env::var("DUNLIN_ROUNDS").map_or(16, |rounds| rounds.parse().unwrap());
    let seed = std::env::var("DUNLIN_SEED").map_or(0x5eed, |seed| seed.parse().unwrap());
    let mut random = Random(seed);
    let mut stage = Stage::set();
    stage.counts_on();
    let (mut at, mut usual, mut moved) = (0, Duration::from_millis(300), 0);
    for round in 0..rounds {
        let fault = FAULTS[usize::try_from(round).unwrap() % FAULTS.len()];
        let delay = Duration::from_micros(random.below(u64::try_from(usual.as_micros()).unwrap()));
        let since = Instant::now();
        let now = stage.hand_over(at, fault, delay);
        if matches!(fault, Fault::None) {
            usual = since.elapsed();
        }
        println!(
            "round {round}, seed {seed}: {fault:?} after {delay:?}: {} -> {} in {:?}",
            NAMES[at],
            NAMES[now],
            since.elapsed()
        );
        moved += u64::from(now != at);
        at = now;
        stage.counts_on();
    }
    // Without a fault every one moves; with one, some.
    assert!(rounds / 8 <= moved, "only {moved} of {rounds} moved");
}
