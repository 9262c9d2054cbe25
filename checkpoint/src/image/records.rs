//! Records whose bodies are encoded with postcard.

use serde::{Deserialize, Serialize};

use crate::resource::{fs, limits, mm, signals, threads, timers, tree};

/// What the image needs of a host, and the shape of the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Head {
    pub(crate) version: u16,
    pub(crate) arch: String,
    /// Length of the xsave area, in bytes: programs size buffers by it.
    pub(crate) xstate_len: u32,
    /// Checksum of the kernel's vDSO: programs remember addresses inside it.
    pub(crate) vdso: u32,
    pub(crate) nodes: Vec<tree::Node>,
}

/// One process, except its memory and files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) mm: mm::Image,
    pub(crate) fs: fs::Image,
    pub(crate) actions: Vec<signals::Action>,
    pub(crate) queue: signals::Queue,
    pub(crate) timers: timers::Image,
    pub(crate) limits: limits::Process,
    /// Leader first.
    pub(crate) threads: Vec<threads::Image>,
}

/// Pages of a process that were sent and are gone since: zeros again, or the
/// file's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Drop {
    pub(crate) pid: i32,
    /// `(start, end)`.
    pub(crate) ranges: Vec<(u64, u64)>,
}
