//! The command line: youki's, parsed by `liboci-cli`, and our own commands.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{ContextKind, ErrorKind};
use clap::{CommandFactory, Parser, Subcommand};
use liboci_cli::{CommonCmd, GlobalOpts, StandardCmd};

use crate::client::UserCommand;
use crate::commands::checkpoint::Checkpoint;
use crate::commands::completion::Completion;
use crate::commands::restore::Restore;
use crate::hook::Hook;
use crate::receive::Receive;

/// Runs OCI containers and moves them between hosts.
#[derive(Debug, Parser)]
#[command(name = "dunlin", disable_version_flag = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: GlobalOpts,
    /// Lowest level of log lines: error, warn, info, debug or trace.
    #[arg(long)]
    pub(crate) log_level: Option<String>,
    /// Not supported: a service manager takes stderr to the journal.
    #[arg(long)]
    pub(crate) systemd_log: bool,
    /// Prints the version.
    #[arg(short, long)]
    pub(crate) version: bool,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Standard(Box<StandardCmd>),
    #[command(flatten)]
    Common(Box<CommonCmd>),
    Checkpoint(Box<Checkpoint>),
    Restore(Box<Restore>),
    Receive(Box<Receive>),
    Hook(Hook),
    #[command(flatten)]
    User(UserCommand),
    /// Shows what this host offers to containers
    Info,
    Completion(Completion),
}

impl Command {
    /// Whether it starts a process inside a container.
    pub(crate) fn enters_container(&self) -> bool {
        match self {
            Self::Standard(command) => matches!(**command, StandardCmd::Create(_)),
            Self::Common(command) => matches!(**command, CommonCmd::Run(_) | CommonCmd::Exec(_)),
            Self::Restore(_) | Self::Receive(_) => true,
            Self::Checkpoint(_)
            | Self::Hook(_)
            | Self::User(_)
            | Self::Info
            | Self::Completion(_) => false,
        }
    }
}

impl Cli {
    /// Exit code of a failure: `exec` keeps 1 for the program it runs, as runc.
    pub(crate) fn failure_code(&self) -> u8 {
        match &self.command {
            Some(Command::Common(command)) if matches!(**command, CommonCmd::Exec(_)) => 255,
            _ => 1,
        }
    }
}

/// Parses the arguments; on failure or `--help` says so and gives the exit code.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, ExitCode> {
    let cli = Cli::try_parse_from(long_flags(args)).map_err(|err| usage(&err))?;
    if cli.command.is_none() && !cli.version {
        usage(&Cli::command().error(ErrorKind::MissingSubcommand, "a command is required"));
        return Err(ExitCode::FAILURE);
    }
    Ok(cli)
}

/// Gives long flags that were written with one dash their second one.
///
/// The flag parser of Go takes both, and containerd sends `-no-subreaper`.
/// Only names that the command knows are touched, and nothing behind its first
/// operand.
fn long_flags(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let top = Cli::command();
    let mut args: Vec<OsString> = args.into_iter().collect();
    let found = args.iter().enumerate().skip(1).find_map(|(at, arg)| {
        let command = top.find_subcommand(arg.to_str()?)?;
        matches!(command.get_name(), "checkpoint" | "restore").then_some((at, command))
    });
    if let Some((at, command)) = found {
        for arg in &mut args[at + 1..] {
            let Some(name) = arg.to_str().and_then(|text| text.strip_prefix('-')) else { continue };
            let name = name.split('=').next().unwrap_or(name);
            if command.get_arguments().any(|known| known.get_long() == Some(name)) {
                let mut long = OsString::from("-");
                long.push(&*arg);
                *arg = long;
            }
        }
    }
    args
}

/// Prints what clap has to say and gives the exit code.
fn usage(err: &clap::Error) -> ExitCode {
    if err.kind() == ErrorKind::InvalidValue && err.get(ContextKind::InvalidValue).is_some() {
        // podman looks for runc's words to learn that a flag is known.
        let given = err.get(ContextKind::InvalidValue).map(ToString::to_string);
        let flag = err.get(ContextKind::InvalidArg).map(ToString::to_string);
        if let (Some(""), Some(flag)) = (given.as_deref(), flag)
            && flag.starts_with("--")
        {
            crate::log::say(&format!("error: flag needs an argument: {flag}"));
            return ExitCode::FAILURE;
        }
    }
    if let Err(err) = err.print() {
        tracing::warn!(%err, "cannot print the usage");
    }
    if err.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(args: &[&str]) -> Vec<OsString> {
        args.iter().map(OsString::from).collect()
    }

    #[test]
    fn containerd_may_write_one_dash() {
        let given = strings(&["dunlin", "--root", "r", "restore", "-no-subreaper", "-d", "id"]);
        let meant = strings(&["dunlin", "--root", "r", "restore", "--no-subreaper", "-d", "id"]);
        assert_eq!(long_flags(given), meant);
        let other = strings(&["dunlin", "exec", "id", "-no-subreaper"]);
        assert_eq!(long_flags(other.clone()), other);
    }

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }
}
