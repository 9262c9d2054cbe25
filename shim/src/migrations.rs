//! The migrations of this node, each a record that is journaled before it is
//! seen.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use dunlin_api::{
    ErrorCode, Problem,
    rest::{ContainerId, Migration, MigrationState, Phase, Progress, Report},
};
use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    journal::{Journal, Record},
    process::Process,
};

/// Migrations that are over and still remembered.
const MAX_HISTORY: usize = 1000;

/// One migration.
pub(crate) struct Entry {
    journal: Journal,
    record: tokio::sync::Mutex<Record>,
    watch: watch::Sender<Migration>,
    token: Uuid,
    /// Bytes of memory promised to it.
    pub(crate) reserved: u64,
    rate: Mutex<Rate>,
    cancelled: watch::Sender<bool>,
    resolved: AtomicBool,
}

struct Rate {
    since: Instant,
    bytes: u64,
}

impl Entry {
    /// The migration as it stands.
    pub(crate) fn migration(&self) -> Migration {
        self.watch.borrow().clone()
    }

    /// The migration now and whenever it changes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Migration> {
        self.watch.subscribe()
    }

    /// Whether `token` is this migration's, compared in constant time.
    pub(crate) fn is_token(&self, token: Uuid) -> bool {
        let pairs = self.token.as_bytes().iter().zip(token.as_bytes());
        std::hint::black_box(pairs.fold(0, |differ, (a, b)| differ | (a ^ b))) == 0
    }

    /// Fencing token.
    pub(crate) fn token(&self) -> Uuid {
        self.token
    }

    /// Everything that is kept of it.
    pub(crate) async fn record(&self) -> Record {
        self.record.lock().await.clone()
    }

    /// Goes to `state`: writes it down, then shows it.
    pub(crate) async fn advance(&self, state: MigrationState) -> Result<(), Problem> {
        self.change(|record| {
            let from = record.migration.state;
            if !from.leads_to(state) {
                let detail = format!("{from:?} cannot be followed by {state:?}");
                return Err(Problem::new(ErrorCode::OutOfOrder, "migration", detail));
            }
            record.migration.state = state;
            Ok(())
        })
        .await
    }

    /// Goes to a final state.
    pub(crate) async fn end(
        &self,
        state: MigrationState,
        outcome: Result<Option<Report>, Problem>,
    ) -> Result<(), Problem> {
        self.change(|record| {
            let migration = &mut record.migration;
            if !migration.state.leads_to(state) {
                let detail = format!("{:?} cannot end as {state:?}", migration.state);
                return Err(Problem::new(ErrorCode::OutOfOrder, "migration", detail));
            }
            migration.state = state;
            migration.progress.phase = Phase::Done;
            migration.progress.rate = 0;
            migration.ended_ms = Some(now_ms());
            match outcome {
                Ok(report) => {
                    migration.report = report;
                    migration.error = None;
                }
                Err(problem) => migration.error = Some(problem),
            }
            Ok(())
        })
        .await
    }

    /// Changes the record: writes it down, then shows it.
    pub(crate) async fn change(
        &self,
        change: impl FnOnce(&mut Record) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        let mut record = self.record.lock().await;
        let mut next = record.clone();
        change(&mut next)?;
        self.journal.put(next.clone()).await?;
        let before = std::mem::replace(&mut *record, next).migration.state;
        let migration = record.migration.clone();
        let (id, container) = (migration.id, &migration.container);
        if record.migration.state != before {
            tracing::info!(migration = %id, %container, state = ?migration.state, "migration");
        }
        self.watch.send_replace(migration);
        Ok(())
    }

    /// Notes its worker.
    pub(crate) async fn worker(&self, worker: Option<Process>) -> Result<(), Problem> {
        self.change(|record| {
            record.worker = worker;
            Ok(())
        })
        .await
    }

    /// Shows how far it is; nothing that must outlive a crash.
    pub(crate) async fn progress(&self, phase: Phase, bytes: u64, records: u64) {
        let rate = {
            let mut last = lock(&self.rate);
            let elapsed = last.since.elapsed().as_micros().max(1);
            let grown = u128::from(bytes.saturating_sub(last.bytes));
            *last = Rate { since: Instant::now(), bytes };
            u64::try_from(grown * 1_000_000 / elapsed).unwrap_or(u64::MAX)
        };
        let mut record = self.record.lock().await;
        let Progress { total, .. } = record.migration.progress;
        let total = total.max(bytes);
        record.migration.progress = Progress { phase, bytes, total, records, rate };
        self.watch.send_replace(record.migration.clone());
    }

    /// Shows what it does and how much there will be to send.
    pub(crate) async fn phase(&self, phase: Phase, total: Option<u64>) {
        let mut record = self.record.lock().await;
        record.migration.progress.phase = phase;
        if let Some(total) = total {
            record.migration.progress.total = total;
        }
        self.watch.send_replace(record.migration.clone());
    }

    /// Asks for its end.
    pub(crate) fn cancel(&self) {
        self.cancelled.send_replace(true);
    }

    /// Waits until somebody asks for its end.
    pub(crate) async fn cancelled(&self) {
        let mut cancelled = self.cancelled.subscribe();
        // The sender lives as long as `self`.
        cancelled.wait_for(|cancelled| *cancelled).await.ok();
    }

    /// Whether somebody asked for its end.
    pub(crate) fn is_cancelled(&self) -> bool {
        *self.cancelled.borrow()
    }

    /// Whether a doubt may be ended by the caller: only the first may.
    pub(crate) fn resolves(&self) -> bool {
        !self.resolved.swap(true, Ordering::SeqCst)
    }

    /// Waits until it is over.
    pub(crate) async fn over(&self) {
        self.subscribe().wait_for(|migration| migration.state.is_final()).await.ok();
    }
}

