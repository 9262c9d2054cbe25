//! A self-checking program and the worker that moves it.

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::process::{self, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::yield_now;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, geteuid, mkfifo};
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::Facts;
use crate::proc::tree;
use crate::worker::{Moved, Order, Place, answer, program};

/// Longest silence we take for work. Only a hang ever waits for it.
const DEADLINE: u16 = 60_000;

/// What a child does while it waits for the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// Sleeps in `sigsuspend`.
    Idle,
    /// Computes without pause.
    Busy,
    /// Sleeps, then damages its own world before it looks: its check must fail.
    Spoiled,
}

/// This machine lacks something.
#[derive(Debug)]
pub struct Skipped(pub String);

impl std::error::Error for Skipped {}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "needs {}", self.0)
    }
}

/// A running scenario. Dropping it ends every process of it.
pub struct Child {
    root: Pid,
    worker: process::Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    report: File,
    said: String,
    // Last, because the others use what is in it.
    dir: TempDir,
}

impl Child {
    /// Starts `scenario` and waits until its world is set up.
    pub fn spawn(scenario: &str, place: Place, mood: Mood) -> Result<Self> {
        if !geteuid().is_root() {
            return Err(Skipped("root".into()).into());
        }
        let dir = tempfile::Builder::new().prefix("dunlin-child-").tempdir()?;
        // Some children are not root.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777))?;
        let fifo = dir.path().join("report");
        mkfifo(&fifo, Mode::empty())?;
        fs::set_permissions(&fifo, Permissions::from_mode(0o666))?;
        // Held open for writing too, so that it never ends.
        let report =
            File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(fifo)?;
        let mut worker = Command::new(program("worker")?)
            .arg("serve")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let orders = worker.stdin.take();
        let answers = BufReader::new(worker.stdout.take().context("no stdout")?);
        let root = Pid::from_raw(0);
        let mut child = Self { root, worker, orders, answers, report, said: String::new(), dir };
        let path = child.dir.path().to_owned();
        let args = vec![path.display().to_string(), scenario.to_owned(), format!("{mood:?}")];
        child.root = Pid::from_raw(child.order(&Order::Spawn { place, dir: path, args })?);
        let said = child.listen()?;
        match said.strip_prefix("needs ") {
            _ if said == "ready" => {
                // It says so through a file that is no part of its world.
                while child.holds_report()? {
                    yield_now();
                }
                Ok(child)
            }
            Some(lack) => Err(Skipped(lack.to_owned()).into()),
            None => bail!("{scenario}: {said}"),
        }
    }

    /// The root's pid as the host sees it.
    #[must_use]
    pub fn root(&self) -> Pid {
        self.root
    }

    /// What `/proc` says about it now.
    pub fn facts(&self) -> Result<Facts> {
        Facts::read(self.root)
    }

    /// Freezes, dumps, kills, restores and thaws it.
    pub fn relocate(&mut self) -> Result<Moved> {
        let moved: Moved = self.order(&Order::Move)?;
        self.root = Pid::from_raw(moved.pid);
        Ok(moved)
    }

    /// Asks the child whether its world is whole; it ends with that.
    pub fn verify(mut self) -> Result<()> {
        kill(self.root, Signal::SIGUSR2).context("the child is gone")?;
        let said = self.listen()?;
        ensure!(said == "ok", "{said}");
        let code: i32 = self.order(&Order::Wait)?;
        ensure!(code == 0, "said ok, but ended with {code}");
        Ok(())
    }

    /// Has the worker do something.
    pub fn order<T: DeserializeOwned>(&mut self, order: &Order) -> Result<T> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        self.orders.as_mut().context("the worker was dismissed")?.write_all(&line)?;
        if !readable(self.answers.get_ref())? {
            let whereabouts = self.whereabouts();
            self.kill_worker()?;
            bail!("the worker hangs in {order:?}\n{whereabouts}");
        }
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        answer(&line)
    }

    /// Ends the worker at once, as a crash of the engine would.
    pub fn kill_worker(&mut self) -> Result<()> {
        self.orders = None;
        self.worker.kill()?;
        self.worker.wait()?;
        Ok(())
    }

    /// The next line the child says.
    fn listen(&mut self) -> Result<String> {
        loop {
            if let Some((line, rest)) = self.said.split_once('\n') {
                let line = line.to_owned();
                self.said = rest.to_owned();
                return Ok(line);
            }
            if !readable(&self.report)? {
                bail!("the child says nothing\n{}", self.whereabouts());
            }
            let mut buffer = [0; 4096];
            let n = self.report.read(&mut buffer)?;
            self.said += &String::from_utf8_lossy(&buffer[..n]);
        }
    }

    fn holds_report(&self) -> Result<bool> {
        for fd in fs::read_dir(format!("/proc/{}/fd", self.root))? {
            // Any fd may be closed between the two looks.
            if fs::read_link(fd?.path()).is_ok_and(|link| link.ends_with("report")) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Where each task of the tree sits, for whoever has to find out why it hangs.
    fn whereabouts(&self) -> String {
        let mut text = String::new();
        for pid in tree(self.root).unwrap_or_default() {
            for file in ["comm", "wchan", "syscall", "stack"] {
                let read = fs::read_to_string(format!("/proc/{pid}/{file}"));
                text += &format!(
                    "{pid} {file}: {}\n",
                    read.unwrap_or_else(|err| err.to_string()).trim()
                );
            }
        }
        text
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.orders.take().is_some() {
            // The worker ends what it started when its stdin closes.
            let ended = self.worker.wait();
            assert!(ended.is_ok(), "{ended:?}");
            return;
        }
        for pid in tree(self.root).unwrap_or_default() {
            let ended = kill(pid, Signal::SIGKILL);
            assert!(matches!(ended, Ok(()) | Err(Errno::ESRCH)), "{ended:?}");
        }
    }
}

fn readable(file: &impl AsFd) -> Result<bool> {
    let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut polled, PollTimeout::from(DEADLINE))? > 0)
}
