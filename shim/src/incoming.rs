//! Migrations to here.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
    time::Duration,
};

use dunlin_api::{
    ErrorCode, Problem,
    client::Conn,
    fault::point,
    rest::{
        Acceptance, CanAccept, ContainerId, DestinationState, Migration, MigrationState, Origin,
        PeerMigration, PeerOutcome, Phase, Progress, Status,
    },
    wire::{self, DestinationLink, Offer},
    worker::{Event, Reply},
};
use rustix::process::Signal;
use uuid::Uuid;

use crate::{
    daemon::Shim,
    host,
    journal::Record,
    listen::Caller,
    migrations::{Entry, now_ms},
    outgoing::finish,
    process::Process,
    runtime,
    verdict::{self, Here, find_bundle},
    worker::{self, Worker},
};

/// How long a process may take to end after it was killed.
const LAST_BREATH: Duration = Duration::from_secs(1);

/// Whether this node would take a container.
pub(crate) async fn can_accept(shim: &Shim, asked: &CanAccept) -> Result<Acceptance, Problem> {
    let taken = shim.containers().await?.iter().any(|known| known.id == asked.container)
        || shim.migrations.of(&asked.container).is_some();
    let running = shim.migrations.running();
    let promised: u64 = running.iter().map(|entry| entry.reserved).sum();
    let here = Here {
        config: &shim.config,
        host: &shim.host,
        free: host::memory().1.saturating_sub(promised),
        taken,
        draining: shim.drainer.is_closed(),
        slot: running.len() < shim.config.max_migrations,
    };
    Ok(Acceptance { instance: shim.instance(), findings: verdict::judge(asked, &here) })
}

/// What became of a migration here, for whoever knows its token.
pub(crate) fn outcome(shim: &Shim, id: Uuid, token: Uuid) -> Result<PeerMigration, Problem> {
    let instance = shim.instance();
    let Ok(entry) = shim.migrations.find(id) else {
        return Ok(PeerMigration { id, instance, outcome: PeerOutcome::Unknown, error: None });
    };
    if !entry.is_token(token) {
        let detail = format!("the fencing token is not that of migration {id}");
        return Err(Problem::new(ErrorCode::WrongToken, id.to_string(), detail));
    }
    let migration = entry.migration();
    let outcome = match migration.state {
        MigrationState::In(DestinationState::Running) => PeerOutcome::Running,
        MigrationState::In(DestinationState::Discarded) => PeerOutcome::Discarded,
        _ => PeerOutcome::Pending,
    };
    Ok(PeerMigration { id, instance, outcome, error: migration.error })
}

/// Serves one migration's stream to its end.
pub(crate) async fn serve(shim: Arc<Shim>, conn: Conn, caller: Caller) {
    let stream = match worker::into_fd(conn) {
        Ok(fd) => UnixStream::from(fd),
        Err(err) => return tracing::error!(%err, "a stream cannot be handed over"),
    };
    let limits = shim.config.limits();
    let greeted = tokio::task::spawn_blocking(move || {
        let offer = DestinationLink::greet(&stream, limits)?;
        Ok::<_, wire::LinkError>((stream, offer))
    });
    let (stream, offer) = match greeted.await {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(err)) => return tracing::warn!(%err, "a migration ended before its offer"),
        Err(err) => return tracing::error!(%err, "a migration was not greeted"),
    };
    let (migration, container) = (offer.migration, offer.container.clone());
    tracing::info!(%migration, %container, from = %offer.node, "offered");
    match admit(&shim, &offer, &caller).await {
        Ok((entry, bundle)) => {
            let task = Incoming { shim, entry, offer, bundle };
            task.run(stream).await;
        }
        Err(problem) => {
            tracing::warn!(%migration, %container, %problem, "refused");
            let told =
                tokio::task::spawn_blocking(move || DestinationLink::refuse(&stream, problem));
            if let Ok(Err(err)) = told.await {
                tracing::warn!(%err, "the source does not hear the refusal");
            }
        }
    }
}

