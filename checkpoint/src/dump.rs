//! Source side: freeze a tree, dump it, let it go or end it.

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::{DumpError, Options, Verdict, image::ImageSink};

/// What a dump did. Times in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpReport {
    /// Processes in the tree.
    pub processes: u64,
    /// Threads in the tree.
    pub threads: u64,
    /// Pages whose content was written.
    pub pages: u64,
    /// Bytes put into the sink.
    pub bytes: u64,
    /// From the first stop request until all threads stood still.
    pub freeze_us: u64,
    /// From there until the last record was written.
    pub dump_us: u64,
}

/// Judges the tree below `root` (its pid in the caller's pid namespace)
/// without disturbing it.
pub fn inspect(root: Pid, options: &Options) -> Result<Verdict, DumpError> {
    let _ = options;
    Err(DumpError::NoProcess(root))
}

/// Refuses what cannot move, then stops every thread of the tree.
pub fn freeze(root: Pid, options: &Options) -> Result<Frozen, DumpError> {
    let _ = options;
    Err(DumpError::NoProcess(root))
}

/// A stopped tree that is still ours: dropping this thaws it.
#[must_use = "dropping it thaws the tree"]
pub struct Frozen {
    _root: Pid,
}

impl Frozen {
    /// Writes the whole image.
    pub fn dump(&mut self, sink: &mut dyn ImageSink) -> Result<DumpReport, DumpError> {
        let _ = sink;
        Err(DumpError::NoProcess(self._root))
    }

    /// Lets the tree run on and says when that failed.
    pub fn thaw(self) -> Result<(), DumpError> {
        Ok(())
    }

    /// Ends every process of the tree without one more instruction of theirs.
    pub fn kill(self) -> Result<(), DumpError> {
        Ok(())
    }

    /// Detaches but leaves every process stopped (SIGSTOP): the caller does
    /// not know whether the destination runs it, so nobody may run it here.
    pub fn park(self) -> Result<(), DumpError> {
        Ok(())
    }
}
