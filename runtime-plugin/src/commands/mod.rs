//! The commands, one file for each or for a few that belong together.
//!
//! Each returns the exit code. stdout belongs to the caller.

pub(crate) mod checkpoint;
pub(crate) mod completion;
pub(crate) mod create;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod features;
pub(crate) mod info;
pub(crate) mod kill;
pub(crate) mod pause;
pub(crate) mod ps;
pub(crate) mod restore;
pub(crate) mod spec;
pub(crate) mod state;
pub(crate) mod update;

use std::io::{self, Write};

use anyhow::{Context, Result};
use serde::Serialize;

/// Prints one line to the caller.
pub(crate) fn print(line: &str) -> Result<()> {
    writeln!(io::stdout(), "{line}").context("cannot write to stdout")
}

/// Prints a value as indented JSON to the caller.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}
