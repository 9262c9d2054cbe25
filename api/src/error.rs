//! What can go wrong, as a closed set of codes and one sentence.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Media type of a [`Problem`] over HTTP (RFC 9457).
pub const PROBLEM_JSON: &str = "application/problem+json";

/// Why a request or a migration failed. The order is the wire format: append.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The request does not parse or contradicts itself.
    BadRequest,
    /// The request's body is longer than accepted.
    TooLarge,
    /// The caller has not shown who it is.
    Unauthenticated,
    /// The caller may not do this.
    Forbidden,
    /// There is no such path.
    NoRoute,
    /// No container of this id is known here.
    UnknownContainer,
    /// No migration of this id is known here.
    UnknownMigration,
    /// The container has no running process.
    NotRunning,
    /// The container is being migrated already.
    AlreadyMigrating,
    /// As many migrations run here as are allowed.
    TooManyMigrations,
    /// The node is being emptied and takes nothing in.
    Draining,
    /// The container holds something that cannot move.
    Unmovable,
    /// No connection to the peer could be made.
    PeerUnreachable,
    /// The peer said nothing for longer than allowed.
    PeerSilent,
    /// The peers share no version of the protocol or the image.
    VersionMismatch,
    /// What came over the connection is cut short or altered.
    StreamDamaged,
    /// The peer said something that has no place at this point.
    OutOfOrder,
    /// The destination has no bundle for the container.
    BundleMissing,
    /// The destination has not enough free memory.
    NoRoom,
    /// The destination already has a container of this id.
    IdTaken,
    /// The destination has another processor architecture.
    ArchMismatch,
    /// The destination's processor lacks instructions the container may use.
    CpuMismatch,
    /// The destination's kernel is too old.
    KernelTooOld,
    /// Somebody cancelled it.
    Cancelled,
    /// It cannot be cancelled any more.
    TooLate,
    /// The container could not be dumped.
    DumpFailed,
    /// The container could not be built at the destination.
    RestoreFailed,
    /// The container's runtime did not do what it was asked.
    RuntimeFailed,
    /// The source does not know yet whether the destination runs the container.
    InDoubt,
    /// The fencing token is not the one of this migration.
    WrongToken,
    /// This is not possible for this container.
    NotSupported,
    /// A worker process ended without saying why.
    WorkerDied,
    /// The journal could not be written, so the step was not taken.
    JournalFailed,
    /// A fault of our own.
    Internal,
}

impl ErrorCode {
    /// The HTTP status that goes with the code.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden | Self::WrongToken => 403,
            Self::NoRoute | Self::UnknownContainer | Self::UnknownMigration => 404,
            Self::TooLarge => 413,
            Self::AlreadyMigrating
            | Self::NotRunning
            | Self::IdTaken
            | Self::TooLate
            | Self::Cancelled
            | Self::InDoubt
            | Self::OutOfOrder => 409,
            Self::Unmovable
            | Self::BundleMissing
            | Self::ArchMismatch
            | Self::CpuMismatch
            | Self::KernelTooOld
            | Self::VersionMismatch
            | Self::NotSupported => 422,
            Self::TooManyMigrations => 429,
            Self::PeerUnreachable | Self::StreamDamaged => 502,
            Self::Draining => 503,
            Self::PeerSilent => 504,
            Self::NoRoom => 507,
            Self::DumpFailed
            | Self::RestoreFailed
            | Self::RuntimeFailed
            | Self::WorkerDied
            | Self::JournalFailed
            | Self::Internal => 500,
        }
    }

    /// Whether it is a verdict on the container or the destination, found
    /// before anything was disturbed.
    #[must_use]
    pub fn is_refusal(self) -> bool {
        matches!(
            self,
            Self::Unmovable
                | Self::BundleMissing
                | Self::NoRoom
                | Self::IdTaken
                | Self::ArchMismatch
                | Self::CpuMismatch
                | Self::KernelTooOld
                | Self::VersionMismatch
                | Self::NotSupported
                | Self::Draining
                | Self::TooManyMigrations
        )
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// An [`ErrorCode`] with its sentence: the body of every failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{detail}")]
pub struct Problem {
    /// What kind of failure; programs look at this alone.
    pub code: ErrorCode,
    /// HTTP status, repeated for those who only keep the body.
    pub status: u16,
    /// One sentence for people, lower case, no full stop.
    pub detail: String,
    /// What it failed on, e.g. a container's id.
    pub object: String,
}

impl Problem {
    /// A problem with `object`.
    #[must_use]
    pub fn new(code: ErrorCode, object: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { code, status: code.status(), detail: detail.into(), object: object.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_read_as_in_json() {
        assert_eq!(ErrorCode::PeerUnreachable.to_string(), "peer-unreachable");
        let problem = Problem::new(ErrorCode::IdTaken, "web-1", "web-1 exists on b already");
        let text = serde_json::to_string(&problem).unwrap();
        assert!(text.contains(r#""code":"id-taken","status":409"#), "{text}");
        assert_eq!(serde_json::from_str::<Problem>(&text).unwrap(), problem);
    }
}
