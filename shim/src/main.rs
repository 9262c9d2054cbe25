//! `dunlin-shim`: the daemon of one node.

mod config;
mod containers;
mod daemon;
mod drain;
mod host;
mod http;
mod incoming;
mod journal;
mod listen;
mod metrics;
mod migrations;
mod outgoing;
mod pki;
mod process;
mod reaper;
mod runtime;
mod spool;
mod tls;
mod verdict;
mod worker;

use std::{io, process::ExitCode};

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Moves running containers between this node and others.
#[derive(Debug, Parser)]
#[command(name = "dunlin-shim", version, subcommand_negates_reqs = true)]
struct Cli {
    #[command(flatten)]
    config: config::Config,
    /// Log lines as JSON
    #[arg(long)]
    log_json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes certificates for nodes
    #[command(subcommand)]
    Pki(pki::Pki),
    /// The source of one migration; started by the daemon
    #[command(hide = true)]
    SourceWorker,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("DUNLIN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(filter);
    if cli.log_json {
        log.json().init();
    } else {
        log.with_ansi(false).init();
    }
    let done = match cli.command {
        Some(Command::SourceWorker) => worker::source::run().map_err(Into::into),
        Some(Command::Pki(command)) => pki::run(&command),
        None => serve(cli.config),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            tracing::error!("{err:#}");
            ExitCode::FAILURE
        }
    }
}

/// The daemon runs no engine, so a few threads serve any number of requests.
fn serve(config: config::Config) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(daemon::run(config))
}
