//! The terminal of a container that runs in the foreground of ours.
//!
//! libcontainer makes it inside the container and hands its other end to a
//! socket. Where the caller gave no socket of its own, the end comes here and
//! we stand between it and our own terminal.

use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result};
use oci_spec::runtime::Process;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{self, OptionalActions, Termios};

use crate::container::Root;
use crate::spec;

/// Where a terminal will be handed over.
#[derive(Debug)]
pub(crate) struct Console {
    dir: PathBuf,
    listener: UnixListener,
}

/// A container's terminal, joined to ours until dropped.
#[derive(Debug)]
pub(crate) struct Terminal {
    master: File,
    /// How our own terminal was set before.
    before: Option<Termios>,
}

impl Console {
    /// Opens a socket in the state directory.
    fn new(root: &Root) -> Result<Self> {
        let dir = root.path().join(format!(".console-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        match UnixListener::bind(dir.join("socket")) {
            Ok(listener) => Ok(Self { dir, listener }),
            Err(err) => {
                fs::remove_dir(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
                Err(err).context("cannot open a console socket")
            }
        }
    }

    /// Opens one where a process has a terminal, stays in the foreground and
    /// the caller has `given` no socket.
    pub(crate) fn if_needed(
        root: &Root,
        process: &Process,
        detach: bool,
        given: Option<&Path>,
    ) -> Result<Option<Self>> {
        let needed = spec::has_terminal(process) && !detach && given.is_none();
        needed.then(|| Self::new(root)).transpose()
    }

    /// Path of the socket.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join("socket")
    }

    /// Takes the terminal that the container's process has sent.
    pub(crate) fn accept(self) -> Result<Terminal> {
        let (stream, _) = self.listener.accept().context("nobody handed a terminal over")?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut name = [0; 256];
        let name = &mut [IoSliceMut::new(&mut name)];
        recvmsg(&stream, name, &mut control, RecvFlags::CMSG_CLOEXEC)
            .context("cannot receive the terminal")?;
        let master = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        Terminal::join(master.context("no terminal came with the message")?)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Err(err) = fs::remove_dir_all(&self.dir) {
            tracing::warn!(%err, dir = %self.dir.display(), "cannot remove");
        }
    }
}

impl Terminal {
    /// Joins it to our stdin, which becomes raw when it is a terminal itself.
    fn join(master: OwnedFd) -> Result<Self> {
        let stdin = io::stdin();
        let before = match termios::tcgetattr(&stdin) {
            Ok(before) => {
                let mut raw = before.clone();
                raw.make_raw();
                termios::tcsetattr(&stdin, OptionalActions::Now, &raw)
                    .context("cannot make our terminal raw")?;
                Some(before)
            }
            Err(_) => None,
        };
        let terminal = Self { master: File::from(master), before };
        terminal.resize();
        Ok(terminal)
    }

    /// Passes on what is typed, in a thread of its own.
    ///
    /// To be called when signals are held back: a thread that does not hold
    /// them would take the SIGCHLD that we wait for.
    pub(crate) fn type_along(&self) -> Result<()> {
        let mut keys = self.master.try_clone().context("cannot share the terminal")?;
        // It blocks in a read that nothing ends; it goes when we do.
        thread::spawn(move || io::copy(&mut io::stdin().lock(), &mut keys));
        Ok(())
    }

    /// Gives it the size of ours.
    pub(crate) fn resize(&self) {
        if let Ok(size) = termios::tcgetwinsize(io::stdin())
            && let Err(err) = termios::tcsetwinsize(&self.master, size)
        {
            tracing::warn!(%err, "cannot resize the container's terminal");
        }
    }

    /// Passes on what the container wrote; `false` when nothing more can come.
    pub(crate) fn relay(&mut self) -> Result<bool> {
        let mut bytes = [0; 4096];
        match self.master.read(&mut bytes) {
            // The last of the container's ends is closed.
            Err(err) if err.raw_os_error() == Some(nix::libc::EIO) => Ok(false),
            Err(err) => Err(err).context("cannot read the container's terminal"),
            Ok(0) => Ok(false),
            Ok(len) => {
                let mut stdout = io::stdout();
                stdout.write_all(&bytes[..len]).context("cannot write to stdout")?;
                stdout.flush().context("cannot write to stdout")?;
                Ok(true)
            }
        }
    }
}

impl AsFd for Terminal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && let Err(err) = termios::tcsetattr(io::stdin(), OptionalActions::Now, before)
        {
            tracing::warn!(%err, "cannot set our terminal back");
        }
    }
}
