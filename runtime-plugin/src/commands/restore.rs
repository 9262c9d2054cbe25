//! `restore`: a container goes on from an image in a directory.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use dunlin_checkpoint::image::FileSource;
use dunlin_checkpoint::{RestoreReport, TcpPolicy};
use libcontainer::container::Container;
use nix::sys::prctl;
use oci_spec::runtime::Spec;

use super::kill;
use crate::cli::Cli;
use crate::console::{Console, Terminal};
use crate::container::Root;
use crate::create::Creation;
use crate::foreground::Signals;
use crate::log::Afterwards;
use crate::manifest::Manifest;
use crate::program::Program;
use crate::sandbox::Sandbox;
use crate::spec;
use crate::worklog::WorkLog;

/// Continues a container from a checkpoint
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// Directory with the image.
    #[arg(long, default_value = "checkpoint")]
    image_path: PathBuf,
    /// Directory for restore.log; the image's own when not given.
    #[arg(long)]
    work_path: Option<PathBuf>,
    /// Directory with config.json and the root filesystem.
    #[arg(short, long, default_value = ".")]
    bundle: PathBuf,
    /// Returns as soon as the container runs.
    #[arg(short, long)]
    detach: bool,
    /// File for the pid of init.
    #[arg(long)]
    pid_file: Option<PathBuf>,
    /// Unix socket that receives the container's terminal.
    #[arg(long)]
    console_socket: Option<PathBuf>,
    /// Uses chroot instead of pivot_root.
    #[arg(long)]
    no_pivot: bool,
    /// Leaves orphans of the container to the host's init.
    #[arg(long)]
    no_subreaper: bool,
    /// Taken and not needed: the image says which connections it keeps.
    #[arg(long)]
    tcp_established: bool,
    /// Closes TCP connections; only for an image that does not keep them.
    #[arg(long)]
    tcp_close: bool,
    /// Taken and not needed: the image says so.
    #[arg(long)]
    ext_unix_sk: bool,
    /// Taken and not needed: the image says so.
    #[arg(long)]
    shell_job: bool,
    /// Taken and not needed: the image says so.
    #[arg(long)]
    file_locks: bool,
    /// Not supported: pages are served by a migration, not by an image.
    #[arg(long)]
    lazy_pages: bool,
    /// Namespaces whose inside is not restored; the network's never is.
    #[arg(long)]
    empty_ns: Vec<String>,
    /// Taken and not needed: an image has no parent.
    #[arg(long)]
    auto_dedup: bool,
    /// Taken and not needed: cgroups come from the bundle.
    #[arg(long, default_value = "soft", value_parser = ["ignore", "full", "strict", "soft"])]
    manage_cgroups_mode: String,
    /// Not supported: the profile comes from the bundle.
    #[arg(long)]
    lsm_profile: Option<String>,
    /// Not supported: dunlin has no SELinux.
    #[arg(long)]
    lsm_mount_context: Option<String>,
    /// Id of the new container.
    container_id: String,
}

impl Restore {
    fn judge(&self) -> Result<()> {
        for (flag, given) in [
            ("--lazy-pages", self.lazy_pages),
            ("--lsm-profile", self.lsm_profile.as_ref().is_some_and(|value| !value.is_empty())),
            (
                "--lsm-mount-context",
                self.lsm_mount_context.as_ref().is_some_and(|value| !value.is_empty()),
            ),
        ] {
            if given {
                bail!("{flag} is not supported");
            }
        }
        if let Some(namespace) = self.empty_ns.iter().find(|name| *name != "network") {
            bail!("--empty-ns {namespace} is not supported");
        }
        Ok(())
    }
}

/// Restores a container and, unless detached, stays until it ends.
pub(crate) fn restore(root: &Root, cli: &Cli, args: &Restore) -> Result<u8> {
    if !args.detach && !args.no_subreaper {
        // Without a pid namespace of its own its orphans come to us.
        prctl::set_child_subreaper(true).context("cannot become a subreaper")?;
    }
    let id = &args.container_id;
    let systemd = cli.global.systemd_cgroup;
    let restored = spec::load(&args.bundle, root, id, systemd).and_then(|spec| {
        let work = args.work_path.as_deref();
        let annotations = spec.annotations().as_ref();
        let log = WorkLog::new(work, &args.image_path, "restore.log", annotations)?;
        let restored = build(root, systemd, args, spec);
        log.write(id, restored.as_ref().map(|restored| &restored.report));
        restored
    });
    let Restored { container, terminal, signals, .. } = restored
        .with_context(|| format!("cannot restore {id}"))
        .afterwards(|| "nothing was created; the image is as before".into())?;
    let Some(signals) = signals else { return Ok(0) };
    let init = container.pid().context("the container has no init")?;
    let code = signals.pass_to(init, terminal);
    kill::remove(root.load(id)?, true)?;
    code
}

/// A container that runs again.
struct Restored {
    container: Container,
    /// Its terminal, when that is ours to serve.
    terminal: Option<Terminal>,
    /// What we hold back for it, unless it is left alone.
    signals: Option<Signals>,
    report: RestoreReport,
}

fn build(root: &Root, systemd: bool, args: &Restore, spec: Spec) -> Result<Restored> {
    args.judge()?;
    let image = args.image_path.display();
    let manifest = Manifest::load(&args.image_path)?;
    if manifest.pre_dump {
        bail!("{image} holds a pre-dump, which has no image");
    }
    if args.tcp_close && manifest.options.tcp == TcpPolicy::Keep {
        bail!("--tcp-close: the image keeps its connections; checkpoint with --tcp-close instead");
    }
    let mut source = FileSource::open(&args.image_path)
        .with_context(|| format!("cannot read the image in {image}"))?;
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
        preserve_fds: 0,
        no_pivot: args.no_pivot,
        systemd,
        executor: Box::new(Program),
        muted: true,
    };
    let mut sandbox =
        Sandbox::make(creation, manifest.clocks).context("cannot make the sandbox")?;
    let terminal = console.map(Console::accept).transpose()?;
    let place = dunlin_checkpoint::Sandbox { init: sandbox.init(), stdio: sandbox.stdio()? };
    let nascent = dunlin_checkpoint::restore(place, &mut source)?;
    let report = nascent.report().clone();
    let signals = (!args.detach).then(Signals::hold).transpose()?;
    sandbox.unmute()?;
    nascent.thaw()?;
    Ok(Restored { container: sandbox.commit()?, terminal, signals, report })
}
