//! The project's own commands: `cargo xtask lint | test | demo | bench | chaos`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program")]

mod bench;
mod chaos;
mod demo;
mod deny;
mod lint;
mod setup;
mod test;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;

/// Commands of the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Checks format, lints, licences and the shape of the source tree.
    Lint,
    /// Moves a Redis under load between two hosts made for the purpose.
    Demo(demo::Args),
    /// Lets things fail at random while a container is handed over.
    Chaos(chaos::Args),
    /// Measures.
    Bench(bench::Args),
    /// Installs what the tests need and runs all of them.
    Test(test::Args),
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Bench(args) => setup::for_speed().and_then(|()| bench::run(&args)),
        Command::Chaos(args) => chaos::run(&args),
        Command::Demo(args) => setup::for_speed().and_then(|()| demo::run(&args)),
        Command::Lint => lint::run(),
        Command::Test(args) => test::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("{err:#}");
            ExitCode::FAILURE
        }
    }
}

/// With these the tests let our programs fail at named points.
const FAULTS: [&str; 2] = [
    "--features",
    "dunlin-shim/fault-injection,dunlin-runtime-plugin/fault-injection,dunlin-tests/fault-injection",
];

/// The top of the source tree.
fn root() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}
