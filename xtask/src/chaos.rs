//! `cargo xtask chaos`: things fail at random, and one copy counts on.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use dunlin_tests::chaos::Chaos;

use crate::{FAULTS, setup};

/// How long and how.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// For at least so many seconds [default: 60, unless rounds are given].
    #[arg(long)]
    seconds: Option<u64>,
    /// For at least so many rounds.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Repeats a run; otherwise the time.
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs it and tells what became of each round.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::install(&[setup::BUILD, setup::DEMO, setup::TEST])?;
    setup::run(setup::cargo().args(["build", "--workspace", "--bins"]).args(FAULTS))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let seconds = args.seconds.unwrap_or(if args.rounds == 1 { 60 } else { 0 });
    let mut chaos = Chaos::new(args.seed.unwrap_or(now))?;
    chaos.run(args.rounds, Duration::from_secs(seconds), |round| println!("{round}"))?;
    println!("{chaos}");
    Ok(())
}
