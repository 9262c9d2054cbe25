//! The source of one migration, in a process of its own, blocking.
//!
//! ```text
//! judge -> greet, offer -> rounds of memory -> freeze -> dump -> (may commit?) -> ready
//!       -> leave it stopped -> Commit -> Running -> end it
//! ```
//!
//! Up to `Commit` every failure lets the container run on: the frozen tree is
//! a value whose drop thaws it, and a tracer that is killed lets go of its
//! tracees. From just before `Commit` it is stopped by itself instead, so that
//! not even the end of this process lets it run: it may run elsewhere by then.

mod overseer;
mod rounds;

use std::{
    io::{self, IoSlice},
    os::{fd::AsFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use dunlin_api::{
    ErrorCode, Problem,
    fault::point,
    rest::{
        ContainerId, Finding, Judgement, Mechanism, MigrateOptions, Phase, Report, SourceState,
        TcpPolicy, Verdict,
    },
    wire::{
        Canceller, Clocks, Limits, LinkError, Needs, Offer, PeerReady, SourceLink, Sums, Unanswered,
    },
    worker::Event,
};
use dunlin_checkpoint::{
    self as engine, DumpError, DumpReport, Frozen, Parked, Precopy, RoundReport,
    image::{self, ImageSink},
};
use nix::{
    sys::signal::{SigSet, Signal},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use self::{overseer::Shim, rounds::Rounds};
use super::tree;
use crate::{host::Host, process::Process};

/// Least time between two reports of progress.
const PROGRESS: Duration = Duration::from_millis(100);

/// What the daemon asks of a source worker, its first line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    /// First process of the container.
    pub(crate) init: Process,
    /// What to offer; without it the container is only judged.
    pub(crate) offer: Option<Offer>,
    /// Name of this node.
    pub(crate) node: String,
    /// The container.
    pub(crate) container: ContainerId,
    /// What was asked.
    pub(crate) options: MigrateOptions,
    /// Longest silence of the peer.
    pub(crate) silence_ms: u64,
    /// Longest time it may prepare.
    pub(crate) prepare_s: u64,
}

impl Job {
    fn engine_options(&self) -> engine::Options {
        engine::Options {
            tcp: match self.options.tcp {
                TcpPolicy::Keep => engine::TcpPolicy::Keep,
                TcpPolicy::Close => engine::TcpPolicy::Close,
                TcpPolicy::Refuse => engine::TcpPolicy::Refuse,
            },
            file_locks: self.options.file_locks,
            external_unix: self.options.external_unix,
            shell_job: self.options.shell_job,
            skip_in_flight: false,
        }
    }
}

/// Runs the worker: stdout is a socket that takes events and gives replies,
/// stdin the peer's stream.
pub(crate) fn run() -> io::Result<()> {
    let mut shim = Shim::new(UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?))?;
    // Before any thread starts, so that all of them inherit it.
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.thread_block()?;
    let job: Job = shim.job()?;
    if let Err(problem) = work(&job, &mut shim) {
        tracing::warn!(%problem, "the migration failed");
        shim.tell(&Event::Failed(problem));
    }
    Ok(())
}

fn work(job: &Job, shim: &mut Shim) -> Result<(), Problem> {
    let gone = format!("{} has no running process", job.container);
    if !job.init.is_alive() {
        return Err(Problem::new(ErrorCode::NotRunning, job.container.as_str(), gone));
    }
    let Some(offer) = &job.offer else {
        point("source.judging").map_err(failed)?;
        let (verdict, needs) = judge(job)?;
        shim.tell(&Event::Judged(verdict, needs));
        return Ok(());
    };
    let unusable = |err: io::Error| {
        Problem::new(ErrorCode::Internal, "worker", format!("the stream is unusable: {err}"))
    };
    let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(unusable)?;
    // Any stream socket will do: nothing done with it looks at addresses.
    let stream = UnixStream::from(stdin);
    let limits = Limits {
        silence: Duration::from_millis(job.silence_ms),
        prepare: Duration::from_secs(job.prepare_s),
    };
    let offer = Offer { clocks: clocks(job.init), ..offer.clone() };
    let report = migrate(&Container(job), &offer, stream, limits, shim)?;
    shim.tell(&Event::Report(report));
    point("source.reported").map_err(failed)
}

/// A running tree, as far as the hand-over is concerned. The tests have
/// another one than [`Container`].
pub(crate) trait Tree {
    /// What is known of memory sent ahead.
    type Ahead;
    /// The same tree, stopped.
    type Frozen;
    /// The same tree, left stopped.
    type Parked;

    /// Refuses what cannot move; says how memory can be sent ahead, and if it
    /// cannot, why.
    fn prepare(&self) -> Result<Result<Self::Ahead, String>, DumpError>;
    /// Sends memory ahead while the tree runs.
    fn round(
        &self,
        ahead: &mut Self::Ahead,
        sink: &mut dyn ImageSink,
    ) -> Result<RoundReport, DumpError>;
    /// Stops it.
    fn freeze(&self, ahead: Option<Self::Ahead>) -> Result<Self::Frozen, DumpError>;
    /// Writes its image.
    fn dump(
        &self,
        frozen: &mut Self::Frozen,
        sink: &mut dyn ImageSink,
    ) -> Result<DumpReport, DumpError>;
    /// Takes out of it what the dump needed there.
    fn withdraw(&self, frozen: &mut Self::Frozen) -> Result<(), DumpError>;
    /// Leaves it stopped, whatever becomes of this process.
    fn park(&self, frozen: Self::Frozen) -> Result<Self::Parked, DumpError>;
    /// Lets it run after it was parked.
    fn resume(&self);
    /// Ends it.
    fn kill(&self);
}

/// Where the worker's reports go and permission comes from.
pub(crate) trait Overseer {
    /// Takes note of something.
    fn tell(&mut self, event: &Event);
    /// Writes down that a commit may have been sent, before it is.
    fn may_commit(&mut self) -> Result<(), Problem>;
    /// Is shown how to cancel what begins.
    fn begin(&mut self, canceller: Canceller) -> Result<(), Problem>;
}

/// Moves `tree` to the destination behind `stream`.
pub(crate) fn migrate<T: Tree>(
    tree: &T,
    offer: &Offer,
    stream: UnixStream,
    limits: Limits,
    shim: &mut impl Overseer,
) -> Result<Report, Problem> {
    let object = offer.container.to_string();
    let broken = |err: LinkError| match err {
        LinkError::Peer(problem) => problem,
        err => Problem::new(err.code(), &object, chain(&err)),
    };

    let mut link = SourceLink::open(stream, limits).map_err(broken)?;
    shim.begin(link.canceller())?;
    shim.tell(&Event::Source(SourceState::Preparing));
    point("source.offered").map_err(failed)?;
    link.offer(offer).map_err(broken)?;

    let mut rounds = Rounds::new(&offer.options);
    let ahead = match send_ahead(tree, offer, &mut link, shim, &mut rounds) {
        Ok(ahead) => ahead,
        Err(problem) => {
            link.cancel(problem.clone());
            return Err(problem);
        }
    };

    shim.tell(&Event::Source(SourceState::Frozen));
    let since = Instant::now();
    let undumpable = |err: DumpError| Problem::new(dump_code(&err), &object, chain(&err));
    let mut frozen = match tree.freeze(ahead) {
        Ok(frozen) => frozen,
        Err(err) => {
            let problem = undumpable(err);
            link.cancel(problem.clone());
            return Err(problem);
        }
    };
    point("source.frozen").map_err(failed)?;
    let mut sink = Sink::new(&mut link, &mut *shim, Phase::Frozen);
    let dumped = match tree.dump(&mut frozen, &mut sink) {
        Ok(dumped) => dumped,
        Err(err) => {
            let problem = match sink.failure.take() {
                Some(failure) => broken(failure),
                None => undumpable(err),
            };
            drop(frozen);
            link.cancel(problem.clone());
            return Err(problem);
        }
    };
    point("source.dumped").map_err(failed)?;
    link.finish().map_err(broken)?;
    let sent = since.elapsed();

    // The destination builds meanwhile, so this costs no downtime.
    if let Err(err) = tree.withdraw(&mut frozen) {
        let problem = undumpable(err);
        drop(frozen);
        link.cancel(problem.clone());
        return Err(problem);
    }
    let bytes = link.sent();
    shim.tell(&Event::Progress {
        phase: Phase::Switching,
        bytes: bytes.bytes,
        records: bytes.records,
    });
    shim.may_commit().map_err(|problem| match link.is_cancelled() {
        true => broken(LinkError::Cancelled),
        false => problem,
    })?;
    point("source.may-commit").map_err(failed)?;
    let proof: PeerReady = link.ready(offer.token).map_err(broken)?;
    let ready = since.elapsed();
    let sums: Sums = proof.sums;

    let _parked = match tree.park(frozen) {
        Ok(parked) => parked,
        Err(err) => {
            let problem = undumpable(err);
            link.cancel(problem.clone());
            tree.resume();
            return Err(problem);
        }
    };
    if let Err(err) = point("source.parked") {
        let problem = failed(err);
        link.cancel(problem.clone());
        tree.resume();
        return Err(problem);
    }
    match link.commit(&proof) {
        Ok(arrived) => {
            // From here on nothing is undone, so nothing may fail.
            point("source.committed").ok();
            let downtime = since.elapsed();
            tree.kill();
            Ok(Report {
                total_us: 0,
                downtime_us: micros(downtime),
                freeze_us: dumped.freeze_us,
                dump_us: micros(sent).saturating_sub(dumped.freeze_us),
                ready_us: micros(ready.saturating_sub(sent)),
                commit_us: micros(downtime.saturating_sub(ready)),
                restore_us: sums.restore_us,
                thaw_us: arrived.thaw_us,
                processes: sums.processes,
                threads: sums.threads,
                pages: rounds.pages + dumped.pages,
                bytes: bytes.bytes,
                rounds: rounds.count,
                ahead_bytes: rounds.bytes,
                watch_us: rounds.watch_us,
            })
        }
        Err(Unanswered::NotSent) => {
            tree.resume();
            Err(broken(LinkError::Cancelled))
        }
        Err(Unanswered::Undone(problem)) => {
            tree.resume();
            Err(problem)
        }
        Err(Unanswered::Unknown(err)) => {
            shim.tell(&Event::Source(SourceState::InDoubt));
            let detail = format!("the commit was sent and not answered: {}", chain(&err));
            Err(Problem::new(ErrorCode::InDoubt, &object, detail))
        }
    }
}

/// Sends memory in rounds while the tree runs, until little is left to send.
fn send_ahead<T: Tree>(
    tree: &T,
    offer: &Offer,
    link: &mut SourceLink,
    shim: &mut impl Overseer,
    rounds: &mut Rounds,
) -> Result<Option<T::Ahead>, Problem> {
    let object = offer.container.to_string();
    let broken = |err: LinkError| match err {
        LinkError::Peer(problem) => problem,
        err => Problem::new(err.code(), &object, chain(&err)),
    };
    let undumpable = |err: DumpError| Problem::new(dump_code(&err), &object, chain(&err));
    if offer.options.mechanism == Mechanism::TotalCopy {
        return Ok(None);
    }
    let mut ahead = match tree.prepare().map_err(undumpable)? {
        Ok(ahead) => ahead,
        Err(reason) if offer.options.mechanism == Mechanism::PreCopy => {
            let detail = format!("memory cannot be sent ahead: {reason}");
            return Err(Problem::new(ErrorCode::Unmovable, &object, detail));
        }
        Err(reason) => {
            tracing::info!(%reason, "memory is sent in the freeze");
            return Ok(None);
        }
    };
    shim.tell(&Event::Source(SourceState::Copying));
    loop {
        let since = Instant::now();
        let mut sink = Sink::new(link, shim, Phase::Copying);
        let report =
            tree.round(&mut ahead, &mut sink).map_err(|err| match sink.failure.take() {
                Some(failure) => broken(failure),
                None => undumpable(err),
            })?;
        point("source.round").map_err(failed)?;
        link.sync().map_err(broken)?;
        let took = since.elapsed();
        let why = rounds.add(&report, took);
        let (round, pages, elapsed_ms) = (rounds.count, report.pages, took.as_millis());
        tracing::info!(round, pages, elapsed_ms, "memory round sent");
        if let Some(why) = why {
            tracing::info!(round, why, "freezing");
            return Ok(Some(ahead));
        }
    }
}

/// Lets the engine write into the link and keeps the link's own error, which
/// says more than an `io::Error` can.
struct Sink<'a, O> {
    link: &'a mut SourceLink,
    failure: Option<LinkError>,
    shim: &'a mut O,
    phase: Phase,
    told: Instant,
}

