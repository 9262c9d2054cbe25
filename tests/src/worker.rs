//! The process that runs the engine for one test.
//!
//! ptrace binds a task to the thread that seized it and a restored root is a
//! child of whoever made its skeleton, so each test has a small
//! single-threaded worker that is parent and subreaper of what it moves. It
//! takes one [`Order`] per line of its stdin and answers each with one line.

use std::fs::{self, File};
use std::io::{self, BufRead, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use dunlin_checkpoint::image::{FILE_NAME, FileSink, FileSource, ImageSink, ImageSource};
use dunlin_checkpoint::{
    DumpReport, Options, RestoreReport, Sandbox, freeze, inspect, restore, skeleton,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, pipe2};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tempfile::TempDir;

use crate::clone::start_as;
use crate::image::{Full, Memory};
use crate::proc::tree;

/// Where a tree lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// Among the host's processes.
    Plain,
    /// As the init of pid and mount namespaces of its own.
    Isolated,
}

/// What a worker can be told.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Start the program that is to be moved. Answer: its pid.
    Spawn { place: Place, dir: PathBuf, args: Vec<String> },
    /// Freeze, dump, kill, restore, thaw. Answer: [`Moved`].
    Move,
    /// Ask for a verdict. Answer: the findings, one text each.
    Inspect,
    /// Freeze, dump and thaw. Answer: [`Dumped`].
    Dump,
    /// Dump into a sink with room for so many records. Answer: the error.
    DumpIntoFull { room: usize },
    /// Restore the last dump, damaged, beside the original. Answer: the error,
    /// or nothing when all of it could be built.
    RestoreDamaged(Damage),
    /// Wait until the root ends. Answer: its exit code.
    Wait,
}

/// What happens to an image before it is restored.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum Damage {
    /// Only so many records are left.
    TruncateRecords(usize),
    /// One bit of a record is inverted, with no checksum around it.
    FlipRecord {
        /// Which record.
        record: usize,
        /// Which bit, counted round.
        bit: usize,
    },
    /// Only so many bytes of the file are left.
    TruncateFile(usize),
    /// One bit of the file is inverted.
    FlipFile(usize),
}

/// The size of a dump.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Dumped {
    /// Records in it.
    pub records: usize,
    /// Bytes of the file made of them.
    pub file: usize,
}

/// A finished move.
#[derive(Debug, Serialize, Deserialize)]
pub struct Moved {
    /// The root's new pid as the host sees it.
    pub pid: i32,
    /// What the dump did.
    pub dump: DumpReport,
    /// What the restore did.
    pub restore: RestoreReport,
}

/// The program `name` of this package, built beside the running test.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let dir = own.ancestors().nth(1).context("no directory")?;
    // Tests lie in `deps/`, one below the programs.
    let dir = if dir.ends_with("deps") { dir.parent().context("no parent")? } else { dir };
    Ok(dir.join(name))
}

