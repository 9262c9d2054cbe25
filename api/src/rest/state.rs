//! The hand-over as two state machines, one on each end.
//!
//! ```text
//! source:       Offered -> Preparing -> Copying -> Frozen -> Committing -> Departed
//!                   \________\___________\__________\-> RolledBack   \-> InDoubt -> (asks)
//! destination:  Accepted -> Preparing -> Filling -> Ready  -> Committed -> Running
//!                   \________\___________\__________\________\-> Discarded
//! ```

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// States of the node that has the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SourceState {
    /// Asked for, nothing done.
    Offered,
    /// The destination makes the sandbox; the container runs.
    Preparing,
    /// Memory is sent; the container runs.
    Copying,
    /// The container stands still; what is left is sent.
    Frozen,
    /// `Commit` may have been sent.
    Committing,
    /// `Commit` was sent and not answered: the container stays stopped until
    /// the destination says what became of it.
    InDoubt,
    /// The destination runs it. Final.
    Departed,
    /// It runs here as if nothing had been. Final.
    RolledBack,
}

/// States of the node that gets the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DestinationState {
    /// The offer was read and found acceptable.
    Accepted,
    /// The sandbox is being made.
    Preparing,
    /// The image comes in.
    Filling,
    /// The tree stands and has not run.
    Ready,
    /// The source gave it up; it is being woken.
    Committed,
    /// It runs. Final.
    Running,
    /// Nothing of it is left and none of it ever ran. Final.
    Discarded,
}

impl SourceState {
    /// Whether `self` may be followed by `next`.
    #[must_use]
    pub fn leads_to(self, next: Self) -> bool {
        match (self, next) {
            (Self::Offered, Self::Preparing)
            | (Self::Preparing, Self::Copying)
            | (Self::Preparing | Self::Copying, Self::Frozen)
            | (Self::Frozen, Self::Committing)
            | (Self::Committing, Self::InDoubt)
            | (Self::Committing | Self::InDoubt, Self::Departed) => true,
            (from, Self::RolledBack) => !from.is_final(),
            _ => false,
        }
    }

    /// Whether nothing follows.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Departed | Self::RolledBack)
    }
}

impl DestinationState {
    /// Whether `self` may be followed by `next`.
    #[must_use]
    pub fn leads_to(self, next: Self) -> bool {
        match (self, next) {
            (Self::Accepted, Self::Preparing)
            | (Self::Preparing, Self::Filling)
            | (Self::Filling, Self::Ready)
            | (Self::Ready, Self::Committed)
            | (Self::Committed, Self::Running) => true,
            (from, Self::Discarded) => !from.is_final(),
            _ => false,
        }
    }

    /// Whether nothing follows.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Running | Self::Discarded)
    }
}

/// State of a migration, with the direction it has from this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "direction", content = "state", rename_all = "lowercase")]
pub enum MigrationState {
    /// Away from here.
    Out(SourceState),
    /// To here.
    In(DestinationState),
}

impl MigrationState {
    /// Whether nothing follows.
    #[must_use]
    pub fn is_final(self) -> bool {
        match self {
            Self::Out(state) => state.is_final(),
            Self::In(state) => state.is_final(),
        }
    }

    /// Whether `self` may be followed by `next`.
    #[must_use]
    pub fn leads_to(self, next: Self) -> bool {
        match (self, next) {
            (Self::Out(from), Self::Out(to)) => from.leads_to(to),
            (Self::In(from), Self::In(to)) => from.leads_to(to),
            _ => false,
        }
    }

    /// Whether the container went where it should.
    #[must_use]
    pub fn is_success(self) -> bool {
        matches!(self, Self::Out(SourceState::Departed) | Self::In(DestinationState::Running))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: [SourceState; 8] = [
        SourceState::Offered,
        SourceState::Preparing,
        SourceState::Copying,
        SourceState::Frozen,
        SourceState::Committing,
        SourceState::InDoubt,
        SourceState::Departed,
        SourceState::RolledBack,
    ];

    #[test]
    fn what_is_final_is_never_left_and_departing_needs_a_commit() {
        for from in SOURCE {
            for to in SOURCE {
                assert!(!(from.is_final() && from.leads_to(to)), "{from:?} -> {to:?}");
                if to == SourceState::Departed && from.leads_to(to) {
                    assert!(matches!(from, SourceState::Committing | SourceState::InDoubt));
                }
            }
        }
        assert!(!DestinationState::Ready.leads_to(DestinationState::Running));
        assert!(DestinationState::Committed.leads_to(DestinationState::Discarded));
    }

    #[test]
    fn direction_and_state_stand_side_by_side() {
        let state = MigrationState::Out(SourceState::InDoubt);
        let json = r#"{"direction":"out","state":"in-doubt"}"#;
        assert_eq!(serde_json::to_string(&state).unwrap(), json);
    }
}
