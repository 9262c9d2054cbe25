//! What a worker process and its shim tell each other: JSON, one value a line,
//! over one socket.

use serde::{Deserialize, Serialize};

use crate::{
    Problem,
    rest::{DestinationState, Phase, Report, SourceState, Verdict},
    wire::{Needs, Offer},
};

/// From the worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The source is in this state from now on.
    Source(SourceState),
    /// The destination is in this state from now on.
    Destination(DestinationState),
    /// How far it is.
    Progress {
        /// What it does.
        phase: Phase,
        /// Bytes of image so far.
        bytes: u64,
        /// Records so far.
        records: u64,
    },
    /// The source is about to commit and waits for [`Reply::MayCommit`].
    MayCommit,
    /// What was judged, and what a destination must have.
    Judged(Verdict, Needs),
    /// It is done; the last event of a source worker that succeeded.
    Report(Report),
    /// It failed; the last event.
    Failed(Problem),
}

/// To the worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// What the source offered; the first line for a destination worker.
    Offer(Box<Offer>),
    /// The journal knows that a commit may have been sent.
    MayCommit,
    /// It does not, and will not.
    MayNot(Problem),
}