/// Serves orders until stdin ends; ends everything it started before it returns.
pub fn serve() -> Result<()> {
    prctl::set_child_subreaper(true)?;
    // What whoever runs the tests left open is no part of any child's world.
    for fd in open_fds()? {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    let mut worker =
        Worker { place: Place::Plain, root: None, image: Memory::default(), file: None };
    let mut stdout = io::stdout();
    for line in io::stdin().lock().lines() {
        let answer = worker.obey(serde_json::from_str(&line?)?);
        let answer = answer.map_err(|err| format!("{err:#}"));
        serde_json::to_writer(&mut stdout, &answer)?;
        stdout.write_all(b"\n")?;
        stdout.flush()?;
    }
    end_all()
}

struct Worker {
    place: Place,
    root: Option<Pid>,
    image: Memory,
    /// The same image in a file: its directory and content.
    file: Option<(TempDir, Vec<u8>)>,
}

impl Worker {
    fn obey(&mut self, order: Order) -> Result<serde_json::Value> {
        Ok(match order {
            Order::Spawn { place, dir, args } => {
                self.place = place;
                let root = spawn(place, &program("child")?, &dir, &args)?;
                self.root = Some(root);
                root.as_raw().into()
            }
            Order::Move => {
                let open = open_fds()?;
                let moved = self.relocate()?;
                ensure!(open == open_fds()?, "the engine left file descriptors open");
                serde_json::to_value(moved)?
            }
            Order::Inspect => {
                let verdict = inspect(self.root()?, &Options::default())?;
                let told = verdict
                    .findings
                    .iter()
                    .map(|f| format!("{:?}: {} {}", f.judgement, f.object, f.reason));
                told.collect::<Vec<_>>().into()
            }
            Order::Dump => serde_json::to_value(self.dump()?)?,
            Order::DumpIntoFull { room } => {
                let mut frozen = freeze(self.root()?, &options())?;
                match frozen.dump(&mut Full { room }) {
                    Ok(_) => bail!("a full sink went unnoticed"),
                    Err(err) => format!("{:#}", anyhow::Error::from(err)).into(),
                }
            }
            Order::RestoreDamaged(damage) => {
                let before = (tree(getpid())?, open_fds()?, fs::read("/proc/self/mounts")?);
                let init = new_skeleton(Place::Isolated, None)?;
                let error = self.restore_damaged(init, damage).err();
                collect(init)?;
                let after = (tree(getpid())?, open_fds()?, fs::read("/proc/self/mounts")?);
                ensure!(before == after, "something was left behind");
                serde_json::to_value(error.map(|err| format!("{err:#}")))?
            }
            Order::Wait => match waitpid(self.root()?, None)? {
                WaitStatus::Exited(_, code) => code.into(),
                other => bail!("the root ended with {other:?}"),
            },
        })
    }

    fn root(&self) -> Result<Pid> {
        self.root.context("nothing was spawned")
    }

    /// Dumps the running tree, into memory and from there into a file.
    fn dump(&mut self) -> Result<Dumped> {
        self.image = Memory::default();
        let mut frozen = freeze(self.root()?, &options())?;
        frozen.dump(&mut self.image)?;
        frozen.thaw()?;
        let dir = tempfile::tempdir()?;
        let mut file = FileSink::create(dir.path())?;
        let (mut records, mut body) = (self.image.clone(), Vec::new());
        while let Some(kind) = records.next(&mut body)? {
            file.put(kind, &[IoSlice::new(&body)])?;
        }
        file.finish()?;
        let bytes = fs::read(dir.path().join(FILE_NAME))?;
        let dumped = Dumped { records: self.image.len(), file: bytes.len() };
        self.file = Some((dir, bytes));
        Ok(dumped)
    }

    /// Builds what is left of the last dump after `damage`, and drops it.
    fn restore_damaged(&self, init: Pid, damage: Damage) -> Result<()> {
        let mut image = self.image.clone();
        let (dir, bytes) = self.file.as_ref().context("nothing was dumped")?;
        let mut bytes = bytes.clone();
        let nascent = match damage {
            Damage::TruncateRecords(records) => {
                image.truncate(records);
                restore(sandbox(init)?, &mut image)
            }
            Damage::FlipRecord { record, bit } => {
                image.flip(record, bit);
                restore(sandbox(init)?, &mut image)
            }
            Damage::TruncateFile(_) | Damage::FlipFile(_) => {
                match damage {
                    Damage::TruncateFile(len) => bytes.truncate(len),
                    Damage::FlipFile(bit) => bytes[bit / 8] ^= 1 << (bit % 8),
                    _ => {}
                }
                fs::write(dir.path().join(FILE_NAME), bytes)?;
                let sandbox = sandbox(init)?;
                let source = FileSource::open(dir.path());
                if source.is_err() {
                    // Nobody takes the sandbox over.
                    kill(init, Signal::SIGKILL)?;
                }
                restore(sandbox, &mut source?)
            }
        };
        drop(nascent?);
        Ok(())
    }

    fn relocate(&mut self) -> Result<Moved> {
        let root = self.root()?;
        let mut image = Memory::default();
        let mut frozen = freeze(root, &options())?;
        let dump = frozen.dump(&mut image)?;
        let members = tree(root)?;
        frozen.kill()?;
        while members.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists()) {
            waitpid(None, None).context("waiting for what was killed")?;
        }
        self.root = None;
        let mut tries = 0;
        loop {
            match self.arrive(root, &image) {
                Ok((init, restore)) => return Ok(Moved { pid: init.as_raw(), dump, restore }),
                // Others fork on this host too, and a pid of ours that was
                // free for a moment may be theirs until they end.
                Err(err) if is_taken(&err) && tries < 100 => tries += 1,
                Err(err) => return Err(err),
            }
        }
    }

    fn arrive(&mut self, was: Pid, image: &Memory) -> Result<(Pid, RestoreReport)> {
        let init = new_skeleton(self.place, Some(was))?;
        let nascent = match restore(sandbox(init)?, &mut image.clone()) {
            Ok(nascent) => nascent,
            Err(err) => {
                end_all()?;
                return Err(err.into());
            }
        };
        let report = nascent.report().clone();
        self.root = Some(init);
        nascent.thaw()?;
        Ok((init, report))
    }
}

/// Collects what the engine built in vain and ended, unless it did that too.
fn collect(pid: Pid) -> Result<()> {
    match waitpid(pid, None) {
        Ok(_) | Err(Errno::ECHILD) => Ok(()),
        Err(err) => Err(err.into()),
    }
}

