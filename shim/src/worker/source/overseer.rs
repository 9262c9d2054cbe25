//! The daemon, as its source worker sees it: over the worker's stdout.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use dunlin_api::{
    ErrorCode, Problem,
    wire::Canceller,
    worker::{Event, Reply},
};
use nix::sys::signal::{SigSet, Signal};

use super::{Job, Overseer};

/// Longest time the daemon may take to write down a commit.
const PATIENCE: Duration = Duration::from_secs(7);

pub(super) struct Shim {
    events: UnixStream,
    replies: BufReader<UnixStream>,
}

impl Shim {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        Ok(Self { replies: BufReader::new(socket.try_clone()?), events: socket })
    }

    /// What is asked of this worker, the first line.
    pub(super) fn job(&mut self) -> io::Result<Job> {
        let mut line = String::new();
        self.replies.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Overseer for Shim {
    fn tell(&mut self, event: &Event) {
        let line = serde_json::to_string(event).unwrap_or_default() + "\n";
        // A daemon that is gone learns the outcome from the world when it is back.
        if let Err(err) = self.events.write_all(line.as_bytes()) {
            tracing::warn!(%err, "the shim does not listen");
        }
    }

    fn may_commit(&mut self) -> Result<(), Problem> {
        self.tell(&Event::MayCommit);
        let mut line = String::new();
        // Longer than the daemon waits for its journal: it says what is wrong
        // unless it is stopped or hangs itself.
        if let Err(err) = self.replies.get_ref().set_read_timeout(Some(PATIENCE)) {
            tracing::warn!(%err, "the shim's answer is waited for without a limit");
        }
        match self.replies.read_line(&mut line).map(|_| serde_json::from_str(&line)) {
            Ok(Ok(Reply::MayCommit)) => Ok(()),
            Ok(Ok(Reply::MayNot(problem))) => Err(problem),
            _ => Err(Problem::new(
                ErrorCode::JournalFailed,
                "journal",
                "the shim did not write down the commit",
            )),
        }
    }

    /// SIGTERM, which all threads block, cancels.
    fn begin(&mut self, canceller: Canceller) -> Result<(), Problem> {
        let failed = |err: io::Error| {
            Problem::new(ErrorCode::Internal, "worker", format!("cannot be cancelled: {err}"))
        };
        let socket = self.events.try_clone().map_err(failed)?;
        let watch = move || {
            let mut set = SigSet::empty();
            set.add(Signal::SIGTERM);
            while set.wait().is_ok() {
                if canceller.cancel() {
                    // Wakes who waits for leave to commit.
                    socket.shutdown(Shutdown::Read).ok();
                    return;
                }
                tracing::warn!("too late to cancel: the commit was sent");
            }
        };
        thread::Builder::new().name("cancel".into()).spawn(watch).map(drop).map_err(failed)
    }
}
