//! Emptying a node.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::TcpPolicy;

/// Asks a node to move everything away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// Where to, in turns: URLs or peers' names; all peers when empty.
    #[serde(default)]
    pub to: Vec<String>,
    /// How many at once; as many as the node allows when left out.
    #[serde(default)]
    pub parallel: Option<usize>,
    /// Established TCP connections.
    #[serde(default)]
    pub tcp: TcpPolicy,
}

/// How far a drain is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Drain {
    /// What it does.
    pub state: DrainState,
    /// Containers that were to be moved.
    pub total: usize,
    /// Migrations started for them, in order; the last attempt of each.
    pub migrations: Vec<Uuid>,
    /// Containers that have left.
    pub moved: usize,
    /// Containers that stay, as no destination took them.
    pub stayed: usize,
}

/// What a drain does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DrainState {
    /// The node works as usual.
    #[default]
    Off,
    /// Containers are leaving, none may come in.
    Draining,
    /// All that could leave has left, none may come in.
    Drained,
}
