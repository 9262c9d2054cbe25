//! What shims ask each other outside of a migration's stream.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::ContainerId;
use crate::{
    Problem,
    wire::{Bundle, Needs},
};

/// Asks a destination whether it would take a container; the answer is a
/// [`super::Verdict`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CanAccept {
    /// Name of the node that asks.
    pub node: String,
    /// Id the container would have.
    pub container: ContainerId,
    /// Where its bundle lies.
    pub bundle: Bundle,
    /// What it needs.
    pub needs: Needs,
    /// Versions of the protocol the source speaks.
    pub wire_versions: Vec<u16>,
}

/// What became of a migration at its destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PeerMigration {
    /// The migration.
    pub id: Uuid,
    /// What became of it.
    pub outcome: PeerOutcome,
    /// Why it failed there.
    pub error: Option<Problem>,
}

/// What a destination knows for certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PeerOutcome {
    /// Not decided yet: ask again.
    Pending,
    /// It ran there: it must never run at the source again.
    Running,
    /// Nothing of it is left there and it will never run there.
    Discarded,
}
