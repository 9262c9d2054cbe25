//! Migrations away from here.

use std::{sync::Arc, time::Instant};

use dunlin_api::{
    ErrorCode, Problem,
    client::{Client, Endpoint},
    rest::{
        CanAccept, Container, ContainerId, Finding, Instance, Judgement, MigrateRequest, Migration,
        MigrationState, PeerOutcome, Phase, Progress, Report, Runs, SourceState, Status, Verdict,
    },
    wire::{self, Bundle, Clocks, Needs, Offer},
    worker::{Event, Reply},
};
use rustix::process::Signal;
use tokio::process::Command;
use uuid::Uuid;

use crate::{
    daemon::Shim,
    journal::{Away, Record},
    migrations::{Entry, now_ms},
    process::Process,
    runtime, verdict,
    worker::{self, Worker, source::Job, tree},
};

/// Longest time between two questions to a peer about a migration in doubt.
const MAX_PAUSE: std::time::Duration = std::time::Duration::from_secs(5);

/// Starts a migration and returns at once.
pub(crate) async fn start(
    shim: &Arc<Shim>,
    id: &ContainerId,
    request: MigrateRequest,
) -> Result<Arc<Entry>, Problem> {
    if let Some(entry) = shim.migrations.of(id)
        && matches!(entry.migration().state, MigrationState::In(_))
    {
        // It may run already while its worker still tells the runtime.
        tokio::time::timeout(MAX_PAUSE, entry.over()).await.ok();
    }
    shim.containers.refresh().await;
    let container = shim.container(id).await?;
    let init = init_of(&container)?;
    let (endpoint, client) = shim.peer(&request.to)?;
    let record = Record {
        migration: Migration {
            id: Uuid::new_v4(),
            container: id.clone(),
            peer: endpoint.to_string(),
            state: MigrationState::Out(SourceState::Offered),
            progress: Progress::default(),
            error: None,
            report: None,
            started_ms: now_ms(),
            ended_ms: None,
        },
        token: Uuid::new_v4(),
        worker: None,
        away: Some(Away { init, origin: container.origin.clone(), instance: None }),
    };
    let entry = shim.migrations.begin(record, 0, shim.config.max_migrations).await?;
    let task = Outgoing { shim: shim.clone(), entry: entry.clone(), container, init, client };
    tokio::spawn(task.run(request));
    Ok(entry)
}

/// Judges whether a container could move, and disturbs nothing.
pub(crate) async fn can_migrate(
    shim: &Arc<Shim>,
    id: &ContainerId,
    request: &MigrateRequest,
) -> Result<Verdict, Problem> {
    shim.containers.refresh().await;
    let container = shim.container(id).await?;
    let init = init_of(&container)?;
    let (_, client) = shim.peer(&request.to)?;
    let (verdict, needs) = judge_here(shim, &container, init, request).await?;
    let asked = question(shim, &container, request, needs);
    let there = in_time(shim, client.can_accept(&asked)).await?;
    Ok(Verdict::of(verdict.findings.into_iter().chain(there.findings).collect()))
}

fn init_of(container: &Container) -> Result<Process, Problem> {
    let id = &container.id;
    let running = matches!(container.status, Status::Running);
    container.pid.filter(|_| running).and_then(Process::find).ok_or_else(|| {
        let status = match container.status {
            Status::Creating | Status::Created => "has not been started",
            Status::Paused => "is paused; resume it first",
            Status::Running | Status::Stopped => "has no running process",
        };
        Problem::new(ErrorCode::NotRunning, id.as_str(), format!("{id} {status}"))
    })
}

fn question(
    shim: &Shim,
    container: &Container,
    request: &MigrateRequest,
    needs: Needs,
) -> CanAccept {
    CanAccept {
        node: shim.config.node.clone(),
        container: container.id.clone(),
        bundle: Bundle { source: container.bundle.clone(), destination: request.bundle.clone() },
        needs,
        wire_versions: wire::VERSIONS.to_vec(),
    }
}