impl<'a, O> Sink<'a, O> {
    fn new(link: &'a mut SourceLink, shim: &'a mut O, phase: Phase) -> Self {
        Self { link, failure: None, shim, phase, told: Instant::now() }
    }
}

impl<O: Overseer> ImageSink for Sink<'_, O> {
    fn put(&mut self, kind: u16, parts: &[IoSlice<'_>]) -> io::Result<()> {
        if let Err(err) = self.link.image(kind, image::VERSION, parts) {
            let text = err.to_string();
            self.failure = Some(err);
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, text));
        }
        if PROGRESS <= self.told.elapsed() {
            self.told = Instant::now();
            let sent = self.link.sent();
            let (phase, bytes, records) = (self.phase, sent.bytes, sent.records);
            self.shim.tell(&Event::Progress { phase, bytes, records });
        }
        Ok(())
    }
}

/// A container's tree under the real engine.
struct Container<'a>(&'a Job);

impl Tree for Container<'_> {
    type Ahead = Precopy;
    type Frozen = Frozen;
    type Parked = Parked;

    fn prepare(&self) -> Result<Result<Precopy, String>, DumpError> {
        Precopy::start(Pid::from_raw(self.0.init.pid), &self.0.engine_options())
    }

    fn round(
        &self,
        ahead: &mut Precopy,
        sink: &mut dyn ImageSink,
    ) -> Result<RoundReport, DumpError> {
        ahead.round(sink)
    }

    fn freeze(&self, ahead: Option<Precopy>) -> Result<Frozen, DumpError> {
        match ahead {
            Some(ahead) => ahead.freeze(),
            None => engine::freeze(Pid::from_raw(self.0.init.pid), &self.0.engine_options()),
        }
    }

    fn dump(&self, frozen: &mut Frozen, sink: &mut dyn ImageSink) -> Result<DumpReport, DumpError> {
        frozen.dump(sink)
    }

    fn withdraw(&self, frozen: &mut Frozen) -> Result<(), DumpError> {
        frozen.withdraw()
    }

    fn park(&self, frozen: Frozen) -> Result<Parked, DumpError> {
        frozen.park()
    }

    fn resume(&self) {
        tree::resume(self.0.init);
    }

    fn kill(&self) {
        tree::kill(self.0.init);
    }
}

