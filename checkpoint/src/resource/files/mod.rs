//! File descriptors and the open file descriptions behind them.
//!
//! Both directions work from outside the tasks. On the source every
//! description is duplicated into the engine (`pidfd_getfd`), which changes
//! nothing for its owner, and read there; on the destination the engine makes
//! every description and hands the tasks their fds. What is shared by several
//! fds, by fork or by a message in flight, is one [`File`] and stays shared.

mod device;
mod epoll;
mod error;
mod eventfd;
mod fdinfo;
mod fin;
pub(crate) mod ghost;
mod inet;
mod inotify;
pub(crate) mod locks;
mod multicast;
mod netlink;
mod owner;
mod parts;
mod pidfd;
mod pipe;
mod regular;
mod root;
mod signalfd;
mod sockdiag;
mod socket;
mod sockopt;
mod stdio;
mod table;
mod tcp;
#[cfg(test)]
mod tests;
mod timerfd;
pub(crate) mod tty;
mod unix;

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
    thread,
};

use nix::{sched::CloneFlags, unistd::Pid};
use rustix::fs::{FileType, OFlags};
use serde::{Deserialize, Serialize};
use tracing::warn;

pub use self::tcp::silence;
use self::{
    error::{Doing, Failure, Making, Refusal},
    locks::PosixLock,
    root::Root,
    table::{Held, Tables},
    tty::Control,
};
pub(crate) use self::{parts::Assembly, tcp::Connections};
use super::{
    loopback,
    shared::{Created, Objects},
};
use crate::{DumpError, Finding, Judgement, Options, RestoreError};

/// Most descriptions, fds, pipes and queued messages an image may hold.
const MAX_ITEMS: usize = 1 << 20;

/// One fd table of the tree.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TableRef {
    /// A task that uses the table, in our pid namespace.
    pub(crate) pid: Pid,
    /// The same task in its own pid namespace: the number the image uses.
    pub(crate) ns_pid: i32,
}

/// What is known about the tree whose files are dumped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    /// What the caller wants.
    pub(crate) options: &'a Options,
    /// Root of the tree: its root directory, mounts, network namespace and
    /// fds 0 to 2 are the container's.
    pub(crate) init: Pid,
    /// Every task of the tree, in our pid namespace.
    pub(crate) tasks: &'a [Pid],
}

/// All files of a tree.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// Open file descriptions; everything else names them by index.
    pub(crate) files: Vec<File>,
    /// Pipes and FIFOs, each with one or more ends among `files`.
    pub(crate) pipes: Vec<pipe::Image>,
    /// Fd tables.
    pub(crate) tables: Vec<Table>,
    /// Pseudo terminals, each with one or more ends among `files`.
    ptys: Vec<tty::Image>,
    /// Whether the loopback device is up, without which sockets do not connect.
    loopback: bool,
}

/// One open file description.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct File {
    /// Access mode and status flags, as `fcntl(F_GETFL)` gives them.
    pub(crate) flags: u32,
    /// Who is told by a signal that it is ready.
    owner: Option<owner::Image>,
    /// Locks that belong to it.
    locks: Vec<locks::Lock>,
    /// What it is.
    pub(crate) kind: Kind,
}

/// What an open file description is. The order is the format: append only.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Led out of the container as this standard stream.
    Stdio(u8),
    /// Has a path: a file, a directory, anything opened with `O_PATH`.
    Regular(regular::Image),
    /// A character device without state.
    Device(device::Image),
    /// An end of the pipe or FIFO with this index.
    Pipe(pipe::End),
    /// An event counter.
    EventFd(eventfd::Image),
    /// An epoll instance.
    Epoll(epoll::Image),
    /// A timer.
    TimerFd(timerfd::Image),
    /// A signal queue; the mask of signals it reports.
    SignalFd(u64),
    /// A TCP, UDP, ICMP or raw socket.
    Inet(inet::Image),
    /// A unix socket.
    Unix(unix::Image),
    /// A file without a name.
    Ghost(ghost::Image),
    /// A directory without a name.
    GhostDirectory(ghost::Directory),
    /// A handle of the process with this pid.
    PidFd(i32),
    /// Watches on files.
    Inotify(inotify::Image),
    /// A netlink socket.
    Netlink(netlink::Image),
    /// An end of the pseudo terminal with this index.
    Pty(tty::End),
}

/// One fd table.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Table {
    /// A task that uses it, in the container's pid namespace.
    pub(crate) pid: i32,
    /// Its fds in ascending order.
    pub(crate) fds: Vec<Fd>,
    /// POSIX locks, which belong to the table.
    locks: Vec<PosixLock>,
    /// The terminal of the session the task leads.
    control: Option<Control>,
}

