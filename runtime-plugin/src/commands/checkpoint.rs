//! `checkpoint`: a running container becomes an image in a directory.
//!
//! The flags are runc's. One that asks for what this engine does anyway or has
//! no need of is taken; one that would change what the caller gets is refused.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use dunlin_checkpoint::image::FileSink;
use dunlin_checkpoint::{DumpReport, Options, TcpPolicy, freeze, inspect};
use libcontainer::container::{Container, ContainerStatus};
use nix::unistd::Pid;

use super::kill;
use crate::clocks::Clocks;
use crate::container::Root;
use crate::described;
use crate::log::Afterwards;
use crate::manifest::Manifest;
use crate::worklog::WorkLog;

/// Writes the state of a running container to a directory
#[derive(Debug, Args)]
pub(crate) struct Checkpoint {
    /// Directory for the image.
    #[arg(long, default_value = "checkpoint")]
    image_path: PathBuf,
    /// Directory for dump.log; the image's own when not given.
    #[arg(long)]
    work_path: Option<PathBuf>,
    /// Directory of an earlier pre-dump, relative to the image. An image is
    /// always whole, so it only has to exist.
    #[arg(long)]
    parent_path: Option<PathBuf>,
    /// Lets the container run on.
    #[arg(long)]
    leave_running: bool,
    /// Keeps established TCP connections.
    #[arg(long)]
    tcp_established: bool,
    /// Closes established TCP connections.
    #[arg(long, conflicts_with = "tcp_established")]
    tcp_close: bool,
    /// Drops TCP connections that nobody has accepted yet.
    #[arg(long)]
    tcp_skip_in_flight: bool,
    /// Taken and not needed: unlinked files travel in the image.
    #[arg(long)]
    link_remap: bool,
    /// Lets unix sockets that lead out of the container be closed.
    #[arg(long)]
    ext_unix_sk: bool,
    /// Lets the container have a terminal that belongs to somebody outside.
    #[arg(long)]
    shell_job: bool,
    /// Carries file locks.
    #[arg(long)]
    file_locks: bool,
    /// Only judges whether the container can move; it runs on.
    #[arg(long)]
    pre_dump: bool,
    /// Not supported: pages are served by a migration, not by an image.
    #[arg(long)]
    lazy_pages: bool,
    /// Taken and not needed without --lazy-pages.
    #[arg(long)]
    status_fd: Option<i32>,
    /// Not supported: a migration sends pages to another host.
    #[arg(long)]
    page_server: Option<String>,
    /// Namespaces whose inside is not saved; the network's never is.
    #[arg(long)]
    empty_ns: Vec<String>,
    /// Taken and not needed: an image has no parent.
    #[arg(long)]
    auto_dedup: bool,
    /// Taken and not needed: cgroups come from the bundle.
    #[arg(long, default_value = "soft", value_parser = ["ignore", "full", "strict", "soft"])]
    manage_cgroups_mode: String,
    /// Container to checkpoint.
    container_id: String,
}

impl Checkpoint {
    fn options(&self) -> Options {
        let tcp = match (self.tcp_established, self.tcp_close) {
            (true, _) => TcpPolicy::Keep,
            (_, true) => TcpPolicy::Close,
            _ => TcpPolicy::Refuse,
        };
        Options {
            tcp,
            file_locks: self.file_locks,
            external_unix: self.ext_unix_sk,
            shell_job: self.shell_job,
            skip_in_flight: self.tcp_skip_in_flight,
        }
    }

    fn judge(&self) -> Result<()> {
        if self.lazy_pages {
            bail!("--lazy-pages is not supported: dunlin migrate moves memory after the switch");
        }
        if self.page_server.is_some() {
            bail!("--page-server is not supported: dunlin migrate sends memory to another host");
        }
        if let Some(namespace) = self.empty_ns.iter().find(|name| *name != "network") {
            bail!("--empty-ns {namespace} is not supported");
        }
        if let Some(parent) = &self.parent_path {
            let parent = self.image_path.join(parent);
            if !parent.is_dir() {
                bail!("--parent-path {} is not a directory", parent.display());
            }
        }
        Ok(())
    }
}

/// Dumps a container and, unless told otherwise, ends and deletes it.
pub(crate) fn checkpoint(root: &Root, args: &Checkpoint) -> Result<u8> {
    let id = &args.container_id;
    let container = root.load(id)?;
    let as_before = match container.status() {
        ContainerStatus::Running => format!("{id} is running; no image was written"),
        status => format!("{id} is {} as before", status.to_string().to_lowercase()),
    };
    let work = args.work_path.as_deref();
    let annotations = container.state.annotations.as_ref();
    let report = WorkLog::new(work, &args.image_path, "dump.log", annotations)
        .and_then(|log| {
            let done = args.judge().and_then(|()| dump(&container, args));
            log.write(id, done.as_ref());
            done
        })
        .with_context(|| format!("cannot checkpoint {id}"))
        .afterwards(|| as_before)?;
    tracing::info!(%id, ?report, "checkpoint written");
    if !args.leave_running && !args.pre_dump {
        kill::await_reaped(&container);
        kill::remove(container, true)
            .afterwards(|| format!("{id} has ended and its image is complete"))?;
    }
    Ok(0)
}

/// Writes the image; afterwards the tree runs on or is ended.
fn dump(container: &Container, args: &Checkpoint) -> Result<DumpReport> {
    match container.status() {
        ContainerStatus::Running => {}
        ContainerStatus::Paused => bail!("it is paused; resume it first"),
        status => bail!("it is {}, not running", status.to_string().to_lowercase()),
    }
    let init = container.pid().context("the container has no init")?;
    let options = args.options();
    let mut manifest = Manifest::new(container.id(), init, &options);
    if args.pre_dump {
        return rehearse(init, &mut manifest, &args.image_path);
    }
    let mut frozen = freeze(init, &options)?;
    manifest.clocks = Some(Clocks::of(init)?);
    let cannot_write = || format!("cannot write to {}", args.image_path.display());
    let mut sink = FileSink::create(&args.image_path).with_context(cannot_write)?;
    let report = frozen.dump(&mut sink)?;
    manifest.save(&args.image_path)?;
    let with_properties = args.manage_cgroups_mode != "ignore";
    described::save(container, &args.image_path, with_properties)
        .context("cannot describe the image")?;
    sink.finish().with_context(cannot_write)?;
    if let Some(parent) = &args.parent_path {
        link_parent(parent, &args.image_path).with_context(cannot_write)?;
    }
    if args.leave_running {
        frozen.thaw()?;
    } else {
        frozen.kill()?;
    }
    Ok(report)
}

/// Leaves the link that CRIU leaves, for those who follow it.
fn link_parent(parent: &Path, dir: &Path) -> io::Result<()> {
    match symlink(parent, dir.join("parent")) {
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Judges the tree without stopping it, as the first half of a dump in two
/// steps: the second one writes everything.
fn rehearse(init: Pid, manifest: &mut Manifest, dir: &Path) -> Result<DumpReport> {
    let verdict = inspect(init, &manifest.options)?;
    if !verdict.is_movable() {
        let reasons = verdict.findings.iter().map(|f| format!("{} {}", f.object, f.reason));
        bail!("{}", reasons.collect::<Vec<_>>().join("; "));
    }
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    manifest.pre_dump = true;
    manifest.save(dir)?;
    Ok(DumpReport::default())
}
