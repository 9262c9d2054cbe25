//! `cargo xtask demo`: a Redis under load moves between two hosts.

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use dunlin_tests::stage::{Move, Stage};
use serde::Serialize;

/// How the demo goes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How often the container moves: to the other host and back in turn.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// MiB of data in Redis.
    #[arg(long, default_value_t = 256)]
    memory: usize,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// What came out.
#[derive(Debug, Serialize)]
struct Outcome {
    memory_mib: usize,
    rounds: Vec<Round>,
    acknowledged: usize,
    missing: usize,
    damaged_values: usize,
    reconnects: usize,
}

/// One move; times in milliseconds.
#[derive(Debug, Serialize)]
struct Round {
    from: &'static str,
    to: &'static str,
    /// Longest time between two acknowledged writes around the switch.
    downtime_ms: f64,
    /// From the first stop request until the destination ran it.
    frozen_ms: f64,
    /// From the request until the destination ran it.
    total_ms: f64,
    /// Bytes of image sent.
    bytes: u64,
}

impl Round {
    fn of(moved: &Move) -> Self {
        Self {
            from: moved.from,
            to: moved.to,
            downtime_ms: ms(moved.downtime),
            frozen_ms: ms(moved.frozen),
            total_ms: ms(moved.total),
            bytes: moved.bytes,
        }
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, downtime_ms, frozen_ms, total_ms, bytes } = self;
        let sent = mib(*bytes);
        write!(f, "{from} -> {to}: the client waited {downtime_ms:.1} ms; ")?;
        write!(f, "frozen {frozen_ms:.1} ms, total {total_ms:.1} ms, {sent:.1} MiB sent")
    }
}

/// Runs the demo and tells what came out.
pub(crate) fn run(args: &Args) -> Result<()> {
    let told = |text: &str| {
        if !args.json {
            println!("{text}");
        }
    };
    let stage = Stage::set()?;
    told("hosts a and b and a client's host are on one switch");
    stage.start_redis(args.memory)?;
    told(&format!("redis runs on a with {} MiB of data", args.memory));
    let writer = stage.start_writer()?;
    let start = Instant::now();
    told("the client writes without pause");
    let mut rounds = Vec::with_capacity(args.rounds);
    for number in 0..args.rounds {
        let mut last = None;
        let moved = stage.move_redis(number, &writer, |event| {
            if last.replace(event.progress.phase) != Some(event.progress.phase) {
                told(&format!("  {:?}", event.progress.phase).to_lowercase());
            }
        })?;
        let round = Round::of(&moved);
        told(&round.to_string());
        rounds.push(round);
    }
    let writing = start.elapsed();
    let book = writer.stop()?;
    let (missing, damaged_values) = stage.losses(&book, args.memory)?;
    let outcome = Outcome {
        memory_mib: args.memory,
        rounds,
        acknowledged: book.acknowledged(),
        missing,
        damaged_values,
        reconnects: book.unanswered(),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
    }
    ensure!(missing == 0, "{missing} acknowledged writes are lost");
    ensure!(damaged_values == 0, "{damaged_values} values are damaged");
    told(&format!(
        "all {} writes acknowledged in {:.1} s are there, and all of the {} MiB; \
         the client connected anew {} times",
        outcome.acknowledged,
        writing.as_secs_f64(),
        args.memory,
        outcome.reconnects,
    ));
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn mib(bytes: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "four digits are shown")]
    let bytes = bytes as f64;
    bytes / f64::from(1 << 20)
}
