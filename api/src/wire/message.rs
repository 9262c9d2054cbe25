//! What frames say, except the image's records.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{FrameError, Kind};
use crate::{
    Problem,
    rest::{ContainerId, MigrateOptions},
};

/// First bytes of every `Hello`.
pub const MAGIC: [u8; 8] = *b"dunlin\r\n";

/// The source's greeting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// Versions of the protocol the source speaks.
    pub versions: Vec<u16>,
}

/// Clocks as the container sees them, when the offer was written. The
/// destination sets a time namespace so that they go on from here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub monotonic_ns: i64,
    /// `CLOCK_BOOTTIME` in nanoseconds.
    pub boottime_ns: i64,
}

/// What the source wants to move, and what the destination needs for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Names the migration on both ends.
    pub migration: Uuid,
    /// Fencing token: whoever cannot show it learns and decides nothing.
    pub token: Uuid,
    /// Name of the source's node.
    pub node: String,
    /// The container, here and there.
    pub container: ContainerId,
    /// Bundle on the source, and the one asked for on the destination.
    pub bundle: Bundle,
    /// The container's annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its clocks.
    pub clocks: Clocks,
    /// What the destination must have.
    pub needs: Needs,
    /// What was asked of this migration.
    pub options: MigrateOptions,
}

/// Where a container's bundle lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Bundle {
    /// On the source.
    pub source: String,
    /// On the destination, where the user said so.
    pub destination: Option<String>,
}

/// What a container needs of its destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Needs {
    /// Architecture as `uname -m` says it.
    pub arch: String,
    /// Kernel release of the source.
    pub kernel: String,
    /// Instructions the processes may use, by the kernel's names.
    pub cpu_features: Vec<String>,
    /// Bytes of memory it occupies now.
    pub memory: u64,
    /// Processes it has now.
    pub processes: u64,
    /// Version of the image's records.
    pub image_version: u16,
}

/// What the image consisted of, so that a shortened one is noticed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Records sent.
    pub records: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
}

/// What the destination built.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sums {
    /// Processes in the tree.
    pub processes: u64,
    /// Threads in the tree.
    pub threads: u64,
    /// Pages filled.
    pub pages: u64,
    /// From the first record until all stood ready, in microseconds.
    pub restore_us: u64,
}

/// How the destination woke it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrived {
    /// From reading `Commit` until all threads ran, in microseconds.
    pub thaw_us: u64,
}

/// Any frame but those of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// [`Kind::Hello`].
    Hello(Hello),
    /// [`Kind::HelloAck`]: the version chosen.
    HelloAck(u16),
    /// [`Kind::Offer`].
    Offer(Box<Offer>),
    /// [`Kind::Prepared`].
    Prepared,
    /// [`Kind::Refused`].
    Refused(Problem),
    /// [`Kind::ImageEnd`].
    ImageEnd(End),
    /// [`Kind::Ready`].
    Ready(Sums),
    /// [`Kind::Commit`]: the fencing token.
    Commit(Uuid),
    /// [`Kind::Running`].
    Running(Arrived),
    /// [`Kind::Cancel`].
    Cancel(Problem),
    /// [`Kind::Error`].
    Error(Problem),
    /// [`Kind::Heartbeat`].
    Heartbeat,
    /// [`Kind::Sync`].
    Sync,
    /// [`Kind::Synced`].
    Synced,
}

impl Message {
    /// Kind of the frame that carries it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::HelloAck(_) => Kind::HelloAck,
            Self::Offer(_) => Kind::Offer,
            Self::Prepared => Kind::Prepared,
            Self::Refused(_) => Kind::Refused,
            Self::ImageEnd(_) => Kind::ImageEnd,
            Self::Ready(_) => Kind::Ready,
            Self::Commit(_) => Kind::Commit,
            Self::Running(_) => Kind::Running,
            Self::Cancel(_) => Kind::Cancel,
            Self::Error(_) => Kind::Error,
            Self::Heartbeat => Kind::Heartbeat,
            Self::Sync => Kind::Sync,
            Self::Synced => Kind::Synced,
        }
    }

    /// The frame's body.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let body = match self {
            Self::Hello(hello) => postcard::to_stdvec(hello),
            Self::HelloAck(version) => postcard::to_stdvec(version),
            Self::Offer(offer) => postcard::to_stdvec(offer),
            Self::Refused(problem) | Self::Cancel(problem) | Self::Error(problem) => {
                postcard::to_stdvec(problem)
            }
            Self::ImageEnd(end) => postcard::to_stdvec(end),
            Self::Ready(sums) => postcard::to_stdvec(sums),
            Self::Commit(token) => postcard::to_stdvec(token),
            Self::Running(arrived) => postcard::to_stdvec(arrived),
            Self::Prepared | Self::Heartbeat | Self::Sync | Self::Synced => Ok(Vec::new()),
        };
        body.map_err(|_| FrameError::Body(self.kind()))
    }

    /// Decodes the body of a frame whose checksum was right.
    pub fn decode(kind: Kind, body: &[u8]) -> Result<Self, FrameError> {
        Ok(match kind {
            Kind::Hello => {
                let hello: Hello = parse(kind, body)?;
                if hello.magic != MAGIC {
                    return Err(FrameError::Body(kind));
                }
                Self::Hello(hello)
            }
            Kind::HelloAck => Self::HelloAck(parse(kind, body)?),
            Kind::Offer => Self::Offer(parse(kind, body)?),
            Kind::Prepared => parse(kind, body).map(|()| Self::Prepared)?,
            Kind::Refused => Self::Refused(parse(kind, body)?),
            Kind::ImageEnd => Self::ImageEnd(parse(kind, body)?),
            Kind::Ready => Self::Ready(parse(kind, body)?),
            Kind::Commit => Self::Commit(parse(kind, body)?),
            Kind::Running => Self::Running(parse(kind, body)?),
            Kind::Cancel => Self::Cancel(parse(kind, body)?),
            Kind::Error => Self::Error(parse(kind, body)?),
            Kind::Heartbeat => parse(kind, body).map(|()| Self::Heartbeat)?,
            Kind::Sync => parse(kind, body).map(|()| Self::Sync)?,
            Kind::Synced => parse(kind, body).map(|()| Self::Synced)?,
            Kind::Image => return Err(FrameError::Body(kind)),
        })
    }
}

fn parse<T: DeserializeOwned>(kind: Kind, body: &[u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        _ => Err(FrameError::Body(kind)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same_meaning(kind in 1u16..16, body in prop::collection::vec(any::<u8>(), 0..96)) {
            let kind = Kind::try_from(kind).unwrap();
            if let Ok(message) = Message::decode(kind, &body) {
                prop_assert_eq!(message.kind(), kind);
                let again = message.encode().unwrap();
                prop_assert_eq!(Message::decode(kind, &again).unwrap(), message);
            }
        }
    }

    #[test]
    fn what_is_left_over_is_damage() {
        let mut body = Message::HelloAck(1).encode().unwrap();
        body.push(0);
        let damaged = Err(FrameError::Body(Kind::HelloAck));
        assert_eq!(Message::decode(Kind::HelloAck, &body), damaged);
    }
}
