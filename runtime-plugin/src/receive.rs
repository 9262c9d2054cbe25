//! The destination of one migration: a container goes on from another node.
//!
//! Started by the node's shim, which has greeted the source and admitted the
//! container. The sandbox is made while the source still runs; nothing of the
//! tree runs before the source has given it up. Whatever fails before that
//! removes everything again.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use dunlin_api::fault::point;
use dunlin_api::rest::{ContainerId, DestinationState, Phase};
use dunlin_api::wire::{Arrived, Committed, DestinationLink, Limits, LinkError, Offer, Sums};
use dunlin_api::worker::{Event, Reply};
use dunlin_api::{ErrorCode, Problem};
use dunlin_checkpoint::image::{self, ImageSource};
use dunlin_checkpoint::{Nascent, RestoreError};
use rustix::io::fcntl_dupfd_cloexec;

use crate::cli::Cli;
use crate::clocks::Clocks;
use crate::container::Root;
use crate::create::Creation;
use crate::program::Program;
use crate::sandbox::Sandbox;
use crate::spec;

/// Least time between two reports of progress.
const PROGRESS: Duration = Duration::from_millis(100);

/// Takes a container from another node
#[derive(Debug, Args)]
#[command(hide = true)]
pub(crate) struct Receive {
    /// The source's stream.
    #[arg(long)]
    stream_fd: i32,
    /// Socket of the shim that started this.
    #[arg(long)]
    events_fd: i32,
    /// Directory with config.json and the root filesystem.
    #[arg(long)]
    bundle: PathBuf,
    /// File that takes what the container writes to stdout and stderr.
    #[arg(long)]
    output: PathBuf,
    /// Longest silence of the source in milliseconds.
    #[arg(long, default_value_t = 2000)]
    silence_ms: u64,
    /// Id of the new container.
    container_id: ContainerId,
}

/// Receives the container, or says why not and leaves nothing behind.
pub(crate) fn receive(root: &Root, cli: &Cli, args: &Receive) -> Result<u8> {
    // Above 2 and not inherited: those become the container's.
    let stream = UnixStream::from(inherited(args.stream_fd)?);
    let mut shim = Shim::new(UnixStream::from(inherited(args.events_fd)?))?;
    become_output(&args.output)?;
    let offer = shim.offer()?;
    let limits = Limits { silence: Duration::from_millis(args.silence_ms), ..Limits::default() };
    let mut link = DestinationLink::resume(stream, limits, &offer, image::VERSION)?;
    match build(root, cli, args, &offer, &mut link, &mut shim) {
        Ok((sandbox, committed, arrived)) => {
            let answer = || {
                if let Err(err) = link.running(committed, arrived) {
                    tracing::warn!(%err, "the source does not hear that it runs here; it asks");
                }
            };
            let settle = || {
                // It runs: what is left undone here is said and undoes nothing.
                if let Err(err) = sandbox.commit() {
                    tracing::error!("{err:#}");
                }
            };
            if shim.tell(&Event::Destination(DestinationState::Running)) {
                answer();
                settle();
            } else {
                // A shim that is gone will ask the runtime, which must know it
                // before the source ends the original.
                settle();
                answer();
            }
            Ok(0)
        }
        Err(problem) => {
            tracing::error!(%problem, "container not received");
            shim.tell(&Event::Failed(problem.clone()));
            link.fail(problem);
            Ok(1)
        }
    }
}

/// Builds the tree and wakes it once the source has given it up. When this
/// fails nothing is left of it.
fn build(
    root: &Root,
    cli: &Cli,
    args: &Receive,
    offer: &Offer,
    link: &mut DestinationLink,
    shim: &mut Shim,
) -> Result<(Sandbox, Committed, Arrived), Problem> {
    let id = args.container_id.as_str();
    let broken = |err: LinkError| match err {
        LinkError::Peer(problem) => problem,
        err => Problem::new(err.code(), id, chain(&err)),
    };
    let failed = |err: anyhow::Error| {
        Problem::new(ErrorCode::RestoreFailed, id, format!("cannot restore {id}: {err:#}"))
    };

    shim.tell(&Event::Destination(DestinationState::Preparing));
    let mut sandbox = prepare(root, cli, args, offer).map_err(failed)?;
    let (init, stdio) = (sandbox.init(), sandbox.stdio().map_err(failed)?);
    let pass = |name| point(name).map_err(|err| failed(err.into()));
    pass("destination.prepared")?;
    link.prepared().map_err(broken)?;

    shim.tell(&Event::Destination(DestinationState::Filling));
    pass("destination.filling")?;
    let place = dunlin_checkpoint::Sandbox { init, stdio };
    let mut source = Source { link, shim, failure: None, told: Instant::now() };
    let nascent = match dunlin_checkpoint::restore(place, &mut source).and_then(|nascent| {
        source.drain().map_err(RestoreError::Source)?;
        Ok(nascent)
    }) {
        Ok(nascent) => nascent,
        Err(err) => return Err(source.failure.take().map_or_else(|| failed(err.into()), broken)),
    };

    shim.tell(&Event::Destination(DestinationState::Ready));
    let sums = sums(&nascent);
    pass("destination.ready")?;
    link.announce(sums).map_err(broken)?;
    // While the source stops its own for good, so it costs nothing.
    sandbox.arm().map_err(failed)?;
    let committed = link.committed().map_err(broken)?;
    let since = Instant::now();
    shim.tell(&Event::Destination(DestinationState::Committed));
    pass("destination.committed")?;
    sandbox.unmute().map_err(failed)?;
    nascent.thaw().map_err(|err| failed(err.into()))?;
    // It runs, so nothing may fail any more.
    point("destination.running").ok();
    let thaw_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok((sandbox, committed, Arrived { thaw_us }))
}

