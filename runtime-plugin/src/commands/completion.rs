//! `completion`: a script that completes our command line in a shell.

use std::io;

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};

use crate::cli::Cli;

/// Prints a completion script for a shell
#[derive(Debug, Args)]
pub(crate) struct Completion {
    /// Shell to write for.
    #[arg(short, long, value_enum)]
    shell: Shell,
}

/// Prints it.
pub(crate) fn completion(args: &Completion) -> Result<u8> {
    generate(args.shell, &mut Cli::command(), "dunlin", &mut io::stdout());
    Ok(0)
}