/// One file descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fd {
    /// Its number.
    pub(crate) fd: RawFd,
    /// The description behind it.
    pub(crate) file: u32,
    /// Whether `exec` closes it.
    pub(crate) cloexec: bool,
}

/// Judges every fd of a running tree without disturbing it.
pub(crate) fn inspect(tables: &[TableRef], ctx: &Context<'_>) -> Result<Vec<Finding>, DumpError> {
    let source = Source::collect(tables, ctx, false)?;
    Ok(source.read(&mut Objects::default()).2)
}

/// Reads every fd of a tree that stands still. The content of files without a
/// name is added to `objects`; the connections are to be silenced before the
/// tree is ended.
pub(crate) fn dump(
    tables: &[TableRef],
    ctx: &Context<'_>,
    objects: &mut Objects,
) -> Result<(Image, Connections), DumpError> {
    let source = Source::collect(tables, ctx, true)?;
    let (image, connections, findings) = source.read(objects);
    match findings.into_iter().find(|f| f.judgement == Judgement::Refused) {
        Some(finding) => Err(DumpError::Refused(Box::new(finding))),
        None => Ok((image, connections)),
    }
}

/// The source's files as the kinds see them while they are read.
struct Source<'a> {
    ctx: &'a Context<'a>,
    /// Whether the tree stands still, so that queues may be read.
    frozen: bool,
    root: Root,
    tables: Tables,
    sockets: socket::Source,
    /// What waits in the receive queues of unix sockets.
    queues: HashMap<usize, Vec<unix::Message>>,
    /// For each description the standard stream that replaces it.
    stdio: Vec<Option<u8>>,
    loopback: bool,
}

/// What reading collects besides the descriptions themselves.
struct Collector<'a> {
    /// Content that several may share.
    objects: &'a mut Objects,
    connections: Connections,
    ptys: Vec<tty::Image>,
    pipes: Vec<pipe::Image>,
    /// Index of a pipe by its device and inode.
    pipe_ids: HashMap<(u64, u64), u32>,
    /// What the description at hand loses on the way.
    losses: Vec<String>,
}

impl<'a> Source<'a> {
    fn collect(tables: &[TableRef], ctx: &'a Context<'a>, frozen: bool) -> Result<Self, DumpError> {
        let process =
            |what| move |source: std::io::Error| DumpError::Process { what, pid: ctx.init, source };
        table::lift_limit().map_err(process("lift our own limit before reading the files"))?;
        let mut tables = Tables::collect(tables, frozen)?;
        let root = Root::of(ctx.init).map_err(process("find the root directory"))?;
        let sockets = socket::Source::of(ctx.init, tables.held.iter().any(Held::is_socket))
            .map_err(process("list the sockets"))?;
        let queues = if frozen {
            unix::collect(&mut tables, &sockets.unix).map_err(process("read the queues"))?
        } else {
            HashMap::new()
        };
        let loopback = loopback::dump(ctx.init).map_err(process("look at the loopback device"))?;
        let stdio = Vec::new();
        let mut source = Self { ctx, frozen, root, tables, sockets, queues, stdio, loopback };
        source.stdio = stdio::assign(&source);
        Ok(source)
    }

    fn read(&self, objects: &mut Objects) -> (Image, Connections, Vec<Finding>) {
        let (connections, ptys, pipes, pipe_ids, losses) = Default::default();
        let mut out = Collector { objects, connections, ptys, pipes, pipe_ids, losses };
        let mut findings = Vec::new();
        let mut files = Vec::with_capacity(self.tables.held.len());
        for (id, held) in self.tables.held.iter().enumerate() {
            let mut note = |judgement, reason, remedy: &str| {
                findings.push(Finding {
                    object: held.name(),
                    judgement,
                    reason,
                    remedy: remedy.to_owned(),
                });
            };
            match self.file(id, held, &mut out) {
                Ok(file) => files.push(file),
                Err(refusal) => note(Judgement::Refused, refusal.reason, refusal.remedy),
            }
            out.losses.drain(..).for_each(|loss| note(Judgement::Loss, loss, ""));
        }
        let Collector { objects: _, connections, ptys, pipes, pipe_ids: _, losses: _ } = out;
        let tables = self.tables.image(|pid| tty::control(pid, self));
        let loopback = self.loopback;
        (Image { files, pipes, tables, ptys, loopback }, connections, findings)
    }

