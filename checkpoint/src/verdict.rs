//! What can and what cannot move, object by object.

use serde::{Deserialize, Serialize};

/// How well one object can move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Judgement {
    /// Arrives as it was.
    Movable,
    /// Arrives with a named loss.
    Loss,
    /// Cannot move: the dump is refused.
    Refused,
}

/// The verdict on one object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The object in the reader's words, e.g. `fd 9 of pid 4711`.
    pub object: String,
    /// How well it moves.
    pub judgement: Judgement,
    /// Why, e.g. `is an io_uring`.
    pub reason: String,
    /// What the user can do about it; empty when there is nothing.
    pub remedy: String,
}

/// The verdict on a whole tree: everything that is not plainly movable.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Losses and refusals, in the order they were met.
    pub findings: Vec<Finding>,
}

impl Verdict {
    /// Whether nothing is refused.
    #[must_use]
    pub fn is_movable(&self) -> bool {
        self.findings.iter().all(|f| f.judgement != Judgement::Refused)
    }
}