/// Starts a source worker; `stream` leads to the peer.
async fn spawn(
    shim: &Shim,
    migration: Uuid,
    stream: Option<std::os::fd::OwnedFd>,
    job: &Job,
) -> Result<Worker, Problem> {
    let failed = |err: &dyn std::fmt::Display| {
        let detail = format!("cannot start a worker: {err}");
        Problem::new(ErrorCode::Internal, job.container.as_str(), detail)
    };
    // The program that runs now, even if its file was replaced by an update.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("dunlin-shim").arg("source-worker");
    let log = shim.config.migration_dir(migration).join("source.log");
    // A judge's work is of no use to anybody but the one who waits for it.
    command.kill_on_drop(stream.is_none());
    let mut worker =
        Worker::spawn(command, stream, &log, shim.config.stuck()).map_err(|err| failed(&err))?;
    worker.say(job).await.map_err(|err| failed(&err))?;
    Ok(worker)
}

fn job(shim: &Shim, container: &Container, init: Process, request: &MigrateRequest) -> Job {
    Job {
        init,
        offer: None,
        node: shim.config.node.clone(),
        container: container.id.clone(),
        options: request.options(),
        silence_ms: shim.config.silence_ms,
        prepare_s: shim.config.prepare_s,
    }
}

async fn judge_here(
    shim: &Shim,
    container: &Container,
    init: Process,
    request: &MigrateRequest,
) -> Result<(Verdict, Needs), Problem> {
    let job = job(shim, container, init, request);
    let scratch = Uuid::new_v4();
    let mut worker = spawn(shim, scratch, None, &job).await?;
    let judged = loop {
        match worker.next().await {
            Ok(Some(Event::Judged(verdict, needs))) => break Ok((verdict, needs)),
            Ok(Some(Event::Failed(problem))) => break Err(problem),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                let end = worker.wait().await;
                let detail = format!("the worker that judged {} ended with {end}", container.id);
                return Err(Problem::new(ErrorCode::WorkerDied, container.id.as_str(), detail));
            }
        }
    };
    worker.wait().await;
    // Only a worker that died leaves something worth reading.
    std::fs::remove_dir_all(shim.config.migration_dir(scratch)).ok();
    judged
}

/// One migration away from here.
struct Outgoing {
    shim: Arc<Shim>,
    entry: Arc<Entry>,
    container: Container,
    init: Process,
    client: Client,
}

impl Outgoing {
    async fn run(self, request: MigrateRequest) {
        let since = Instant::now();
        match self.attempt(&request).await {
            Ok(report) => {
                let total_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
                depart(&self.shim, &self.entry, Some(Report { total_us, ..report })).await;
            }
            Err(problem) if self.in_doubt(&problem) => {
                doubt(&self.shim, &self.entry, problem).await;
            }
            Err(problem) => roll_back(&self.shim, &self.entry, problem).await,
        }
    }

    /// Waits for something that takes time, but not when nobody wants it any more.
    async fn unless_cancelled<T>(
        &self,
        work: impl Future<Output = Result<T, Problem>>,
    ) -> Result<T, Problem> {
        tokio::select! {
            done = work => done,
            () = self.entry.cancelled() => Err(cancelled(&self.container)),
        }
    }

    /// Whether `Commit` may have been sent, to an unknown end. A doubt may not
    /// have come into the journal.
    fn in_doubt(&self, problem: &Problem) -> bool {
        let unknown = matches!(problem.code, ErrorCode::InDoubt | ErrorCode::WorkerDied);
        match self.entry.migration().state {
            MigrationState::Out(SourceState::InDoubt) => true,
            // A worker that lives to tell has let the container run on.
            MigrationState::Out(SourceState::Committing) => unknown,
            _ => false,
        }
    }

