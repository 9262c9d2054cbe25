//! `cargo xtask demo`: a Redis under load moves between two hosts.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dunlin_api::rest::{MigrateRequest, Migration, Phase, TcpPolicy};
use dunlin_tests::{
    bundle::{self, Bundle},
    hosts::Hosts,
    node::{self, Node},
    writer::{self, IMPATIENT, Writer},
};
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

/// The container's id.
pub(crate) const ID: &str = "redis";

/// The container's address, which moves with it.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 71, 0, 100);

/// How long anything that should happen at once may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What came out. Times in milliseconds.
#[derive(Debug, Serialize)]
struct Outcome {
    memory_mib: usize,
    rounds: Vec<Round>,
    acknowledged: usize,
    missing: usize,
    damaged_values: usize,
    reconnects: usize,
}

/// One move.
#[derive(Debug, Serialize)]
pub(crate) struct Round {
    from: String,
    to: String,
    /// Longest time between two acknowledged writes around the switch.
    pub(crate) downtime_ms: f64,
    /// From the first stop request until the destination ran it.
    pub(crate) frozen_ms: f64,
    /// From the request until the destination ran it.
    pub(crate) total_ms: f64,
    /// Bytes of image sent.
    pub(crate) bytes: u64,
}

/// Runs the demo and tells what came out.
pub(crate) fn run(args: &Args) -> Result<()> {
    let told = |text: String| {
        if !args.json {
            println!("{text}");
        }
    };
    let stage = Stage::set()?;
    told("two hosts, a and b, and one for the client are on one switch".to_owned());
    let mut connection = stage.start_redis(args.memory)?;
    told(format!("redis runs on a with {} MiB of data", args.memory));
    let writer = Writer::start(&stage.hosts["client"], ADDRESS, IMPATIENT)?;
    let start = writer.next_acknowledgement(Instant::now(), PATIENCE)?;
    told("the client writes without pause".to_owned());
    let mut rounds = Vec::with_capacity(args.rounds);
    for number in 0..args.rounds {
        let round = stage.move_redis(number, &writer, |event| {
            if !args.json {
                show(event);
            }
        })?;
        told(format!(
            "{} -> {}: the client waited {:.1} ms; frozen {:.1} ms, total {:.1} ms, {:.1} MiB sent",
            round.from,
            round.to,
            round.downtime_ms,
            round.frozen_ms,
            round.total_ms,
            mib(round.bytes),
        ));
        rounds.push(round);
    }
    let writing = start.elapsed();
    let book = writer.stop()?;
    if args.rounds > 0 {
        // The first connection belongs to the container's life on its first host.
        connection = writer::connect(&stage.hosts["client"], ADDRESS, PATIENCE)?;
    }
    let outcome = Outcome {
        memory_mib: args.memory,
        rounds,
        acknowledged: book.acknowledged(),
        missing: book.missing(&mut connection)?.len(),
        damaged_values: writer::damaged(&mut connection, args.memory << 20)?,
        reconnects: book.unanswered(),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
    }
    ensure!(outcome.missing == 0, "{} acknowledged writes are lost", outcome.missing);
    ensure!(outcome.damaged_values == 0, "{} values are damaged", outcome.damaged_values);
    told(format!(
        "all {} writes acknowledged in {:.1} s are there, and all of the {} MiB; \
         the client connected anew {} times",
        outcome.acknowledged,
        writing.as_secs_f64(),
        args.memory,
        outcome.reconnects,
    ));
    Ok(())
}

/// Two nodes and a client's host; dropping it removes all of it.
pub(crate) struct Stage {
    nodes: [Node; 2],
    pub(crate) hosts: Hosts,
}

impl Stage {
    const NAMES: [&str; 2] = ["a", "b"];

    /// Makes the hosts and starts their shims.
    pub(crate) fn set() -> Result<Self> {
        let hosts = Hosts::new(&["a", "b", "client"])?;
        let nodes = [Node::start(&hosts["a"])?, Node::start(&hosts["b"])?];
        Ok(Self { nodes, hosts })
    }

    /// Starts Redis on the first host and fills it; the second has its bundle.
    pub(crate) fn start_redis(&self, mib: usize) -> Result<redis::Connection> {
        for name in Self::NAMES {
            let mut bundle = Bundle::on(&self.hosts[name], ID)?;
            bundle::redis(&mut bundle)?;
            bundle.address(ADDRESS).save()?;
        }
        node::run_container(&self.hosts["a"], ID)?;
        let mut connection = writer::connect(&self.hosts["client"], ADDRESS, PATIENCE)?;
        writer::fill(&mut connection, mib << 20)?;
        Ok(connection)
    }

    /// Moves Redis from where it is after `number` moves to the other host.
    pub(crate) fn move_redis(
        &self,
        number: usize,
        writer: &Writer,
        watch: impl FnMut(&Migration),
    ) -> Result<Round> {
        let (from, to) = (number % 2, (number + 1) % 2);
        let mut request = MigrateRequest::to(self.nodes[to].url());
        request.tcp = TcpPolicy::Close;
        let start = Instant::now();
        let migration = self.nodes[from]
            .migrate(ID, &request, watch)
            .with_context(|| format!("cannot move redis from {}", Self::NAMES[from]))?;
        if let Some(problem) = migration.error {
            return Err(problem).context(format!("redis stays on {}", Self::NAMES[from]));
        }
        let report = migration.report.context("a migration that succeeded has a report")?;
        writer.next_acknowledgement(Instant::now(), PATIENCE)?;
        Ok(Round {
            from: Self::NAMES[from].to_owned(),
            to: Self::NAMES[to].to_owned(),
            downtime_ms: writer.seen(start).gap.as_secs_f64() * 1e3,
            frozen_ms: ms(report.downtime_us),
            total_ms: ms(report.total_us),
            bytes: report.bytes,
        })
    }
}

/// One line for each phase, and one for each quarter of what is copied.
fn show(event: &Migration) {
    let progress = &event.progress;
    match progress.phase {
        Phase::Copying | Phase::Frozen => println!(
            "  {:?}: {:.1} of {:.1} MiB",
            progress.phase,
            mib(progress.bytes),
            mib(progress.total)
        ),
        phase => println!("  {phase:?}"),
    }
}

fn ms(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64() * 1e3
}

fn mib(bytes: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "four digits are shown")]
    let bytes = bytes as f64;
    bytes / f64::from(1 << 20)
}
