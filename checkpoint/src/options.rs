//! What the caller wants of one dump.

use serde::{Deserialize, Serialize};

/// What becomes of established TCP connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TcpPolicy {
    /// They go on at the destination, which must take over their address.
    Keep,
    /// The program finds them closed by the peer.
    Close,
    /// The dump is refused while there is one.
    #[default]
    Refuse,
}

/// Options of one dump.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Established TCP connections.
    pub tcp: TcpPolicy,
    /// Carry POSIX, OFD and flock locks; without it a held lock is a refusal.
    pub file_locks: bool,
    /// Accept unix sockets connected to a process outside the tree; the
    /// program finds them closed.
    pub external_unix: bool,
    /// Accept a controlling terminal that belongs to a session outside the tree.
    pub shell_job: bool,
    /// Drop TCP connections that nobody has accepted yet; without it they are
    /// a refusal, unless established ones are closed too.
    #[serde(default)]
    pub skip_in_flight: bool,
}
