//! What shims ask each other outside of a migration's stream.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{ContainerId, Finding};
use crate::{
    Problem,
    wire::{Bundle, Needs},
};

/// Asks a destination whether it would take a container.
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

/// A destination's answer to [`CanAccept`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Acceptance {
    /// Who answers.
    pub instance: Instance,
    /// What speaks against it.
    pub findings: Vec<Finding>,
}

/// Which memory a node answers from. A node that does not know a migration
/// says something only if it is still the one that was asked to take it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Instance {
    /// Name of the node.
    pub node: String,
    /// Made with its journal.
    pub journal: Uuid,
    /// The kernel's boot id: nothing outlives it.
    pub boot: String,
}

/// What became of a migration at its destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PeerMigration {
    /// The migration.
    pub id: Uuid,
    /// Who answers.
    pub instance: Instance,
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
    /// It was never heard of.
    Unknown,
}
