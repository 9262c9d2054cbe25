//! The engine is killed, its sink fails, its image is damaged: the original
//! runs on, and nothing is left of what was half built.
#![allow(clippy::print_stdout, reason = "captured, and shown for a test that fails")]

use std::io::Read;
use std::process::{Command, Stdio};
use std::thread::{sleep, yield_now};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use dunlin_tests::worker::{Damage, Dumped, Order, program};
use dunlin_tests::{Child, Facts, Mood, Place, settled, unless_skipped};

/// A pattern of numbers that `DUNLIN_SEED` repeats (xorshift).
struct Random(u64);

impl Random {
    fn new() -> Result<Self> {
        let seed: u64 = match std::env::var("DUNLIN_SEED") {
            Ok(seed) => seed.parse()?,
            Err(_) => SystemTime::UNIX_EPOCH.elapsed()?.subsec_nanos().into(),
        };
        println!("DUNLIN_SEED={seed}");
        Ok(Self(seed | 1))
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 1).unwrap_or(0) % end.max(1)
    }
}

/// Dumps `child` with an engine that is killed after `life`, if that is given
/// and it lives so long; says how long it was at work.
fn dump_elsewhere(child: &Child, life: Option<Duration>) -> Result<Duration> {
    let mut command = Command::new(program("worker")?);
    let mut engine =
        command.args(["dump", &child.root().to_string()]).stdout(Stdio::piped()).spawn()?;
    let mut stdout = engine.stdout.take().context("no stdout")?;
    let mut begun = [0];
    stdout.read_exact(&mut begun)?;
    let start = Instant::now();
    if let Some(life) = life {
        // The instant is the test.
        sleep(life);
        engine.kill()?;
    }
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest)?;
    let took = start.elapsed();
    let ended = engine.wait()?;
    ensure!(life.is_some() || ended.success(), "the dump failed: {ended}");
    Ok(took)
}

/// Waits until nothing is different but the memory that a dead engine leaves:
/// the data area of its stub, which the next one takes away.
fn lives_on(child: &Child, before: &Facts) -> Result<()> {
    let start = Instant::now();
    let left = |line: &String| line.contains("/maps/") || line.contains("/Vm");
    loop {
        let harm = child.facts().map(|after| {
            let mut harm = before.differences(&after);
            harm.retain(|line| !left(line));
            harm
        });
        match harm {
            Ok(harm) if harm.is_empty() => return Ok(()),
            _ if start.elapsed() < Duration::from_secs(60) => yield_now(),
            harm => bail!("/proc differs:\n{}", harm?.join("\n")),
        }
    }
}

/// Kills engines at work on `scenario`, then asks it.
fn killed(scenario: &str, mood: Mood, tries: usize) -> Result<()> {
    unless_skipped(|| {
        let mut random = Random::new()?;
        let child = Child::spawn(scenario, Place::Isolated, mood)?;
        let before = child.facts()?;
        let whole = dump_elsewhere(&child, None)?;
        let micros = usize::try_from(whole.as_micros())?;
        for n in 0..tries {
            let life = Duration::from_micros(random.below(micros).try_into()?);
            dump_elsewhere(&child, Some(life))?;
            lives_on(&child, &before)
                .with_context(|| format!("try {n}, killed after {life:?} of {whole:?}"))?;
        }
        // The next engine takes away what those before it left.
        dump_elsewhere(&child, None)?;
        lives_on(&child, &before)?;
        child.verify()
    })
}

#[test]
fn a_killed_engine_leaves_one_process() -> Result<()> {
    killed("counter", Mood::Busy, 50)
}

#[test]
fn a_killed_engine_leaves_threads() -> Result<()> {
    killed("threads_16", Mood::Idle, 50)
}

#[test]
fn a_killed_engine_leaves_a_tree() -> Result<()> {
    killed("tree_sessions", Mood::Busy, 50)
}

#[test]
fn a_killed_engine_leaves_what_plays() -> Result<()> {
    killed("futex_pingpong", Mood::Busy, 50)
}

#[test]
fn a_killed_engine_leaves_interrupted_calls() -> Result<()> {
    // Not `epoll_wait` and `sigtimedwait`: any stop ends them with EINTR, which
    // the kernel says they may return for no reason (signal(7)). The engine mends
    // that, but may be killed between the stop and the mending.
    for call in ["call_futex", "call_read_pipe", "call_accept"] {
        killed(call, Mood::Idle, 10)?;
    }
    Ok(())
}

#[test]
fn a_killed_engine_leaves_timers_and_signals() -> Result<()> {
    for scenario in ["timers_posix", "timers_interval", "signals_pending", "signals_altstack"] {
        killed(scenario, Mood::Idle, 10)?;
    }
    Ok(())
}

#[test]
fn a_full_sink_fails_the_dump_and_not_the_child() -> Result<()> {
    unless_skipped(|| {
        let mut child = Child::spawn("fds_pipes", Place::Isolated, Mood::Busy)?;
        let before = child.facts()?;
        let dumped: Dumped = child.order(&Order::Dump)?;
        for room in 0..dumped.records {
            let error: String = child.order(&Order::DumpIntoFull { room })?;
            ensure!(error.ends_with("no storage space"), "{error}");
            settled(&child, &before).with_context(|| format!("room for {room} records"))?;
        }
        child.verify()
    })
}

fn damaged(scenario: &str) -> Result<()> {
    unless_skipped(|| {
        let mut random = Random::new()?;
        let mut child = Child::spawn(scenario, Place::Isolated, Mood::Idle)?;
        let before = child.facts()?;
        let dumped: Dumped = child.order(&Order::Dump)?;
        let ends = (0..dumped.records).map(Damage::TruncateRecords);
        let cuts: Vec<_> =
            (0..20).map(|_| Damage::TruncateFile(random.below(dumped.file))).collect();
        let flips: Vec<_> =
            (0..40).map(|_| Damage::FlipFile(random.below(dumped.file * 8))).collect();
        for damage in ends.chain(cuts).chain(flips) {
            let error: Option<String> = child.order(&Order::RestoreDamaged(damage))?;
            ensure!(error.is_some(), "{damage:?} went unnoticed");
        }
        // No checksum guards these: whatever they make of it, it must be an
        // error or a tree, and nothing that stays.
        for _ in 0..60 {
            let (record, bit) = (random.below(dumped.records), random.below(1 << 14));
            let damage = Damage::FlipRecord { record, bit };
            let outcome: Option<String> = child
                .order(&Order::RestoreDamaged(damage))
                .with_context(|| format!("{damage:?}"))?;
            println!("{damage:?}: {outcome:?}");
        }
        settled(&child, &before)?;
        child.verify()
    })
}

#[test]
fn a_damaged_image_of_pipes_leaves_nothing() -> Result<()> {
    damaged("fds_pipes")
}

#[test]
fn a_damaged_image_of_threads_leaves_nothing() -> Result<()> {
    damaged("threads_16")
}

#[test]
fn a_damaged_image_of_a_tree_leaves_nothing() -> Result<()> {
    damaged("tree_sessions")
}
