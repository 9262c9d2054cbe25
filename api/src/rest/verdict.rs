//! What can move and what cannot.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ErrorCode;

/// How well one object can move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Judgement {
    /// Arrives as it was.
    Movable,
    /// Arrives with a named loss.
    Loss,
    /// Cannot move; the migration is refused.
    Refused,
}

/// The verdict on one object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// Node that says so.
    pub node: String,
    /// The object in the reader's words, e.g. `fd 9 of pid 4711`.
    pub object: String,
    /// How well it moves.
    pub judgement: Judgement,
    /// Why, e.g. `is an io_uring`.
    pub reason: String,
    /// What the user can do about it; empty when there is nothing.
    pub remedy: String,
    /// What a migration refused for this fails with.
    pub code: ErrorCode,
}

/// The verdict on a container and a destination.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Verdict {
    /// Whether nothing is refused.
    pub movable: bool,
    /// Everything that is not plainly movable.
    pub findings: Vec<Finding>,
}

impl Verdict {
    /// A verdict out of findings.
    #[must_use]
    pub fn of(findings: Vec<Finding>) -> Self {
        let movable = findings.iter().all(|f| f.judgement != Judgement::Refused);
        Self { movable, findings }
    }
}