    fn file(&self, id: usize, held: &Held, out: &mut Collector<'_>) -> Result<File, Refusal> {
        let kind = self.kind(id, held, out)?;
        let mut locks = locks::dump(&held.info)?;
        if !locks.is_empty() && !self.ctx.options.file_locks {
            return Err(Refusal::new(
                "holds a file lock",
                "allow locks to be moved (--file-locks)",
            ));
        }
        locks.retain(|lock| !lock.is_posix());
        let owner = match kind {
            Kind::Stdio(_) => None,
            _ => owner::dump(held, self, out)?,
        };
        Ok(File { flags: held.info.status_flags(), owner, locks, kind })
    }

    fn kind(&self, id: usize, held: &Held, out: &mut Collector<'_>) -> Result<Kind, Refusal> {
        if let Some(n) = self.stdio[id] {
            stdio::judge(held, out);
            return Ok(Kind::Stdio(n));
        }
        if held.info.oflags().contains(OFlags::PATH) {
            return regular::dump(held, self, out);
        }
        if let Some(name) = held.anon_inode() {
            return match name {
                "[eventfd]" => eventfd::dump(held).map(Kind::EventFd),
                "[eventpoll]" => epoll::dump(id, held, self).map(Kind::Epoll),
                "[timerfd]" => timerfd::dump(held).map(Kind::TimerFd),
                "[signalfd]" => signalfd::dump(held).map(Kind::SignalFd),
                "[pidfd]" => pidfd::dump(held, self).map(Kind::PidFd),
                "inotify" => inotify::dump(held, self, out).map(Kind::Inotify),
                _ => Err(Refusal::unmovable(format!("is {}", anon_inode_in_words(name)))),
            };
        }
        match held.file_type() {
            FileType::RegularFile | FileType::Directory => regular::dump(held, self, out),
            FileType::CharacterDevice if tty::is_terminal(held) => {
                tty::dump(held, self, out).map(Kind::Pty)
            }
            FileType::CharacterDevice => device::dump(held, self).map(Kind::Device),
            FileType::Fifo => pipe::dump(held, self, out).map(Kind::Pipe),
            FileType::Socket => socket::dump(id, held, self, out),
            FileType::BlockDevice => Err(Refusal::unmovable("is a block device")),
            _ => Err(Refusal::unmovable(format!("is {}, a kind we do not know", held.link()))),
        }
    }
}

fn anon_inode_in_words(name: &str) -> String {
    match name {
        "[io_uring]" => "an io_uring",
        "[userfaultfd]" => "a userfaultfd",
        "[perf_event]" => "a performance counter",
        "[fanotify]" => "a fanotify group",
        "bpf-map" => "a BPF map",
        "bpf-prog" => "a BPF program",
        "bpf_link" => "a BPF link",
        "seccomp notify" => "a seccomp listener",
        "[landlock-ruleset]" | "landlock-ruleset" => "a Landlock ruleset",
        "kvm-vm" | "kvm-vcpu" => "a KVM handle",
        other => return format!("an anonymous inode \"{other}\""),
    }
    .to_owned()
}

/// Where files are to be made.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    /// The container's root directory; `O_PATH` suffices.
    pub(crate) root: BorrowedFd<'a>,
    /// The container's network namespace.
    pub(crate) netns: BorrowedFd<'a>,
    /// What takes the place of standard streams that led out of the container.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// The objects that came with the image, filled.
    pub(crate) objects: &'a Created,
    /// Finds a process of the container in our pid namespace.
    pub(crate) host: &'a (dyn Fn(i32) -> Option<Pid> + Sync),
}

/// Every description of an image, made and filled; no task has them yet.
#[derive(Debug)]
pub(crate) struct Opened {
    files: Vec<OwnedFd>,
    /// Files of unix sockets that wait for their names.
    placed: Vec<unix::Placed>,
    tables: BTreeMap<i32, Vec<Fd>>,
    timers: Vec<(u32, timerfd::Image)>,
    connections: Vec<inet::Pending>,
    owners: Vec<(u32, owner::Image)>,
    /// Locks that the source still holds.
    late: Vec<(u32, locks::Lock)>,
    posix_locks: BTreeMap<i32, Vec<PosixLock>>,
    controls: BTreeMap<i32, Control>,
    epoll_items: Vec<(i32, EpollItem)>,
}

/// An epoll registration that only the task itself can make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EpollItem {
    /// Number of the epoll's fd.
    pub(crate) epfd: RawFd,
    /// Number of the watched fd.
    pub(crate) tfd: RawFd,
    /// Events of interest, as `epoll_ctl` takes them.
    pub(crate) events: u32,
    /// The program's own word.
    pub(crate) data: u64,
}

