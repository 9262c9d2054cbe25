//! Children of a scenario, each with a check of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, pipe2};

use crate::{sys, world};

/// Where this process says that its world stands. A child drops its parent's.
static READY: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// A process that we started and that checks itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fork(pub(crate) Pid);

/// Starts a child that runs `body` and ends with code 0 if that is content.
/// Returns when the child called [`ready`].
pub(crate) fn fork(body: impl FnOnce() -> Result<()>) -> Result<Fork> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    match sys::fork()? {
        ForkResult::Parent { child } => {
            drop(write);
            // To the end: a pipe still open would be taken for part of its world.
            let mut said = Vec::new();
            File::from(read).read_to_end(&mut said)?;
            ensure!(said == b"r", "a child failed to set up");
            Ok(Fork(child))
        }
        ForkResult::Child => {
            drop(read);
            *READY.lock().expect("nobody panics with it") = Some(write);
            let verdict = body();
            if let Err(err) = &verdict {
                let told = world::say(&format!("failed: {err:#}"));
                assert!(told.is_ok(), "{told:?}");
            }
            sys::exit(i32::from(verdict.is_err()))
        }
    }
}

/// Tells the parent that this process's world stands.
pub(crate) fn ready() -> Result<()> {
    let pipe = READY.lock().expect("nobody panics with it").take().context("already ready")?;
    File::from(pipe).write_all(b"r")?;
    Ok(())
}

/// The whole of a child that has nothing to set up: waits, then checks.
pub(crate) fn on_question(check: impl FnOnce() -> Result<()>) -> Result<()> {
    ready()?;
    world::wait_for_question()?;
    check()
}

impl Fork {
    /// Asks the child, collects it, and wants it to be content.
    pub(crate) fn ask(self) -> Result<()> {
        kill(self.0, Signal::SIGUSR2).with_context(|| format!("child {} is gone", self.0))?;
        self.content()
    }

    /// Collects the child, which must be content.
    pub(crate) fn content(self) -> Result<()> {
        let status = waitpid(self.0, None)?;
        ensure!(status == WaitStatus::Exited(self.0, 0), "child ended: {status:?}");
        Ok(())
    }
}
