//! Worker processes: a migration's blocking half, apart from the daemon so that
//! a crash of either is survived alone.
//!
//! Its stdin is the peer's stream, its stdout a socket on which [`Event`]s and
//! [`Reply`]s go as lines of JSON, its stderr a log file.

pub(crate) mod source;
pub(crate) mod tree;

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::Path,
    process::Stdio,
    time::Duration,
};

use dunlin_api::{
    client::Conn,
    worker::{Event, Reply},
};
use rustix::process::Signal;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    process::Command,
};

use crate::{
    process::Process,
    reaper::{self, Own},
};

/// Longest line a worker may write.
const MAX_LINE: u64 = 1 << 20;

/// How long the last events of a worker that is gone are waited for; they have
/// been written, and only have to be seen.
const LAST: Duration = Duration::from_millis(200);

/// The daemon's end of a worker.
pub(crate) struct Worker {
    child: Own,
    /// Which process it is.
    pub(crate) process: Option<Process>,
    events: BufReader<OwnedReadHalf>,
    replies: OwnedWriteHalf,
    /// What has come of the next line.
    line: Vec<u8>,
    ended: bool,
    /// Inode of its end of the socket.
    socket: u64,
    /// Longest time it may say nothing.
    patience: Duration,
    stuck: bool,
}

impl Worker {
    /// Starts `command` with `stream` as its stdin; its stderr is appended to `log`.
    pub(crate) fn spawn(
        mut command: Command,
        stream: Option<OwnedFd>,
        log: &Path,
        patience: Duration,
    ) -> io::Result<Self> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let socket = rustix::fs::fstat(&theirs)?.st_ino;
        command
            .stdin(stream.map_or_else(Stdio::null, Stdio::from))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .stderr(append(log)?)
            // Away from the terminal's ^C: the daemon tells it when to stop.
            .process_group(0);
        let child = reaper::spawn(&mut command)?;
        // Our copy of its socket and of the stream must not outlive it here.
        drop(command);
        let process = child.id().and_then(|pid| Process::find(pid.try_into().ok()?));
        let (events, replies) = UnixStream::from_std(ours)?.into_split();
        let (line, ended) = (Vec::new(), false);
        let (events, stuck) = (BufReader::new(events), false);
        Ok(Self { child, process, events, replies, line, ended, socket, patience, stuck })
    }

    /// The next event, or `None` when the worker has ended. May be given up
    /// and asked again without a loss.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Event>> {
        if !self.ended {
            tokio::select! {
                biased;
                event = event(&mut self.events, &mut self.line) => return event,
                // Its socket alone does not tell: what it started may hold that open.
                _ = self.child.wait() => self.ended = true,
                () = tokio::time::sleep(self.patience) => {
                    self.stuck = true;
                    self.signal(Signal::KILL);
                    self.child.wait().await?;
                    self.ended = true;
                }
            }
        }
        match tokio::time::timeout(LAST, event(&mut self.events, &mut self.line)).await {
            Ok(event) => event,
            Err(_) => Ok(None),
        }
    }

    /// Ends what a worker that is gone has started and left: processes that
    /// fell to us and still hold its socket.
    pub(crate) fn end_leftovers(&self) {
        for process in reaper::adopted() {
            if holds(process, self.socket) {
                tracing::warn!(pid = process.pid, "a worker left a process behind");
                tree::kill(process);
            }
        }
    }

    /// Tells the worker something.
    pub(crate) async fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        self.say(reply).await
    }

    /// Writes any value as a line.
    pub(crate) async fn say(&mut self, value: &impl serde::Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.replies.write_all(&line).await
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let Some(process) = self.process else { return };
        if let Err(err) = process.signal(signal) {
            tracing::error!(pid = process.pid, %err, "cannot signal a worker");
        }
    }

    /// Waits for its end and says how it ended.
    pub(crate) async fn wait(&mut self) -> String {
        if tokio::time::timeout(self.patience, self.child.wait()).await.is_err() {
            self.stuck = true;
            self.signal(Signal::KILL);
        }
        match self.child.wait().await {
            Ok(_) if self.stuck => format!("SIGKILL after {:?} without a word", self.patience),
            Ok(status) => status.to_string(),
            Err(err) => err.to_string(),
        }
    }
}

/// Reads on until `line` is one, and takes it.
async fn event(
    events: &mut BufReader<OwnedReadHalf>,
    line: &mut Vec<u8>,
) -> io::Result<Option<Event>> {
    let read = events.take(MAX_LINE).read_until(b'\n', line).await;
    match read {
        Ok(_) if line.ends_with(b"\n") => {
            let event = serde_json::from_slice(line);
            line.clear();
            Ok(Some(event?))
        }
        Ok(_) if line.len() as u64 >= MAX_LINE => {
            Err(io::Error::other("a worker writes without end"))
        }
        // Closed, maybe in the middle of a line by the worker's death.
        Ok(_) => Ok(None),
        Err(err) if err.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Err(err) => Err(err),
    }
}

/// Whether a process has the socket with this inode open.
fn holds(process: Process, socket: u64) -> bool {
    let name = format!("socket:[{socket}]");
    let fds = std::fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten();
    fds.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == &*name))
}

/// Opens a log file of ours for appending.
pub(crate) fn append(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Turns a connection into a descriptor that another process can block on.
pub(crate) fn into_fd(conn: Conn) -> io::Result<OwnedFd> {
    match conn {
        Conn::Tcp(stream) => {
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            Ok(stream.into())
        }
        Conn::Unix(stream) => {
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            Ok(stream.into())
        }
        Conn::Other(mut stream) => {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            let mut ours = UnixStream::from_std(ours)?;
            tokio::spawn(async move {
                // Whatever breaks it is seen by the worker as a broken stream.
                tokio::io::copy_bidirectional_with_sizes(
                    &mut ours,
                    &mut stream,
                    256 << 10,
                    256 << 10,
                )
                .await
                .ok();
            });
            Ok(theirs.into())
        }
    }
}
