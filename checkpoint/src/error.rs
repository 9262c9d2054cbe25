//! Why a dump or a restore failed.

use std::io;

use nix::unistd::Pid;

use crate::verdict::Finding;

/// Why a process tree could not be dumped. It runs on whenever this is returned.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// Something in the tree is not movable; nothing was disturbed.
    #[error("{} {}", .0.object, .0.reason)]
    Refused(Box<Finding>),
    /// There is no such process.
    #[error("no process {0}")]
    NoProcess(Pid),
    /// The process ended while it was looked at.
    #[error("pid {0} ended during the dump")]
    Vanished(Pid),
    /// An operation on a process failed.
    #[error("cannot {what} of pid {pid}")]
    Process {
        /// What was tried, e.g. `read the registers`.
        what: &'static str,
        /// Process it was tried on.
        pid: Pid,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The image could not be written or sent.
    #[error("cannot write the image")]
    Sink(#[source] io::Error),
}

/// Why a process tree could not be restored. What was built is gone whenever
/// this is returned.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The image could not be read or received.
    #[error("cannot read the image")]
    Source(#[source] io::Error),
    /// The image contradicts itself or is of a version we do not know.
    #[error("the image is damaged: {0}")]
    Image(String),
    /// The image asks for something this host does not have.
    #[error("{object}: {reason}")]
    Missing {
        /// What is asked for, e.g. `file /usr/lib/libc.so.6`.
        object: String,
        /// Why it is not there.
        reason: String,
    },
    /// An operation failed on a process being built.
    #[error("cannot {what} of pid {pid}")]
    Process {
        /// What was tried.
        what: String,
        /// Process in the image's numbering.
        pid: i32,
        /// The kernel's answer.
        source: io::Error,
    },
}
