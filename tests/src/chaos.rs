//! A container is handed over while something fails at random, again and
//! again. After each round exactly one copy counts on and nothing is left.

use std::{
    collections::BTreeMap,
    fmt,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use dunlin_api::fault::{DESTINATION, SOURCE};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    pair::{NAMES, Pair},
    random::Random,
};

/// A worker that hangs is killed after this; longer than a loaded machine needs.
const FLAGS: [&str; 2] = ["--stuck-s=6", "--prepare-s=6"];

/// Longer than a peer may be silent.
const SILENCE: Duration = Duration::from_millis(2500);

/// What fails. The end is 0 for the source, 1 for the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// Nothing: it must move.
    Nothing,
    /// A worker is killed.
    Worker(usize),
    /// A worker is stopped, and goes on later.
    StopWorker(usize),
    /// A daemon is killed and started anew.
    Shim(usize),
    /// Both daemons are.
    BothShims,
    /// A daemon is stopped, and goes on later.
    StopShim(usize),
    /// The network of a host is down for a while.
    Link(usize),
    /// Packets between the nodes are dropped by a firewall for a while.
    Stall(usize),
    /// Their connections are reset by one.
    Reset(usize),
    /// The disk of a host, with journal and state of the runtime, is full for
    /// a while.
    Disk(usize),
    /// A program fails at a point.
    Point(usize),
    /// Somebody cancels.
    Cancel(usize),
}

const FAULTS: [Fault; 22] = [
    Fault::Nothing,
    Fault::Worker(0),
    Fault::Worker(1),
    Fault::StopWorker(0),
    Fault::StopWorker(1),
    Fault::Shim(0),
    Fault::Shim(1),
    Fault::BothShims,
    Fault::StopShim(0),
    Fault::StopShim(1),
    Fault::Link(0),
    Fault::Link(1),
    Fault::Stall(0),
    Fault::Stall(1),
    Fault::Reset(0),
    Fault::Reset(1),
    Fault::Disk(0),
    Fault::Disk(1),
    Fault::Point(0),
    Fault::Point(1),
    Fault::Cancel(0),
    Fault::Cancel(1),
];

/// A run of rounds.
pub struct Chaos {
    pair: Pair,
    random: Random,
    seed: u64,
    at: usize,
    round: usize,
    usual: Duration,
    /// How many moved and how many stayed, by what failed.
    seen: BTreeMap<Fault, (usize, usize)>,
}

impl Chaos {
    /// Sets two nodes up; `seed` decides what fails when.
    pub fn new(seed: u64) -> Result<Self> {
        Ok(Self {
            pair: Pair::set(&FLAGS)?,
            random: Random::new(seed),
            seed,
            at: 0,
            round: 0,
            usual: Duration::from_millis(300),
            seen: BTreeMap::new(),
        })
    }

    /// Plays at least so many rounds for at least so long, and tells each.
    pub fn run(
        &mut self,
        rounds: usize,
        time: Duration,
        mut tell: impl FnMut(String),
    ) -> Result<()> {
        let since = Instant::now();
        while self.round < rounds || since.elapsed() < time {
            let round = self.round;
            tell(self.play().with_context(|| format!("round {round} of seed {}", self.seed))?);
        }
        Ok(())
    }

    /// Plays one round and says what happened.
    fn play(&mut self) -> Result<String> {
        let fault = self.random.pick(&FAULTS);
        let span = u64::try_from(self.usual.as_micros())?;
        let delay = Duration::from_micros(self.random.below(span));
        let (from, since) = (self.at, Instant::now());
        let what = self.inject(fault, delay)?;
        for at in [0, 1] {
            // At a point of its own it may have ended.
            if self.pair.has_ended(at) {
                self.pair.revive(at)?;
            }
        }
        let now = self.pair.settled().context(what.clone())?;
        self.pair.nothing_leaked(now).context(what.clone())?;
        for at in [0, 1] {
            self.pair.disarm(at)?;
        }
        let took = since.elapsed();
        if fault == Fault::Nothing {
            anyhow::ensure!(
                now != from,
                "nothing failed and it did not move: {}",
                self.pair.said()
            );
            self.usual = took;
        }
        let seen = self.seen.entry(fault).or_default();
        *(if now == from { &mut seen.1 } else { &mut seen.0 }) += 1;
        let (round, from, to) = (self.round, NAMES[from], NAMES[now]);
        (self.at, self.round) = (now, self.round + 1);
        Ok(format!("round {round}: {from} -> {to} in {took:.0?}: {what}"))
    }