/// Judges an offer like a question, as the answer may have changed since, and
/// takes it in.
async fn admit(
    shim: &Arc<Shim>,
    offer: &Offer,
    caller: &Caller,
) -> Result<(Arc<Entry>, std::path::PathBuf), Problem> {
    if let Caller::Node(name) = caller
        && *name != offer.node
    {
        let detail = format!("the certificate is that of {name}, the offer that of {}", offer.node);
        return Err(Problem::new(ErrorCode::Forbidden, &offer.node, detail));
    }
    let asked = CanAccept {
        node: offer.node.clone(),
        container: offer.container.clone(),
        bundle: offer.bundle.clone(),
        needs: offer.needs.clone(),
        wire_versions: wire::VERSIONS.to_vec(),
    };
    shim.containers.refresh().await;
    let answer = can_accept(shim, &asked).await?;
    if let Some(finding) = answer.findings.first() {
        return Err(verdict::refusal(finding));
    }
    let bundle = find_bundle(&shim.config, &offer.container, &offer.bundle)
        .map_err(|why| Problem::new(ErrorCode::BundleMissing, offer.container.as_str(), why))?;
    let record = Record {
        migration: Migration {
            id: offer.migration,
            container: offer.container.clone(),
            peer: offer.node.clone(),
            state: MigrationState::In(DestinationState::Accepted),
            progress: Progress { total: offer.needs.memory, ..Progress::default() },
            error: None,
            report: None,
            started_ms: now_ms(),
            ended_ms: None,
        },
        token: offer.token,
        worker: None,
        away: None,
    };
    let most = shim.config.max_migrations;
    let entry = shim.migrations.begin(record, offer.needs.memory, most).await?;
    Ok((entry, bundle))
}

/// One migration to here.
struct Incoming {
    shim: Arc<Shim>,
    entry: Arc<Entry>,
    offer: Offer,
    bundle: std::path::PathBuf,
}

impl Incoming {
    async fn run(self, stream: UnixStream) {
        let Self { shim, entry, offer, .. } = &self;
        let (problem, ran) = match self.start(stream).await {
            Ok(mut worker) => {
                let watched = self.watch(&mut worker).await;
                let end = worker.wait().await;
                let ran = watched.ran || came(shim, &offer.container).await;
                if !ran {
                    worker.end_leftovers();
                }
                let died = || {
                    let detail =
                        format!("the worker that built {} ended with {end}", offer.container);
                    Problem::new(ErrorCode::WorkerDied, offer.container.as_str(), detail)
                };
                (watched.problem.unwrap_or_else(died), ran)
            }
            Err(problem) => (problem, false),
        };
        if ran {
            shim.containers.refresh().await;
            // Learns its first process, whose end falls to us.
            if let Err(problem) = shim.containers().await {
                tracing::warn!(%problem, "the container that came cannot be seen");
            }
            let running = MigrationState::In(DestinationState::Running);
            skip_to_committed(entry).await;
            finish(shim, entry, running, Ok(None)).await;
        } else {
            discard(shim, entry, problem).await;
        }
    }

    async fn start(&self, stream: UnixStream) -> Result<Worker, Problem> {
        let Self { shim, entry, offer, bundle } = self;
        let failed = |err: std::io::Error| {
            let detail = format!("cannot start {}: {err}", shim.config.runtime.display());
            Problem::new(ErrorCode::Internal, offer.container.as_str(), detail)
        };
        tokio::task::block_in_place(|| point("destination.accepted")).map_err(failed)?;
        let log = shim.config.migration_dir(offer.migration).join("destination.log");
        let mut command = runtime::dunlin(&shim.config);
        // Its stderr becomes the container's.
        command.arg("--log").arg(&log).args(["--log-level", "info"]);
        command.args(["receive", "--stream-fd", "0", "--events-fd", "1"]);
        command.arg("--silence-ms").arg(shim.config.silence_ms.to_string());
        command.arg("--output").arg(shim.config.container_log(&offer.container));
        command.arg("--bundle").arg(bundle).arg(offer.container.as_str());
        worker::append(&shim.config.container_log(&offer.container)).map_err(failed)?;
        let stream = Some(OwnedFd::from(stream));
        let spawned = Worker::spawn(command, stream, &log, shim.config.stuck());
        let mut worker = spawned.map_err(failed)?;
        entry.worker(worker.process).await?;
        worker.reply(&Reply::Offer(Box::new(offer.clone()))).await.map_err(failed)?;
        Ok(worker)
    }