    /// Everything up to the answer to `Commit`. An error means that the
    /// container runs here, unless the state is `InDoubt`.
    async fn attempt(&self, request: &MigrateRequest) -> Result<Report, Problem> {
        let Self { shim, entry, container, .. } = self;
        let judging = judge_here(shim, container, self.init, request);
        let (verdict, needs) = self.unless_cancelled(judging).await?;
        refuse(&verdict.findings)?;
        let asked = question(shim, container, request, needs.clone());
        let asking = in_time(shim, self.client.can_accept(&asked));
        let there = self.unless_cancelled(asking).await?;
        refuse(&there.findings)?;
        entry
            .change(|record| {
                if let Some(away) = &mut record.away {
                    away.instance = Some(there.instance);
                }
                record.migration.progress.total = needs.memory;
                Ok(())
            })
            .await?;
        if entry.is_cancelled() {
            return Err(cancelled(container));
        }

        let opening = in_time(shim, self.client.open_migration());
        let stream = self.unless_cancelled(opening).await?;
        let stream = worker::into_fd(stream).map_err(|err| {
            let detail = format!("the connection cannot be handed over: {err}");
            Problem::new(ErrorCode::Internal, container.id.as_str(), detail)
        })?;
        let migration = entry.migration().id;
        let offer = Offer {
            migration,
            token: entry.token(),
            node: shim.config.node.clone(),
            container: container.id.clone(),
            bundle: Bundle {
                source: container.bundle.clone(),
                destination: request.bundle.clone(),
            },
            annotations: container.annotations.clone(),
            clocks: Clocks::default(),
            needs,
            options: request.options(),
        };
        let job = Job { offer: Some(offer), ..job(shim, container, self.init, request) };
        let mut worker = spawn(shim, migration, Some(stream), &job).await?;
        let watched = self.watch(&mut worker).await;
        let end = worker.wait().await;
        match watched {
            Ok(Some(report)) => Ok(report),
            Ok(None) => {
                let detail = format!("the worker that moved {} ended with {end}", container.id);
                Err(Problem::new(ErrorCode::WorkerDied, container.id.as_str(), detail))
            }
            Err(problem) => Err(problem),
        }
    }

    /// Follows the worker until its last event.
    async fn watch(&self, worker: &mut Worker) -> Result<Option<Report>, Problem> {
        let entry = &self.entry;
        if let Err(problem) = entry.worker(worker.process).await {
            worker.signal(Signal::TERM);
            return Err(problem);
        }
        let mut asked = false;
        loop {
            let event = tokio::select! {
                event = worker.next() => event,
                () = entry.cancelled(), if !asked => {
                    asked = true;
                    worker.signal(Signal::TERM);
                    continue;
                }
            };
            match event {
                Ok(Some(Event::Source(state))) => {
                    let phase = match state {
                        SourceState::Preparing => Phase::Preparing,
                        SourceState::Copying => Phase::Copying,
                        SourceState::InDoubt => Phase::Asking,
                        _ => Phase::Frozen,
                    };
                    entry.phase(phase, None).await;
                    let journaled = entry.advance(MigrationState::Out(state)).await;
                    if let Err(problem) = journaled {
                        // The steps before `Commit` are recovered without their
                        // record; `Commit` itself waits for its own.
                        tracing::warn!(%problem, ?state, "a step is not in the journal");
                    }
                }
                Ok(Some(Event::Progress { phase, bytes, records })) => {
                    entry.progress(phase, bytes, records).await;
                }
                Ok(Some(Event::MayCommit)) => {
                    let committing = MigrationState::Out(SourceState::Committing);
                    match entry.advance(committing).await {
                        Ok(()) => {
                            // A worker that is gone is noticed by its silence.
                            worker.reply(&Reply::MayCommit).await.ok();
                        }
                        Err(problem) => {
                            tracing::error!(%problem, "no commit without its record");
                            worker.reply(&Reply::MayNot(problem)).await.ok();
                        }
                    }
                }
                Ok(Some(Event::Report(report))) => return Ok(Some(report)),
                Ok(Some(Event::Failed(problem))) => return Err(problem),
                Ok(Some(Event::Judged(..) | Event::Destination(_))) => {}
                Ok(None) => return Ok(None),
                Err(err) => {
                    tracing::error!(%err, "a worker wrote what is no event");
                    worker.signal(Signal::TERM);
                }
            }
        }
    }
}