/// All of them.
pub(crate) struct Migrations {
    journal: Journal,
    entries: Mutex<BTreeMap<Uuid, Arc<Entry>>>,
}

impl Migrations {
    /// Starts with what the journal remembers.
    pub(crate) fn new(journal: Journal) -> Result<Self, redb::Error> {
        let entries = journal.records()?.into_iter().map(|record| {
            let entry = entry(&journal, record, 0);
            (entry.migration().id, entry)
        });
        let entries = Mutex::new(entries.collect());
        Ok(Self { entries, journal })
    }

    /// Takes a new migration in, unless it breaks a limit or the container is
    /// in one already.
    pub(crate) async fn begin(
        &self,
        record: Record,
        reserved: u64,
        most: usize,
    ) -> Result<Arc<Entry>, Problem> {
        let (id, container) = (record.migration.id, record.migration.container.clone());
        let new = entry(&self.journal, record.clone(), reserved);
        {
            let mut entries = lock(&self.entries);
            if let Some(other) = busy(&entries, &container) {
                let other = other.migration().id;
                let detail = format!("{container} is in migration {other} already");
                return Err(Problem::new(ErrorCode::AlreadyMigrating, container.as_str(), detail));
            }
            if entries.contains_key(&id) {
                let detail = format!("migration {id} is known already");
                return Err(Problem::new(ErrorCode::WrongToken, id.to_string(), detail));
            }
            let running = entries.values().filter(|e| !e.migration().state.is_final()).count();
            if most <= running {
                let detail = format!("{running} migrations run here, the most allowed");
                let code = ErrorCode::TooManyMigrations;
                return Err(Problem::new(code, container.as_str(), detail));
            }
            entries.insert(id, new.clone());
        }
        if let Err(problem) = self.journal.put(record).await {
            lock(&self.entries).remove(&id);
            // A write that was given up may land yet.
            let journal = self.journal.clone();
            tokio::spawn(async move {
                while journal.forget(vec![id]).await.is_err() {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            });
            return Err(problem);
        }
        self.forget_old().await;
        Ok(new)
    }

    /// One of them.
    pub(crate) fn find(&self, id: Uuid) -> Result<Arc<Entry>, Problem> {
        lock(&self.entries).get(&id).cloned().ok_or_else(|| {
            let detail = format!("there is no migration {id}");
            Problem::new(ErrorCode::UnknownMigration, id.to_string(), detail)
        })
    }

    /// All of them, oldest first.
    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        let mut all: Vec<_> = lock(&self.entries).values().cloned().collect();
        all.sort_by_key(|entry| entry.watch.borrow().started_ms);
        all
    }

    /// Those that are not over.
    pub(crate) fn running(&self) -> Vec<Arc<Entry>> {
        self.all().into_iter().filter(|entry| !entry.migration().state.is_final()).collect()
    }

    /// The one that `container` is in.
    pub(crate) fn of(&self, container: &ContainerId) -> Option<Arc<Entry>> {
        busy(&lock(&self.entries), container).cloned()
    }

    async fn forget_old(&self) {
        let all = self.all();
        let over: Vec<Uuid> = all
            .iter()
            .map(|entry| entry.migration())
            .filter(|migration| migration.state.is_final())
            .map(|migration| migration.id)
            .collect();
        let old = over[..over.len().saturating_sub(MAX_HISTORY)].to_vec();
        if old.is_empty() {
            return;
        }
        lock(&self.entries).retain(|id, _| !old.contains(id));
        if let Err(problem) = self.journal.forget(old).await {
            tracing::warn!(%problem, "old migrations stay in the journal");
        }
    }
}

fn busy<'a>(
    entries: &'a BTreeMap<Uuid, Arc<Entry>>,
    container: &ContainerId,
) -> Option<&'a Arc<Entry>> {
    entries.values().find(|entry| {
        let migration = entry.watch.borrow();
        migration.container == *container && !migration.state.is_final()
    })
}

fn entry(journal: &Journal, record: Record, reserved: u64) -> Arc<Entry> {
    Arc::new(Entry {
        journal: journal.clone(),
        watch: watch::Sender::new(record.migration.clone()),
        token: record.token,
        record: tokio::sync::Mutex::new(record),
        reserved,
        rate: Mutex::new(Rate { since: Instant::now(), bytes: 0 }),
        cancelled: watch::Sender::new(false),
        resolved: AtomicBool::new(false),
    })
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
