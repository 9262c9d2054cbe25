//! A counting container is handed over again and again while something is
//! killed or cut at a random instant. Whatever it was: one copy runs on, and
//! the numbers that it writes itself prove that it was never two or none.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests may do what tests may"
)]

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::{
    pair::{NAMES, Pair},
    random::Random,
};

/// What is done to a migration.
#[derive(Debug, Clone, Copy, PartialEq)]
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

/// Rounds after which it is no accident that all went one way.
const MANY: usize = 200;

fn link(pair: &Pair, at: usize, state: &str) {
    pair.host(at).run(Command::new("ip").args(["link", "set", "up0", state])).unwrap();
}

/// Migrates away from `at`, with a fault after `delay`; gives where it is then.
fn hand_over(pair: &mut Pair, at: usize, fault: Fault, delay: Duration) -> usize {
    let migration = pair.start(at).unwrap_or_else(|problem| panic!("{problem}: {}", pair.said()));
    // The instant is the test.
    thread::sleep(delay);
    let there = 1 - at;
    match fault {
        Fault::None => {}
        Fault::SourceWorker => drop(pair.kill_worker(at, "source-worker")),
        Fault::DestinationWorker => drop(pair.kill_worker(there, "receive")),
        Fault::SourceShim => pair.revive(at).unwrap(),
        Fault::DestinationShim => pair.revive(there).unwrap(),
        Fault::BothShims => {
            pair.kill_shim(at).unwrap();
            pair.revive(there).unwrap();
            pair.revive(at).unwrap();
        }
        Fault::Link => {
            link(pair, at, "down");
            thread::sleep(Duration::from_millis(2500));
            link(pair, at, "up");
        }
        Fault::Cancel => {
            // Too late is an answer, too.
            pair.node(at).ask(async |client| client.cancel(migration.id).await).ok();
        }
    }
    let now = pair.settled().unwrap();
    if fault == Fault::None {
        assert_eq!(now, there, "did not move: {}", pair.said());
    }
    now
}

#[test]
fn always_exactly_one_copy() {
    let rounds: usize = std::env::var("DUNLIN_ROUNDS").map_or(16, |rounds| rounds.parse().unwrap());
    let seed = std::env::var("DUNLIN_SEED").map_or(0x5eed, |seed| seed.parse().unwrap());
    let mut random = Random::new(seed);
    let mut pair = Pair::set(&[]).unwrap();
    let (mut at, mut usual) = (0, Duration::from_millis(300));
    let (mut moved, mut stayed, mut round) = (0, 0, 0);
    // Both must have been seen, or it was no test.
    while round < rounds || moved == 0 || stayed == 0 {
        assert!(round < MANY, "with a fault {moved} moved and {stayed} stayed");
        let fault = FAULTS[round % FAULTS.len()];
        let delay = Duration::from_micros(random.below(u64::try_from(usual.as_micros()).unwrap()));
        let since = Instant::now();
        let now = hand_over(&mut pair, at, fault, delay);
        let (from, to, took) = (NAMES[at], NAMES[now], since.elapsed());
        println!(
            "round {round}, seed {seed}: {fault:?} after {delay:?}: {from} -> {to} in {took:?}"
        );
        match fault {
            Fault::None => usual = took,
            _ if now == at => stayed += 1,
            _ => moved += 1,
        }
        pair.nothing_leaked(now).unwrap();
        (at, round) = (now, round + 1);
    }
}
