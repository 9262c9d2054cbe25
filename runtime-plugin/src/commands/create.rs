//! `create`, `start` and `run`.

use std::path::Path;

use anyhow::{Context, Result};
use libcontainer::container::{Container, ContainerStatus};
use liboci_cli::{Create, Run, Start};
use nix::sys::prctl;
use oci_spec::runtime::Spec;

use super::kill;
use crate::cli::Cli;
use crate::console::Console;
use crate::container::Root;
use crate::create::{Created, Creation};
use crate::foreground::Signals;
use crate::log::Afterwards;
use crate::program::Program;
use crate::spec;

/// Makes a container that waits to be started.
pub(crate) fn create(root: &Root, cli: &Cli, args: &Create) -> Result<u8> {
    let made = load(root, cli, &args.container_id, &args.bundle).and_then(|spec| {
        Creation {
            root,
            id: &args.container_id,
            bundle: &args.bundle,
            spec,
            pid_file: args.pid_file.as_deref(),
            console_socket: args.console_socket.as_deref(),
            preserve_fds: args.preserve_fds,
            no_pivot: args.no_pivot,
            systemd: cli.global.systemd_cgroup,
            executor: Box::new(Program),
            muted: false,
        }
        .create()
    });
    made.with_context(|| format!("cannot create {}", args.container_id))
        .afterwards(|| "nothing was created".into())?;
    Ok(0)
}

/// Runs the program of a created container.
pub(crate) fn start(root: &Root, args: &Start) -> Result<u8> {
    let mut container = root.load(&args.container_id)?;
    start_program(&mut container)?;
    Ok(0)
}

/// Creates and starts a container and, unless detached, stays until it ends.
pub(crate) fn run(root: &Root, cli: &Cli, args: &Run) -> Result<u8> {
    if !args.detach && !args.no_subreaper {
        // Without a pid namespace of its own its orphans come to us.
        prctl::set_child_subreaper(true).context("cannot become a subreaper")?;
    }
    let made = load(root, cli, &args.container_id, &args.bundle).and_then(|spec| {
        let given = args.console_socket.as_deref();
        let console = Console::if_needed(root, spec::process(&spec)?, args.detach, given)?;
        let own = console.as_ref().map(Console::path);
        let creation = Creation {
            root,
            id: &args.container_id,
            bundle: &args.bundle,
            spec,
            pid_file: args.pid_file.as_deref(),
            console_socket: own.as_deref().or(given),
            preserve_fds: args.preserve_fds,
            no_pivot: args.no_pivot,
            systemd: cli.global.systemd_cgroup,
            executor: Box::new(Program),
            muted: false,
        };
        Ok((creation.create()?, console))
    });
    let (Created { mut container, .. }, console) = made
        .with_context(|| format!("cannot create {}", args.container_id))
        .afterwards(|| "nothing was created".into())?;
    let init = container.pid().context("the container has no init")?;
    let started = || -> Result<_> {
        let terminal = console.map(Console::accept).transpose()?;
        let signals = (!args.detach).then(Signals::hold).transpose()?;
        start_program(&mut container)?;
        Ok(signals.map(|signals| (signals, terminal)))
    };
    let code = match started() {
        Ok(None) => return Ok(0),
        Ok(Some((signals, terminal))) => signals.pass_to(init, terminal),
        Err(err) => {
            kill::remove(container, true)?;
            return Err(err);
        }
    };
    if !args.keep {
        kill::remove(root.load(&args.container_id)?, true)?;
    }
    code
}

fn load(root: &Root, cli: &Cli, id: &str, bundle: &Path) -> Result<Spec> {
    spec::load(bundle, root, id, cli.global.systemd_cgroup)
}

fn start_program(container: &mut Container) -> Result<()> {
    let id = container.id().to_owned();
    if container.status() != ContainerStatus::Created {
        let status = container.status().to_string().to_lowercase();
        anyhow::bail!("cannot start {id}: it is {status}, not created");
    }
    container.start().with_context(|| format!("cannot start {id}"))
}
