//! The protocol between two nodes, after HTTP's `Upgrade: dunlin-migrate/1`.
//!
//! ```text
//! source                               destination
//!   Hello{versions} ------------------>
//!     <------------------------- HelloAck{version}
//!   Offer{token, container, ...} ----->            makes the sandbox
//!     <---------------- Prepared | Refused{why}
//!   (freezes)
//!   Image, Image, ... ImageEnd ------->            builds the tree
//!     <------------------------------------ Ready
//!   (leaves it stopped, whatever happens now)
//!   Commit{token} -------------------->            runs it
//!     <---------------------------------- Running
//! ```
//!
//! `Heartbeat` goes both ways at any time, `Cancel` from the source until
//! `Commit`, `Error` from either. A frame is a [`Header`], a checksum over
//! header and body, and the body.

mod destination;
mod header;
mod link;
mod message;
mod phase;
mod source;

pub use destination::{Committed, DestinationLink};
pub use header::{FrameError, Header, Kind, MAX_BODY, PREFIX, Prefix};
pub use link::{Beat, Frame, Limits, LinkError, Receiver, Sender};
pub use message::{Arrived, Bundle, Clocks, End, Hello, MAGIC, Message, Needs, Offer, Sums};
pub use phase::{OutOfOrder, Phase, Side};
pub use source::{Canceller, PeerReady, SourceLink, Unanswered};

/// Versions of the protocol spoken here, the newest last.
pub const VERSIONS: &[u16] = &[1];

/// Token of the HTTP `Upgrade` header.
pub const UPGRADE: &str = "dunlin-migrate/1";

/// The highest version both ends speak.
#[must_use]
pub fn choose(offered: &[u16], ours: &[u16]) -> Option<u16> {
    ours.iter().copied().filter(|version| offered.contains(version)).max()
}