/// Makes the sandbox by this host's own specification.
fn prepare(root: &Root, cli: &Cli, args: &Receive, offer: &Offer) -> Result<Sandbox> {
    let id = args.container_id.as_str();
    let systemd = cli.global.systemd_cgroup;
    let clocks =
        Clocks { monotonic_ns: offer.clocks.monotonic_ns, boottime_ns: offer.clocks.boottime_ns };
    let creation = Creation {
        root,
        id,
        bundle: &args.bundle,
        spec: spec::load(&args.bundle, root, id, systemd)?,
        pid_file: None,
        console_socket: None,
        preserve_fds: 0,
        no_pivot: false,
        systemd,
        executor: Box::new(Program),
        muted: true,
    };
    Sandbox::make(creation, Some(clocks)).context("cannot make the sandbox")
}

fn sums(nascent: &Nascent) -> Sums {
    let report = nascent.report();
    Sums {
        processes: report.processes,
        threads: report.threads,
        pages: report.pages,
        restore_us: report.restore_us,
    }
}

/// The image as it comes in; keeps the link's own error, which says more than
/// an `io::Error` can.
struct Source<'a> {
    link: &'a mut DestinationLink,
    shim: &'a mut Shim,
    failure: Option<LinkError>,
    told: Instant,
}

impl Source<'_> {
    /// Reads on to the end of the image, so that a shortened one is noticed
    /// even if the engine had enough of it.
    fn drain(&mut self) -> io::Result<()> {
        match self.next(&mut Vec::new())? {
            None => Ok(()),
            Some(kind) => Err(io::Error::other(format!("record {kind} follows the last one"))),
        }
    }
}

impl ImageSource for Source<'_> {
    fn next(&mut self, body: &mut Vec<u8>) -> io::Result<Option<u16>> {
        if PROGRESS <= self.told.elapsed() {
            self.told = Instant::now();
            let came = self.link.came();
            let (bytes, records) = (came.bytes, came.records);
            self.shim.tell(&Event::Progress { phase: Phase::Copying, bytes, records });
        }
        self.link.image(body).map_err(|err| {
            let text = err.to_string();
            self.failure = Some(err);
            io::Error::other(text)
        })
    }
}

/// The shim that started us.
struct Shim {
    events: UnixStream,
    replies: BufReader<UnixStream>,
}

impl Shim {
    fn new(socket: UnixStream) -> Result<Self> {
        let replies = socket.try_clone().context("cannot use the shim's socket")?;
        Ok(Self { events: socket, replies: BufReader::new(replies) })
    }

    /// What the source offered.
    fn offer(&mut self) -> Result<Offer> {
        let mut line = String::new();
        self.replies.read_line(&mut line).context("cannot hear the shim")?;
        match serde_json::from_str(&line).context("the shim's first line is no reply")? {
            Reply::Offer(offer) => Ok(*offer),
            Reply::MayCommit | Reply::MayNot(_) => bail!("the shim's first line is not the offer"),
        }
    }

    /// Tells the shim something; says whether it is there.
    fn tell(&mut self, event: &Event) -> bool {
        let line = serde_json::to_string(event).unwrap_or_default() + "\n";
        let told = self.events.write_all(line.as_bytes());
        if let Err(err) = &told {
            tracing::warn!(%err, "the shim does not listen");
        }
        told.is_ok()
    }
}

/// Our own copy of a descriptor that we were started with.
fn inherited(fd: i32) -> Result<OwnedFd> {
    let stdin = io::stdin();
    let stdout = io::stdout();
    let fd: BorrowedFd<'_> = match fd {
        0 => stdin.as_fd(),
        1 => stdout.as_fd(),
        other => bail!("fd {other} is neither stdin nor stdout"),
    };
    fcntl_dupfd_cloexec(fd, 3).context("cannot keep a descriptor")
}

/// Makes stdin empty and `output` our stdout and stderr, which init inherits.
fn become_output(output: &PathBuf) -> Result<()> {
    let null = File::open("/dev/null").context("cannot open /dev/null")?;
    let output = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(output)
        .with_context(|| format!("cannot open {}", output.display()))?;
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&output))
        .and_then(|()| rustix::stdio::dup2_stderr(&output))
        .context("cannot redirect our output")
}

/// An error and what caused it, in one line.
fn chain(err: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(err), |err| err.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
