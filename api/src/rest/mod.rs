//! What the REST API speaks: requests, answers and events.

mod container;
mod drain;
mod id;
mod migration;
mod node;
mod peer;
mod state;
mod verdict;

pub use container::{CheckpointRequest, Container, HookState, Origin, RestoreRequest, Status};
pub use drain::{Drain, DrainRequest, DrainState};
pub use id::{BadId, ContainerId};
pub use migration::{
    DOWNTIME_MS, Event, Mechanism, MigrateOptions, MigrateRequest, Migration, Phase, Progress,
    Report, ResolveRequest, Runs, TcpPolicy,
};
pub use node::{Node, Peer};
pub use peer::{Acceptance, CanAccept, Instance, PeerMigration, PeerOutcome};
pub use state::{DestinationState, MigrationState, SourceState};
pub use verdict::{Finding, Judgement, Verdict};

/// Longest request body accepted, in bytes.
pub const MAX_REQUEST: usize = 256 << 10;
