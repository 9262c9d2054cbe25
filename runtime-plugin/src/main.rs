//! `dunlin`: an OCI runtime whose containers move between hosts.
//!
//! Takes the command line of youki and runc. Everything that enters a
//! container happens in this short-lived, single-threaded process.

mod cli;
mod client;
mod clocks;
mod commands;
mod console;
mod container;
mod create;
mod described;
mod foreground;
mod hook;
mod log;
mod manifest;
mod network;
mod program;
mod receive;
mod sandbox;
mod spec;
mod worklog;

use std::env;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use liboci_cli::{CommonCmd, StandardCmd};

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = match cli::parse(env::args_os()) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    if let Err(err) = log::init(&cli.global, cli.log_level.as_deref()) {
        return log::report(&cli.global, &err, 1);
    }
    match run(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(err) => log::report(&cli.global, &err, cli.failure_code()),
    }
}

fn run(cli: &Cli) -> Result<u8> {
    if cli.systemd_log {
        bail!("--systemd-log is not supported");
    }
    let Some(command) = &cli.command else {
        return commands::info::version();
    };
    if command.enters_container() {
        // A container that can open our executable could overwrite it on the
        // host (CVE-2019-5736): what enters one runs from a sealed copy.
        pentacle::ensure_sealed().context("cannot seal the executable")?;
    }
    let root = container::Root::find(cli.global.root.as_deref())?;
    match command {
        Command::Standard(command) => match command.as_ref() {
            StandardCmd::Create(args) => commands::create::create(&root, cli, args),
            StandardCmd::Start(args) => commands::create::start(&root, args),
            StandardCmd::State(args) => commands::state::state(&root, args),
            StandardCmd::Kill(args) => commands::kill::kill(&root, args),
            StandardCmd::Delete(args) => commands::kill::delete(&root, args),
        },
        Command::Common(command) => match command.as_ref() {
            CommonCmd::Checkpointt(_) => {
                bail!("checkpointt is not a command of dunlin; it is spelt checkpoint")
            }
            CommonCmd::Events(args) => commands::events::events(&root, args),
            CommonCmd::Exec(args) => commands::exec::exec(&root, args),
            CommonCmd::Features(_) => commands::features::features(),
            CommonCmd::List(args) => commands::state::list(&root, args),
            CommonCmd::Pause(args) => commands::pause::pause(&root, args),
            CommonCmd::Ps(args) => commands::ps::ps(&root, args),
            CommonCmd::Resume(args) => commands::pause::resume(&root, args),
            CommonCmd::Run(args) => commands::create::run(&root, cli, args),
            CommonCmd::Update(args) => commands::update::update(&root, args),
            CommonCmd::Spec(args) => commands::spec::spec(args),
        },
        Command::Checkpoint(args) => commands::checkpoint::checkpoint(&root, args),
        Command::Restore(args) => commands::restore::restore(&root, cli, args),
        Command::Receive(args) => receive::receive(&root, cli, args),
        Command::Hook(args) => Ok(hook::hook(args)),
        Command::User(command) => client::run(command),
        Command::Info => commands::info::info(),
        Command::Completion(args) => commands::completion::completion(args),
    }
}