/// Waits for a peer's answer, which may hang as a peer may.
async fn in_time<T>(
    shim: &Shim,
    answer: impl Future<Output = Result<T, Problem>>,
) -> Result<T, Problem> {
    let patience = shim.config.limits().prepare;
    tokio::time::timeout(patience, answer).await.unwrap_or_else(|_| {
        let detail = format!("the peer did not answer for {patience:?}");
        Err(Problem::new(ErrorCode::PeerSilent, "peer", detail))
    })
}

fn refuse(findings: &[Finding]) -> Result<(), Problem> {
    match findings.iter().find(|finding| finding.judgement == Judgement::Refused) {
        Some(finding) => Err(verdict::refusal(finding)),
        None => Ok(()),
    }
}

fn cancelled(container: &Container) -> Problem {
    let detail = format!("the migration of {} was cancelled", container.id);
    Problem::new(ErrorCode::Cancelled, container.id.as_str(), detail)
}

/// The destination runs it: ends what is left here.
async fn depart(shim: &Arc<Shim>, entry: &Arc<Entry>, report: Option<Report>) {
    let id = entry.migration().container;
    entry.phase(Phase::Cleaning, None).await;
    if let Some(away) = entry.record().await.away {
        tree::kill(away.init);
        if !away.init.gone_within(MAX_PAUSE).await {
            tracing::error!(container = %id, pid = away.init.pid, "the original does not end");
        }
        // A cgroup is busy until the last thread has left it, which may be
        // after the process was seen to end.
        let mut pause = std::time::Duration::from_millis(10);
        while let Err(problem) = runtime::delete(&shim.config, &away.origin, &id).await {
            if MAX_PAUSE < pause {
                tracing::error!(container = %id, %problem, "the original's leftovers stay");
                break;
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        if let Err(problem) = shim.containers.unregister(&id).await {
            tracing::warn!(container = %id, %problem, "the hook's registration stays");
        }
    }
    shim.containers.refresh().await;
    finish(shim, entry, MigrationState::Out(SourceState::Departed), Ok(report)).await;
}

/// It runs here as before.
async fn roll_back(shim: &Arc<Shim>, entry: &Arc<Entry>, problem: Problem) {
    finish(shim, entry, MigrationState::Out(SourceState::RolledBack), Err(problem)).await;
}

/// Writes the end down; a journal that fails now is tried again, as the world
/// is in this state already.
pub(crate) async fn finish(
    shim: &Shim,
    entry: &Entry,
    state: MigrationState,
    outcome: Result<Option<Report>, Problem>,
) {
    if let Err(problem) = &outcome {
        let migration = entry.migration().id;
        tracing::warn!(%migration, code = %problem.code, %problem, "migration failed");
    }
    let mut pause = std::time::Duration::from_millis(50);
    while let Err(problem) = entry.end(state, outcome.clone()).await {
        if problem.code != ErrorCode::JournalFailed {
            tracing::error!(%problem, "a migration cannot end like this");
            return;
        }
        tracing::error!(%problem, "the end of a migration cannot be written down");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
    shim.metrics.ended(&entry.migration());
}

/// Asks the destination until it is known what became of the container.
async fn doubt(shim: &Arc<Shim>, entry: &Arc<Entry>, problem: Problem) {
    let migration = entry.migration();
    let (id, peer) = (migration.id, migration.peer.clone());
    tracing::error!(migration = %id, %peer, %problem, "in doubt: the container stays stopped");
    entry.phase(Phase::Asking, None).await;
    let noted = entry.change(|record| {
        record.migration.state = MigrationState::Out(SourceState::InDoubt);
        record.migration.error = Some(problem.clone());
        Ok(())
    });
    if let Err(problem) = noted.await {
        tracing::warn!(%problem, "a doubt is not in the journal");
    }
    let away = entry.record().await.away;
    let asked = away.as_ref().and_then(|away| away.instance.clone());
    let mut pause = std::time::Duration::from_millis(20);
    let mut watch = entry.subscribe();
    loop {
        let asking = async {
            let answer = ask(shim, &peer, id, entry.token(), asked.as_ref()).await;
            if answer.is_none() {
                tokio::time::sleep(pause).await;
            }
            answer
        };
        let answer = tokio::select! {
            answer = asking => answer,
            // An operator decided.
            _ = watch.wait_for(|migration| migration.state.is_final()) => return,
        };
        if let Some((runs, why)) = answer {
            return resolve(shim, entry, runs, why.unwrap_or(problem)).await;
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Where the container runs, if the peer knows for certain.
async fn ask(
    shim: &Shim,
    peer: &str,
    id: Uuid,
    token: Uuid,
    asked: Option<&Instance>,
) -> Option<(Runs, Option<Problem>)> {
    let endpoint: Endpoint = peer.parse().ok()?;
    let client = Client::new(endpoint).with_tls(shim.encrypt.clone());
    let told = in_time(shim, client.peer_migration(id, token)).await.inspect_err(|problem| {
        tracing::warn!(migration = %id, %peer, %problem, "no answer about a migration in doubt");
    });
    let told = told.ok()?;
    match told.outcome {
        PeerOutcome::Pending => None,
        PeerOutcome::Running => Some((Runs::There, None)),
        PeerOutcome::Discarded => Some((Runs::Here, told.error)),
        // The same journal would know it, and nothing outlives a boot; any
        // other node or store that knows nothing proves nothing.
        PeerOutcome::Unknown => {
            let proven = asked.is_some_and(|asked| {
                asked.node == told.instance.node
                    && (asked.journal == told.instance.journal || asked.boot != told.instance.boot)
            });
            proven.then_some((Runs::Here, None))
        }
    }
}

/// Ends a doubt.
async fn resolve(shim: &Arc<Shim>, entry: &Arc<Entry>, runs: Runs, why: Problem) {
    // The peer and an operator may answer at once.
    if !entry.resolves() {
        return entry.over().await;
    }
    match runs {
        Runs::There => depart(shim, entry, None).await,
        Runs::Here => {
            if let Some(away) = entry.record().await.away {
                tree::resume(away.init);
            }
            roll_back(shim, entry, why).await;
        }
    }
}

/// Ends a doubt as an operator says.
pub(crate) async fn resolve_by_hand(
    shim: &Arc<Shim>,
    entry: &Arc<Entry>,
    runs: Runs,
) -> Result<(), Problem> {
    let migration = entry.migration();
    if migration.state != MigrationState::Out(SourceState::InDoubt) {
        let detail = format!("migration {} is not in doubt", migration.id);
        return Err(Problem::new(ErrorCode::NotSupported, migration.id.to_string(), detail));
    }
    tracing::warn!(migration = %migration.id, ?runs, "a doubt is ended by hand");
    let detail = "an operator said that it does not run at the destination";
    let why = Problem::new(ErrorCode::InDoubt, migration.container.as_str(), detail);
    resolve(shim, entry, runs, why).await;
    Ok(())
}

/// Takes up a migration that the daemon's end interrupted.
pub(crate) async fn recover(shim: Arc<Shim>, entry: Arc<Entry>) {
    let record = entry.record().await;
    let migration = &record.migration;
    tracing::warn!(migration = %migration.id, state = ?migration.state, "taking up a migration");
    // Without us the worker gets no leave to commit, but it may have had it.
    if let Some(worker) = record.worker {
        let asked = worker.signal(Signal::TERM);
        if let Err(err) = asked.and(worker.gone().await) {
            tracing::error!(%err, "cannot wait for a worker");
        }
    }
    let detail = "the shim ended during the migration";
    let problem = Problem::new(ErrorCode::Internal, migration.container.as_str(), detail);
    match migration.state {
        MigrationState::Out(SourceState::Committing | SourceState::InDoubt) => {
            doubt(&shim, &entry, problem).await;
        }
        _ => roll_back(&shim, &entry, problem).await,
    }
}