fn judge(job: &Job) -> Result<(Verdict, Needs), Problem> {
    let verdict = engine::inspect(Pid::from_raw(job.init.pid), &job.engine_options())
        .map_err(|err| Problem::new(dump_code(&err), job.container.as_str(), chain(&err)))?;
    let findings = verdict.findings.into_iter().map(|finding| Finding {
        node: job.node.clone(),
        object: finding.object,
        judgement: match finding.judgement {
            engine::Judgement::Movable => Judgement::Movable,
            engine::Judgement::Loss => Judgement::Loss,
            engine::Judgement::Refused => Judgement::Refused,
        },
        reason: finding.reason,
        remedy: finding.remedy,
        code: ErrorCode::Unmovable,
    });
    let members = tree::members(job.init);
    let needs = Host::probe().needs(tree::memory(&members), members.len() as u64);
    Ok((Verdict::of(findings.collect()), needs))
}

fn dump_code(err: &DumpError) -> ErrorCode {
    match err {
        DumpError::Refused(_) => ErrorCode::Unmovable,
        DumpError::NoProcess(_) => ErrorCode::NotRunning,
        _ => ErrorCode::DumpFailed,
    }
}

/// The clocks of the container's time namespace, which are ours plus its offsets.
fn clocks(init: Process) -> Clocks {
    let offsets = std::fs::read_to_string(format!("/proc/{}/timens_offsets", init.pid));
    let offsets = offsets.unwrap_or_default();
    let offset = |name: &str| {
        let line = offsets.lines().find_map(|line| line.strip_prefix(name))?;
        let mut numbers = line.split_whitespace().map(str::parse::<i64>);
        let (seconds, nanos) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        Some(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
    };
    let now = |clock| {
        let now = rustix::time::clock_gettime(clock);
        now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
    };
    Clocks {
        monotonic_ns: now(rustix::time::ClockId::Monotonic) + offset("monotonic").unwrap_or(0),
        boottime_ns: now(rustix::time::ClockId::Boottime) + offset("boottime").unwrap_or(0),
    }
}

fn failed(err: io::Error) -> Problem {
    Problem::new(ErrorCode::Internal, "worker", err.to_string())
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// An error and what caused it, in one line.
fn chain(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut source = err.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