    /// Follows the worker to its end.
    async fn watch(&self, worker: &mut Worker) -> Watched {
        let (entry, mut watched, mut asked) = (&self.entry, Watched::default(), false);
        loop {
            let event = tokio::select! {
                event = worker.next() => event,
                () = entry.cancelled(), if !asked => {
                    asked = true;
                    let late = MigrationState::In(DestinationState::Committed);
                    if entry.migration().state != late {
                        worker.signal(Signal::TERM);
                        let id = &self.offer.container;
                        let detail = format!("{id} was cancelled at the destination");
                        let code = ErrorCode::Cancelled;
                        watched.problem = Some(Problem::new(code, id.as_str(), detail));
                    }
                    continue;
                }
            };
            match event {
                // Written down at the end: it is final.
                Ok(Some(Event::Destination(DestinationState::Running))) => watched.ran = true,
                Ok(Some(Event::Destination(state))) => {
                    let phase = match state {
                        DestinationState::Accepted | DestinationState::Preparing => {
                            Phase::Preparing
                        }
                        DestinationState::Filling => Phase::Copying,
                        _ => Phase::Switching,
                    };
                    entry.phase(phase, None).await;
                    if let Err(problem) = entry.advance(MigrationState::In(state)).await {
                        // Every state before the last is recovered alike: what
                        // counts is whether the container runs.
                        tracing::warn!(%problem, ?state, "a step is not in the journal");
                    }
                }
                Ok(Some(Event::Progress { phase, bytes, records })) => {
                    entry.progress(phase, bytes, records).await;
                }
                Ok(Some(Event::Failed(problem))) => watched.problem = Some(problem),
                Ok(Some(_)) => {}
                Ok(None) => return watched,
                Err(err) => {
                    tracing::error!(%err, "a worker wrote what is no event");
                    worker.signal(Signal::KILL);
                }
            }
        }
    }
}

/// What a worker said before it ended.
#[derive(Default)]
struct Watched {
    problem: Option<Problem>,
    ran: bool,
}

/// Removes what was built, and only then says so.
async fn discard(shim: &Arc<Shim>, entry: &Arc<Entry>, problem: Problem) {
    let id = entry.migration().container;
    let mut pause = Duration::from_millis(50);
    while let Err(problem) = remove(shim, &id).await {
        tracing::error!(container = %id, %problem, "what was built cannot be removed yet");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(5));
    }
    shim.containers.refresh().await;
    finish(shim, entry, MigrationState::In(DestinationState::Discarded), Err(problem)).await;
}

/// Deletes the half-built container, if there is one.
async fn remove(shim: &Shim, id: &ContainerId) -> Result<(), Problem> {
    // Asked for even if nothing is listed: a worker that was killed may leave
    // what is no container yet.
    runtime::delete(&shim.config, &Origin::Dunlin, id).await
}

/// Whether a container runs whose worker has ended. The runtime calls it
/// running just before the worker may wake it; the worker's end kills whatever
/// it had not let go, and it lets init go last.
async fn came(shim: &Shim, id: &ContainerId) -> bool {
    let init = loop {
        match runtime::list(&shim.config).await {
            Ok(all) => {
                let found = all.into_iter().find(|found| found.id == *id);
                let running = found.filter(|found| found.status == Status::Running);
                break running.and_then(|found| found.pid).and_then(Process::find);
            }
            Err(problem) => {
                tracing::error!(%problem, "cannot see whether {id} runs");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    };
    let Some(init) = init else { return false };
    // One that was killed is on its way out.
    while !init.gone_within(LAST_BREATH).await {
        if !init.is_ending() {
            return true;
        }
    }
    false
}

/// Steps that were taken while nobody wrote them down.
async fn skip_to_committed(entry: &Entry) {
    let committed = MigrationState::In(DestinationState::Committed);
    if entry.migration().state == committed {
        return;
    }
    let skipped = entry.change(|record| {
        record.migration.state = committed;
        Ok(())
    });
    if let Err(problem) = skipped.await {
        tracing::warn!(%problem, "a step is not in the journal");
    }
}

/// Takes up a migration that the daemon's end interrupted: waits for its
/// worker, then looks whether the container runs.
pub(crate) async fn recover(shim: Arc<Shim>, entry: Arc<Entry>) {
    let record = entry.record().await;
    let (id, container) = (record.migration.id, &record.migration.container);
    tracing::warn!(migration = %id, state = ?record.migration.state, "taking up a migration");
    if let Some(worker) = record.worker
        && let Err(err) = worker.gone().await
    {
        tracing::error!(%err, "cannot wait for a worker");
    }
    if came(&shim, container).await {
        skip_to_committed(&entry).await;
        let running = MigrationState::In(DestinationState::Running);
        finish(&shim, &entry, running, Ok(None)).await;
    } else {
        let detail = "the destination's shim ended during the migration";
        discard(&shim, &entry, Problem::new(ErrorCode::Internal, container.as_str(), detail)).await;
    }
}