/// Whether a pid that the image wants belongs to someone else.
fn is_taken(err: &anyhow::Error) -> bool {
    let kind =
        |cause: &(dyn std::error::Error + 'static)| Some(cause.downcast_ref::<io::Error>()?.kind());
    err.chain().any(|cause| kind(cause) == Some(io::ErrorKind::AlreadyExists))
}

fn options() -> Options {
    Options { file_locks: true, ..Options::default() }
}

/// The sandbox of `init`, with the stdio that [`command`] gave the original.
fn sandbox(init: Pid) -> Result<Sandbox> {
    let null = |read| File::options().read(read).write(!read).open("/dev/null").map(OwnedFd::from);
    Ok(Sandbox { init, stdio: [null(true)?, null(false)?, null(false)?] })
}

/// Our descriptors above stderr.
fn open_fds() -> Result<Vec<i32>> {
    let listed =
        fs::read_dir("/proc/self/fd")?.map(|fd| Ok(fd?.file_name().to_string_lossy().parse()?));
    let listed = listed.collect::<Result<Vec<i32>>>()?;
    // The one that lists them is closed by now.
    Ok(listed.into_iter().filter(|fd| *fd > 2 && fcntl(*fd, FcntlArg::F_GETFD).is_ok()).collect())
}

fn command(program: &Path, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir).env_clear().env("PATH", "/usr/bin:/bin");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Starts `program` at `place`.
fn spawn(place: Place, program: &Path, dir: &Path, args: &[String]) -> Result<Pid> {
    match place {
        Place::Plain => apart(|| started(command(program, dir).args(args))),
        Place::Isolated => {
            let mut command = command(&std::env::current_exe()?, dir);
            started_as_init(command.arg("inside").arg(program).args(args))
        }
    }
}

/// Makes a process that runs the skeleton, in the host's pid namespace with
/// the pid `wanted`.
fn new_skeleton(place: Place, wanted: Option<Pid>) -> Result<Pid> {
    let mut command = command(&std::env::current_exe()?, Path::new("/"));
    let (read, write) = pipe2(OFlag::empty())?;
    fcntl(read.as_raw_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    command.arg(match place {
        Place::Plain => "skeleton",
        Place::Isolated => "inside",
    });
    command.args((place == Place::Isolated).then_some("skeleton"));
    command.arg(write.as_raw_fd().to_string());
    let pid = match (place, wanted) {
        (Place::Plain, Some(wanted)) => apart(|| start_as(wanted, &mut command))?,
        _ => started_as_init(&mut command)?,
    };
    // The other end closes when the skeleton is executed, or failed.
    drop(write);
    let mut failure = String::new();
    File::from(read).read_to_string(&mut failure)?;
    ensure!(failure.is_empty(), "no skeleton: {failure}");
    Ok(pid)
}

/// Starts `command` and leaves it to us to collect.
fn started(command: &mut Command) -> Result<Pid> {
    let child = command.spawn().with_context(|| format!("{command:?}"))?;
    Ok(Pid::from_raw(child.id().try_into()?))
}

/// Starts something in an ipc namespace of its own: System V objects are one's
/// own only there.
fn apart(start: impl FnOnce() -> Result<Pid>) -> Result<Pid> {
    let ours = File::open("/proc/self/ns/ipc")?;
    unshare(CloneFlags::CLONE_NEWIPC)?;
    let started = start();
    setns(ours, CloneFlags::CLONE_NEWIPC)?;
    started
}

/// Starts `command` as pid 1 of a new namespace.
fn started_as_init(command: &mut Command) -> Result<Pid> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    let pid = apart(|| started(command));
    // Or the engine could make no thread.
    setns(File::open("/proc/self/ns/pid")?, CloneFlags::CLONE_NEWPID)?;
    pid
}

/// Freezes, dumps and thaws a tree that is somebody else's, and says when it
/// begins and that it is done: for whoever wants to kill an engine at work.
pub fn dump(args: &[String]) -> Result<()> {
    let [root] = args else { bail!("dump: needs a pid") };
    let root = Pid::from_raw(root.parse()?);
    let mut stdout = io::stdout();
    stdout.write_all(b"b")?;
    stdout.flush()?;
    let mut frozen = freeze(root, &options())?;
    frozen.dump(&mut Memory::default())?;
    frozen.thaw()?;
    stdout.write_all(b"e")?;
    Ok(stdout.flush()?)
}

/// What a new init does before it becomes `args`.
pub fn inside(args: &[String]) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
    match args {
        [skeleton, rest @ ..] if skeleton == "skeleton" => become_skeleton(rest),
        [program, rest @ ..] => Err(Command::new(program).args(rest).exec().into()),
        [] => bail!("inside: needs a program"),
    }
}

/// Becomes the skeleton; the pipe whose number is given closes with that.
pub fn become_skeleton(args: &[String]) -> Result<()> {
    let [pipe] = args else { bail!("skeleton: needs a pipe") };
    fcntl(pipe.parse()?, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    let error = skeleton::exec();
    fs::write(format!("/proc/self/fd/{pipe}"), error.to_string())?;
    Err(error.into())
}

/// Kills and collects everything below us.
fn end_all() -> Result<()> {
    loop {
        for pid in tree(getpid())?.into_iter().skip(1) {
            // It may have ended since it was listed.
            kill(pid, Signal::SIGKILL)
                .or_else(|err| if err == Errno::ESRCH { Ok(()) } else { Err(err) })?;
        }
        match waitpid(None, None) {
            Err(Errno::ECHILD) => return Ok(()),
            other => other?,
        };
    }
}

/// Reads the answer to an order.
pub(crate) fn answer<T: DeserializeOwned>(line: &str) -> Result<T> {
    let answer: Result<serde_json::Value, String> =
        serde_json::from_str(line).with_context(|| format!("worker said {line:?}"))?;
    let value = answer.map_err(anyhow::Error::msg)?;
    Ok(serde_json::from_value(value)?)
}