    /// Starts a migration and lets something fail after `delay`.
    fn inject(&mut self, fault: Fault, delay: Duration) -> Result<String> {
        let ends = [self.at, 1 - self.at];
        if let Fault::Point(end) = fault {
            let point = self.random.pick(if end == 0 { SOURCE } else { DESTINATION });
            let kind = self.random.pick(&["abort", "exit", "error", "hang"]);
            // A daemon that hangs is a disk that does, which is another fault.
            let daemon = point.starts_with("journal.") || point == "destination.accepted";
            let kind = if daemon && kind == "hang" { "abort" } else { kind };
            self.pair.arm(ends[end], point, kind)?;
            // Refused at once if its first record cannot be written.
            self.pair.start(self.at).ok();
            self.pair.reached(ends[end], point)?;
            if daemon && kind != "error" {
                self.pair.await_end(ends[end])?;
            }
            return Ok(format!("{kind} at {point} on {}", NAMES[ends[end]]));
        }
        let migration = self.pair.start(self.at)?;
        // The instant is part of the fault.
        thread::sleep(delay);
        let pair = &mut self.pair;
        match fault {
            Fault::Nothing | Fault::Point(_) => {}
            Fault::Worker(end) => {
                pair.kill_worker(ends[end], WORKERS[end]);
            }
            Fault::StopWorker(end) => {
                let stopped = pair.workers(ends[end], WORKERS[end]);
                signal(&stopped, Signal::SIGSTOP);
                thread::sleep(SILENCE);
                signal(&stopped, Signal::SIGCONT);
            }
            Fault::Shim(end) => pair.revive(ends[end])?,
            Fault::BothShims => {
                pair.kill_shim(ends[0])?;
                pair.revive(ends[1])?;
                pair.revive(ends[0])?;
            }
            Fault::StopShim(end) => {
                let shim = [i32::try_from(pair.node(ends[end]).pid())?];
                signal(&shim, Signal::SIGSTOP);
                thread::sleep(SILENCE);
                signal(&shim, Signal::SIGCONT);
            }
            Fault::Link(end) => {
                ip_link(pair, ends[end], "down")?;
                thread::sleep(SILENCE);
                ip_link(pair, ends[end], "up")?;
            }
            Fault::Stall(end) => firewall(pair, ends[end], "drop", SILENCE)?,
            Fault::Reset(end) => {
                let reset = "meta l4proto tcp reject with tcp reset";
                firewall(pair, ends[end], reset, Duration::from_millis(300))?;
            }
            Fault::Disk(end) => {
                let disk = |pair: &Pair, size: &str| {
                    let mut mount = Command::new("mount");
                    mount.args(["-o", &format!("remount,{size}"), "/run"]);
                    pair.host(ends[end]).run(&mut mount).map(drop)
                };
                let used = rustix::fs::statvfs(pair.host(ends[end]).outside("/run"))?;
                let used = (used.f_blocks - used.f_bfree) * used.f_frsize;
                // What came in between keeps it from being set: not full, then.
                disk(pair, &format!("size={used}")).ok();
                thread::sleep(Duration::from_millis(500));
                disk(pair, "size=50%")?;
            }
            Fault::Cancel(end) => {
                // Too late is an answer, too, and so is not yet.
                pair.node(ends[end]).ask(async |client| client.cancel(migration.id).await).ok();
            }
        }
        Ok(format!("{fault:?} after {delay:.0?}"))
    }
}

/// Arguments by which workers are known, by end.
const WORKERS: [&str; 2] = ["source-worker", "receive"];

fn signal(pids: &[i32], signal: Signal) {
    for pid in pids {
        // It may have ended.
        kill(Pid::from_raw(*pid), signal).ok();
    }
}

fn ip_link(pair: &Pair, at: usize, state: &str) -> Result<()> {
    pair.host(at).run(Command::new("ip").args(["link", "set", "up0", state])).map(drop)
}

/// Lets a firewall do `verdict` to what goes to peers, for some time.
fn firewall(pair: &Pair, at: usize, verdict: &str, time: Duration) -> Result<()> {
    let rules = format!(
        "table inet chaos {{
             chain in {{ type filter hook input priority 0; tcp dport 7070 {verdict}; }}
             chain out {{ type filter hook output priority 0; tcp dport 7070 {verdict}; }}
         }}"
    );
    pair.host(at).run(Command::new("nft").arg(rules))?;
    thread::sleep(time);
    pair.host(at).run(Command::new("nft").args(["delete", "table", "inet", "chaos"])).map(drop)
}

impl fmt::Display for Chaos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<16}  moved  stayed", "what failed")?;
        for (fault, (moved, stayed)) in &self.seen {
            writeln!(f, "{:<16}  {moved:>5}  {stayed:>6}", format!("{fault:?}"))?;
        }
        let Self { round, seed, .. } = self;
        write!(f, "{round} rounds of seed {seed}: exactly one copy after each, nothing left")
    }
}