/// Makes every description of an image and fills pipes and queues.
pub(crate) fn open(image: &Image, target: &Target<'_>) -> Result<Opened, RestoreError> {
    let Image { files, pipes, tables, ptys, loopback } = image;
    check(image)?;
    if *loopback {
        loopback::restore(target.netns).map_err(RestoreError::Source)?;
    }
    table::lift_limit().map_err(RestoreError::Source)?;
    let failed = |id: usize| move |failure: Failure| failure.at(image, id);

    let mut made: Vec<Option<OwnedFd>> = files.iter().map(|_| None).collect();
    pipe::open(pipes, files, target, &mut made).map_err(|(id, failure)| failure.at(image, id))?;
    tty::open(ptys, files, target, &mut made).map_err(|(id, failure)| failure.at(image, id))?;
    let mut timers = Vec::new();
    for (id, file) in files.iter().enumerate() {
        let File { flags, owner: _, locks: _, kind } = file;
        let oflags = OFlags::from_bits_retain(*flags);
        let fd = match kind {
            Kind::Pipe(_) | Kind::Pty(_) => continue,
            Kind::Inet(_) | Kind::Unix(_) | Kind::Netlink(_) => continue,
            Kind::PidFd(pid) => pidfd::open(*pid, oflags, target),
            Kind::Inotify(inotify) => inotify::open(inotify, oflags, target),
            Kind::Stdio(n) => stdio::open(*n, oflags, target),
            Kind::Regular(file) => regular::open(file, oflags, target),
            Kind::Device(device) => device::open(device, oflags, target),
            Kind::EventFd(eventfd) => eventfd::open(eventfd, oflags),
            Kind::Epoll(_) => epoll::open(oflags),
            Kind::TimerFd(timer) => {
                timers.push((u32::try_from(id).unwrap_or(u32::MAX), timer.clone()));
                timerfd::open(timer, oflags)
            }
            Kind::SignalFd(mask) => signalfd::open(*mask, oflags),
            Kind::Ghost(file) => ghost::open(file, oflags, target),
            Kind::GhostDirectory(file) => ghost::open_directory(file, oflags, target),
        }
        .map_err(failed(id))?;
        made[id] = Some(fd);
    }
    // Last, because messages in their queues may carry any of the others.
    let placed = thread::scope(|scope| {
        scope
            .spawn(|| socket::open(files, target, &mut made))
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
    .map_err(|(id, failure)| failure.at(image, id))?;
    let files: Vec<OwnedFd> = made.into_iter().flatten().collect();
    if files.len() != image.files.len() {
        return Err(RestoreError::Image("a pipe end belongs to no pipe".into()));
    }
    let epoll_items = epoll::wire(image, &files).map_err(|(id, failure)| failure.at(image, id))?;
    let mut owners = Vec::new();
    let mut late = Vec::new();
    for ((id, file), fd) in (0..).zip(&image.files).zip(&files) {
        owners.extend(file.owner.iter().map(|owner| (id, owner.clone())));
        let locks = locks::open(&file.locks, fd.as_fd()).map_err(failed(id as usize))?;
        late.extend(locks.into_iter().map(|lock| (id, lock)));
    }
    let controls = tables.iter().filter_map(|table| Some((table.pid, table.control?))).collect();
    let posix_locks = tables.iter().map(|table| (table.pid, table.locks.clone())).collect();
    let tables = tables.iter().map(|table| (table.pid, table.fds.clone())).collect();
    let connections =
        inet::Pending::all(&image.files).map_err(|(id, failure)| failure.at(image, id))?;
    Ok(Opened {
        files,
        placed,
        tables,
        timers,
        connections,
        owners,
        late,
        posix_locks,
        controls,
        epoll_items,
    })
}

/// Whether every index of an image points into it.
fn check(image: &Image) -> Result<(), RestoreError> {
    let Image { files, pipes, tables, ptys, loopback: _ } = image;
    let damaged = |what: &str| Err(RestoreError::Image(format!("files: {what}")));
    if files.len().max(pipes.len()).max(tables.len()).max(ptys.len()) > MAX_ITEMS {
        return damaged("too many");
    }
    for fd in tables.iter().flat_map(|table| &table.fds) {
        if fd.file as usize >= files.len() || fd.fd < 0 {
            return damaged("an fd names no file");
        }
    }
    for (id, file) in files.iter().enumerate() {
        let fine = match &file.kind {
            Kind::Stdio(n) => *n < 3,
            Kind::Pipe(end) => (end.pipe as usize) < pipes.len(),
            Kind::Pty(end) => (end.pair as usize) < ptys.len(),
            Kind::Epoll(epoll) => epoll.is_sound(files.len()),
            Kind::Unix(unix) => unix.is_sound(id, files),
            _ => true,
        };
        if !fine {
            return damaged("a file names a file that is not there");
        }
    }
    Ok(())
}

impl Opened {
    /// The fds of a task's table: number, description, close-on-exec.
    #[must_use]
    pub(crate) fn table(&self, ns_pid: i32) -> Vec<(RawFd, BorrowedFd<'_>, bool)> {
        let fds = self.tables.get(&ns_pid).map_or(&[][..], Vec::as_slice);
        fds.iter().map(|fd| (fd.fd, self.files[fd.file as usize].as_fd(), fd.cloexec)).collect()
    }

    /// Epoll registrations the task has to make itself once it has its fds.
    ///
    /// They are few: a signalfd reports the signals of whoever polls it, so
    /// watching one hooks into the caller. All others are made already.
    #[must_use]
    pub(crate) fn epoll_items(&self, ns_pid: i32) -> Vec<EpollItem> {
        self.epoll_items.iter().filter(|(pid, _)| *pid == ns_pid).map(|(_, item)| *item).collect()
    }

    /// The terminal the task has to take itself, as leader of a session.
    #[must_use]
    pub(crate) fn control(&self, ns_pid: i32) -> Option<Control> {
        self.controls.get(&ns_pid).copied()
    }

    /// POSIX locks the task has to take itself.
    #[must_use]
    pub(crate) fn posix_locks(&self, ns_pid: i32) -> &[PosixLock] {
        self.posix_locks.get(&ns_pid).map_or(&[], Vec::as_slice)
    }

    /// Starts what runs by itself: the last step before the thaw. By now the
    /// tree may be nowhere else, so that what fails is told and survived, but
    /// for a timer, which a program would wait for in vain. `host` gives
    /// the pid in our namespace of a task of the container.
    pub(crate) fn arm(
        &mut self,
        host: &(dyn Fn(i32) -> Option<Pid> + Sync),
    ) -> Result<(), RestoreError> {
        for connection in &self.connections {
            if let Err(failure) = connection.arm(&self.files[connection.file()]) {
                warn!(?failure, "a connection did not come back");
            }
        }
        for placed in &mut self.placed {
            if let Err(err) = placed.arm() {
                warn!(%err, ?placed, "a unix socket did not get its path");
            }
        }
        for (id, lock) in &self.late {
            if let Err(err) = locks::arm(lock, self.files[*id as usize].as_fd()) {
                warn!(%err, ?lock, "a lock was not taken again");
            }
        }
        for (id, owner) in &self.owners {
            if let Err(err) = owner::arm(owner, self.files[*id as usize].as_fd(), host) {
                warn!(%err, "nobody is told any more that a file is ready");
            }
        }
        for (id, timer) in &self.timers {
            timerfd::arm(timer, self.files[*id as usize].as_fd()).map_err(|source| {
                RestoreError::Process { what: "arm a timerfd".into(), pid: 0, source }
            })?;
        }
        Ok(())
    }
}

/// Sets the status flags that `open` and the makers of anonymous files leave out.
fn set_status(fd: OwnedFd, flags: OFlags) -> Result<OwnedFd, Failure> {
    set_flags(&fd, flags.bits())?;
    Ok(fd)
}

fn set_flags(fd: &OwnedFd, flags: u32) -> Result<(), Failure> {
    let flags = OFlags::from_bits_retain(flags);
    let settable = OFlags::APPEND | OFlags::NONBLOCK | OFlags::DIRECT | OFlags::NOATIME;
    let now = rustix::fs::fcntl_getfl(fd).making("read the flags")?;
    let wanted = now.difference(settable) | flags.intersection(settable);
    if now != wanted {
        rustix::fs::fcntl_setfl(fd, wanted).making("set the flags")?;
    }
    Ok(())
}

/// Runs `f` on a thread of its own inside a network namespace.
pub(crate) fn in_netns<T: Send>(
    netns: BorrowedFd<'_>,
    f: impl FnOnce() -> std::io::Result<T> + Send,
) -> std::io::Result<T> {
    thread::scope(|scope| {
        let work = || {
            nix::sched::setns(netns, CloneFlags::CLONE_NEWNET)?;
            f()
        };
        scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
