//! The node itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A node: what it is and what it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Version of the shim.
    pub version: String,
    /// Versions of the migration protocol it speaks.
    pub wire_versions: Vec<u16>,
    /// Version of the image's records it writes and reads.
    pub image_version: u16,
    /// Kernel release.
    pub kernel: String,
    /// Architecture as `uname -m` says it.
    pub arch: String,
    /// Processors.
    pub cpus: usize,
    /// Instructions it has, by the kernel's names.
    pub cpu_features: Vec<String>,
    /// Bytes of memory.
    pub memory_total: u64,
    /// Bytes of memory that could be used now.
    pub memory_available: u64,
    /// Containers known.
    pub containers: usize,
    /// Migrations running now.
    pub migrations: usize,
    /// Most migrations at once.
    pub max_migrations: usize,
    /// Whether it is being emptied.
    pub draining: bool,
    /// Nodes it knows.
    pub peers: Vec<Peer>,
}

/// A node that another one knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// URL of its shim.
    pub url: String,
}
