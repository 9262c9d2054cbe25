//! Migrations, their progress and their report.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{ContainerId, MigrationState};
use crate::Problem;

/// What becomes of established TCP connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TcpPolicy {
    /// They go on at the destination, which takes over their address.
    Keep,
    /// The program finds them closed by the peer.
    Close,
    /// The migration is refused while there is one.
    #[default]
    Refuse,
}

/// When memory moves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mechanism {
    /// Ahead of the freeze where that is safe, otherwise in it.
    #[default]
    Auto,
    /// All of it in the freeze.
    TotalCopy,
    /// Ahead of the freeze; where that is not safe the migration is refused.
    PreCopy,
}

/// Downtime aimed at unless another is asked for, in milliseconds.
pub const DOWNTIME_MS: u32 = 50;

/// What is asked of one migration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrateOptions {
    /// Established TCP connections.
    #[serde(default)]
    pub tcp: TcpPolicy,
    /// Carry file locks; without it a held lock is a refusal.
    #[serde(default)]
    pub file_locks: bool,
    /// Accept unix sockets to processes outside; they arrive closed.
    #[serde(default)]
    pub external_unix: bool,
    /// Accept a controlling terminal from outside.
    #[serde(default)]
    pub shell_job: bool,
    /// When memory moves.
    #[serde(default)]
    pub mechanism: Mechanism,
    /// Downtime aimed at, in milliseconds; default [`DOWNTIME_MS`].
    #[serde(default)]
    pub downtime_ms: Option<u32>,
}

/// Asks for a migration, or for the verdict on one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// URL of the destination's shim, or a peer's name.
    pub to: String,
    /// Absolute path of the bundle there, where it differs.
    #[serde(default)]
    pub bundle: Option<String>,
    /// Established TCP connections.
    #[serde(default)]
    pub tcp: TcpPolicy,
    /// Carry file locks; without it a held lock is a refusal.
    #[serde(default)]
    pub file_locks: bool,
    /// Accept unix sockets to processes outside; they arrive closed.
    #[serde(default)]
    pub external_unix: bool,
    /// Accept a controlling terminal from outside.
    #[serde(default)]
    pub shell_job: bool,
    /// When memory moves.
    #[serde(default)]
    pub mechanism: Mechanism,
    /// Downtime aimed at, in milliseconds; default [`DOWNTIME_MS`].
    #[serde(default)]
    pub downtime_ms: Option<u32>,
}

impl MigrateRequest {
    /// A request with nothing but its destination.
    #[must_use]
    pub fn to(to: impl Into<String>) -> Self {
        Self {
            to: to.into(),
            bundle: None,
            tcp: TcpPolicy::default(),
            file_locks: false,
            external_unix: false,
            shell_job: false,
            mechanism: Mechanism::default(),
            downtime_ms: None,
        }
    }

    /// What of it concerns the engine.
    #[must_use]
    pub fn options(&self) -> MigrateOptions {
        MigrateOptions {
            tcp: self.tcp,
            file_locks: self.file_locks,
            external_unix: self.external_unix,
            shell_job: self.shell_job,
            mechanism: self.mechanism,
            downtime_ms: self.downtime_ms,
        }
    }
}

/// What a migration is doing, in words for a progress bar.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Both nodes judge whether it can move.
    #[default]
    Checking,
    /// The destination makes the sandbox.
    Preparing,
    /// Pages are sent while the container runs.
    Copying,
    /// The container stands still.
    Frozen,
    /// The destination takes over.
    Switching,
    /// The source waits to learn whether the destination runs it.
    Asking,
    /// The source clears away what is left.
    Cleaning,
    /// It is over.
    Done,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// What it does now.
    pub phase: Phase,
    /// Bytes of image sent or received.
    pub bytes: u64,
    /// Bytes there will be, as far as known.
    pub total: u64,
    /// Records sent or received.
    pub records: u64,
    /// Bytes in the last second.
    pub rate: u64,
}

/// What a migration did. Times in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// From the request until the destination ran it.
    pub total_us: u64,
    /// From the first stop request until the destination said `Running`.
    pub downtime_us: u64,
    /// Of that, until all threads stood still.
    pub freeze_us: u64,
    /// Of that, dumping and sending.
    pub dump_us: u64,
    /// Of that, from the last record until the destination was ready.
    pub ready_us: u64,
    /// Of that, from `Commit` to `Running`.
    pub commit_us: u64,
    /// At the destination, from the first record until all stood ready.
    pub restore_us: u64,
    /// At the destination, from `Commit` until all threads ran.
    pub thaw_us: u64,
    /// Processes moved.
    pub processes: u64,
    /// Threads moved.
    pub threads: u64,
    /// Pages whose content was sent.
    pub pages: u64,
    /// Bytes of image sent.
    pub bytes: u64,
    /// Rounds of memory sent ahead of the freeze.
    #[serde(default)]
    pub rounds: u32,
    /// Of the bytes, those sent ahead.
    #[serde(default)]
    pub ahead_bytes: u64,
    /// The longest the container stood still for a round to begin.
    #[serde(default)]
    pub watch_us: u64,
}

/// A migration, out of this node or into it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// Its id, the same on both nodes.
    pub id: Uuid,
    /// What moves.
    pub container: ContainerId,
    /// The other node: a URL or a name.
    pub peer: String,
    /// Direction and state.
    #[serde(flatten)]
    pub state: MigrationState,
    /// How far it is.
    pub progress: Progress,
    /// Why it failed.
    pub error: Option<Problem>,
    /// What it did, when it succeeded.
    pub report: Option<Report>,
    /// When it was asked for, in milliseconds since 1970.
    pub started_ms: u64,
    /// When it was over.
    pub ended_ms: Option<u64>,
}

/// One event of a migration's stream: the whole migration as it stands then.
pub type Event = Migration;

/// How an operator ends a doubt by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// Where it runs, as the operator has made sure.
    pub runs: Runs,
}

/// Where a container in doubt runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Runs {
    /// At the destination: the stopped original is ended.
    There,
    /// Not at the destination: the original runs on. If it does run there,
    /// there are two of it from then on.
    Here,
}
