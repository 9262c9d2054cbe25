//! What must outlive a crash of this process: every migration's record,
//! written before the step it names is taken.
//!
//! The store lies in the state directory, by default on a file system that
//! ends with the boot, as containers do.

use std::{fs, path::Path, sync::Arc, time::Duration};

use dunlin_api::{
    ErrorCode, Problem,
    fault::point,
    rest::{HookState, Instance, Migration, MigrationState, Origin},
};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::process::Process;

const MIGRATIONS: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("migrations");
const HOOKS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("hooks");
const IDENTITY: TableDefinition<'_, &str, u128> = TableDefinition::new("identity");

/// Longest time that anybody waits for a write: a store that hangs is one that
/// fails.
const PATIENCE: Duration = Duration::from_secs(5);

/// All that is kept of a migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What the REST API shows.
    pub(crate) migration: Migration,
    /// Fencing token.
    pub(crate) token: Uuid,
    /// The worker process, as soon as there is one.
    pub(crate) worker: Option<Process>,
    /// For a migration away from here: what is needed to end it.
    pub(crate) away: Option<Away>,
}

/// The source's side of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Away {
    /// First process of the container.
    pub(crate) init: Process,
    /// Who runs it and deletes it.
    pub(crate) origin: Origin,
    /// Who was asked to take it, as soon as it answered.
    pub(crate) instance: Option<Instance>,
}

/// The store.
#[derive(Clone)]
pub(crate) struct Journal {
    db: Arc<Database>,
    id: Uuid,
    /// Held by each write to its end: one that was given up and lands late
    /// never lands after its successor.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Journal {
    /// Opens the store in `dir`, or makes it.
    pub(crate) fn open(dir: &Path) -> Result<Self, redb::Error> {
        let db = Database::create(dir.join("journal.redb"))?;
        let write = db.begin_write()?;
        let id = {
            write.open_table(MIGRATIONS)?;
            write.open_table(HOOKS)?;
            let mut identity = write.open_table(IDENTITY)?;
            let kept = identity.get("journal")?.map(|kept| kept.value());
            match kept {
                Some(kept) => Uuid::from_u128(kept),
                None => {
                    let id = Uuid::new_v4();
                    identity.insert("journal", id.as_u128())?;
                    id
                }
            }
        };
        write.commit()?;
        Ok(Self { db: Arc::new(db), id, turn: Arc::default() })
    }

    /// Which store this is.
    pub(crate) fn id(&self) -> Uuid {
        self.id
    }

    /// Writes a record; it is on its medium when this returns.
    pub(crate) async fn put(&self, record: Record) -> Result<(), Problem> {
        let id = record.migration.id.as_u128();
        let name = point_of(record.migration.state);
        self.write(move |write| {
            point(&name).map_err(redb::StorageError::from)?;
            write.open_table(MIGRATIONS)?.insert(id, &*to_json(&record))?;
            Ok(())
        })
        .await
    }

    /// Forgets migrations that are long over.
    pub(crate) async fn forget(&self, ids: Vec<Uuid>) -> Result<(), Problem> {
        self.write(move |write| {
            let mut table = write.open_table(MIGRATIONS)?;
            for id in ids {
                table.remove(id.as_u128())?;
            }
            Ok(())
        })
        .await
    }

    /// Keeps what a hook said of a container, or forgets it.
    pub(crate) async fn put_hook(
        &self,
        id: String,
        state: Option<HookState>,
    ) -> Result<(), Problem> {
        self.write(move |write| {
            let mut table = write.open_table(HOOKS)?;
            match state {
                Some(state) => table.insert(&*id, &*to_json(&state))?,
                None => table.remove(&*id)?,
            };
            Ok(())
        })
        .await
    }

    /// All records, in no order.
    pub(crate) fn records(&self) -> Result<Vec<Record>, redb::Error> {
        let table = self.db.begin_read()?.open_table(MIGRATIONS)?;
        let mut records = Vec::new();
        for entry in table.iter()? {
            records.extend(from_json(entry?.1.value()));
        }
        Ok(records)
    }

    /// What hooks said.
    pub(crate) fn hooks(&self) -> Result<Vec<HookState>, redb::Error> {
        let table = self.db.begin_read()?.open_table(HOOKS)?;
        let mut hooks = Vec::new();
        for entry in table.iter()? {
            hooks.extend(from_json(entry?.1.value()));
        }
        Ok(hooks)
    }

    async fn write(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<(), redb::Error> + Send + 'static,
    ) -> Result<(), Problem> {
        let (db, turn) = (self.db.clone(), self.turn.clone());
        let write = async {
            let turn = turn.lock_owned().await;
            let write = move || -> Result<(), redb::Error> {
                let _turn = turn;
                let write = db.begin_write()?;
                change(&write)?;
                Ok(write.commit()?)
            };
            tokio::task::spawn_blocking(write).await
        };
        let failed = |err: &dyn std::fmt::Display| {
            let detail = format!("the journal cannot be written: {err}");
            Problem::new(ErrorCode::JournalFailed, "journal", detail)
        };
        let written = tokio::time::timeout(PATIENCE, write).await.map_err(|err| failed(&err))?;
        written.map_err(|err| failed(&err))?.map_err(|err| failed(&err))
    }
}

/// Name of the point at which a record of this state is written.
fn point_of(state: MigrationState) -> String {
    let name = match state {
        MigrationState::Out(state) => serde_json::to_value(state),
        MigrationState::In(state) => serde_json::to_value(state),
    };
    format!("journal.{}", name.ok().as_ref().and_then(|name| name.as_str()).unwrap_or_default())
}

/// The kernel's boot id.
pub(crate) fn boot_id() -> String {
    // Without /proc nothing else here works either, and says so.
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    // Our own types have no maps with strange keys, the only thing that fails.
    serde_json::to_vec(value).expect("our records are JSON")
}

fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    serde_json::from_slice(bytes)
        .inspect_err(|err| tracing::error!(%err, "a record of the journal cannot be read"))
        .ok()
}

#[cfg(test)]
mod tests {
    use dunlin_api::rest::{MigrationState, Progress, SourceState};

    use super::*;

    fn record(state: SourceState) -> Record {
        Record {
            migration: Migration {
                id: Uuid::from_u128(7),
                container: "web-1".parse().unwrap(),
                peer: "http://b:1".into(),
                state: MigrationState::Out(state),
                progress: Progress::default(),
                error: None,
                report: None,
                started_ms: 1,
                ended_ms: None,
            },
            token: Uuid::from_u128(8),
            worker: None,
            away: Some(Away {
                init: Process { pid: 1, start: 2 },
                origin: Origin::Dunlin,
                instance: None,
            }),
        }
    }

    #[tokio::test]
    async fn the_last_step_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let id = journal.id();
        journal.put(record(SourceState::Offered)).await.unwrap();
        journal.put(record(SourceState::Committing)).await.unwrap();
        drop(journal);
        let journal = Journal::open(dir.path()).unwrap();
        assert_eq!(journal.id(), id);
        assert_eq!(journal.records().unwrap(), [record(SourceState::Committing)]);
        journal.forget(vec![Uuid::from_u128(7)]).await.unwrap();
        assert_eq!(journal.records().unwrap(), []);
    }
}
