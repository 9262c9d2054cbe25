//! Source side: freeze a tree, dump it, let it go or end it.

use std::{
    collections::BTreeMap,
    io::{self, IoSlice},
    thread,
    time::{Duration, Instant},
};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::{
    DumpError, Hold, Options, TcpPolicy, Verdict,
    freeze::{self, FrozenTree, Process},
    host,
    image::{self, Head, ImageSink, Kind},
    inspect::{adopt_session, node, require},
    precopy::{Baseline, Pass, reachable},
    proc::{self, Stat, Status},
    resource::{
        creds::IdMaps,
        files::{self, Connections, TableRef},
        fs, limits, mm,
        shared::Objects,
        signals,
        signals::Queue,
        sysv, threads, timers, tree,
    },
    stub::{Batch, Remote, SignalUse, Tracee},
    sys::ptrace,
};

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
    crate::inspect::inspect(root, options)
}

/// Refuses what cannot move, then stops every thread of the tree.
pub fn freeze(root: Pid, options: &Options) -> Result<Frozen, DumpError> {
    require(root, options)?;
    Frozen::new(root, options.clone(), Baseline::default())
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// A stopped tree that is still ours: dropping this thaws it.
#[must_use = "dropping it thaws the tree"]
pub struct Frozen {
    tree: FrozenTree,
    options: Options,
    freeze_us: u64,
    /// What was sent while the tree ran.
    baseline: Baseline,
    /// Connections that are to end in silence.
    connections: Connections,
    /// After the tree, so that it runs again before this is waited for.
    hold: Option<Hold>,
}

impl Frozen {
    /// Stops the tree below `root`.
    pub(crate) fn new(root: Pid, options: Options, baseline: Baseline) -> Result<Self, DumpError> {
        let hold = Hold::of(root).map_err(failed("enter the network", root))?;
        let started = Instant::now();
        let tree = freeze::freeze(root)?;
        let (freeze_us, connections) = (micros(started), Connections::default());
        Ok(Self { tree, options, freeze_us, baseline, connections, hold })
    }

    /// Writes the whole image.
    ///
    /// What was met in the middle of something (a connection that nobody has
    /// accepted yet) has some moments to get over it: the tree runs meanwhile.
    pub fn dump(&mut self, sink: &mut dyn ImageSink) -> Result<DumpReport, DumpError> {
        let started = Instant::now();
        let mut pauses = PAUSES.into_iter();
        let gathered = loop {
            match (self.gather(), pauses.next()) {
                (Err(DumpError::Refused(finding)), Some(pause)) => {
                    tracing::debug!(object = %finding.object, reason = %finding.reason, "again");
                    self.go_on_for(pause)?;
                }
                (gathered, _) => break gathered?,
            }
        };
        let mut report = self.write(gathered, sink)?;
        report.dump_us = micros(started);
        Ok(report)
    }

    /// Lets the tree run for a moment.
    fn go_on_for(&mut self, pause: Duration) -> Result<(), DumpError> {
        let root = self.tree.processes[0].pid;
        if let Some(hold) = &mut self.hold {
            hold.lift().map_err(failed("let packets pass", root))?;
        }
        self.tree.thaw()?;
        thread::sleep(pause);
        self.tree = freeze::freeze(root)?;
        Ok(())
    }

    /// Takes down everything but memory; nothing has been sent of it.
    fn gather(&mut self) -> Result<Gathered, DumpError> {
        let root = self.tree.processes[0].pid;
        let mut names = Names {
            ids: BTreeMap::new(),
            maps: IdMaps::of(root).map_err(failed("read the user namespace", root))?,
        };
        let mut stats = Vec::with_capacity(self.tree.processes.len());
        for process in &mut self.tree.processes {
            let pid = process.pid;
            stats.push(Stat::of(pid).map_err(|_| DumpError::Vanished(pid))?);
            names.ids.insert(pid.as_raw(), process.status.tgid());
            for (thread, status) in process.threads.iter().zip(&process.statuses) {
                names.ids.insert(thread.tid.as_raw(), status.tid());
            }
            if !process.is_zombie() {
                let known = self.baseline.known_vmas(process.status.tgid());
                process.vmas =
                    proc::vmas_again(pid, known).map_err(failed("read the memory map", pid))?;
            }
        }
        let mut images = Vec::new();
        for (process, stat) in self.tree.processes.iter_mut().zip(&stats) {
            if !process.is_zombie() {
                images.push(dump_process(process, stat, &names)?);
            }
        }
        let head = self.head(&images, &stats, &names)?;
        self.baseline.forget_former(&head.nodes);
        self.baseline.begin();
        let mut objects = Objects::default();
        self.hold_packets()?;
        let sysv = self.sysv(&names.maps)?;
        let (files, connections) = self.files(&mut objects)?;
        self.connections = connections;
        Ok(Gathered { head, images, sysv, objects, files })
    }

    /// Writes what was gathered, and memory.
    fn write(
        &mut self,
        gathered: Gathered,
        sink: &mut dyn ImageSink,
    ) -> Result<DumpReport, DumpError> {
        let Gathered { head, mut images, sysv, mut objects, files } = gathered;
        let mut report = DumpReport { freeze_us: self.freeze_us, ..DumpReport::default() };
        report.processes = self.tree.processes.len() as u64;
        report.threads = self.tree.processes.iter().map(|p| p.threads.len() as u64).sum();
        report.bytes += image::put(sink, Kind::Head, &head).map_err(DumpError::Sink)?;
        self.baseline.keep(&head.nodes);
        if let Some(sysv) = sysv {
            let sent = sysv.send(sink).map_err(DumpError::Sink)?;
            report.pages += sent.pages;
            report.bytes += sent.bytes;
        }
        for process in self.tree.processes.iter_mut().filter(|p| !p.is_zombie()) {
            let (pid, tgid) = (process.pid, process.status.tgid());
            let vmas = std::mem::take(&mut process.vmas);
            for vma in &vmas {
                objects.identify(pid, vma).map_err(failed("take down the memory map", pid))?;
            }
            let sent = self.baseline.round(pid, tgid, vmas, Pass::Frozen, sink)?;
            report.pages += sent.pages;
            report.bytes += sent.bytes;
        }
        let sent = objects.dump(sink).map_err(DumpError::Sink)?;
        report.pages += sent.pages;
        report.bytes += sent.bytes;
        for part in files.parts().map_err(|err| DumpError::Sink(io::Error::other(err)))? {
            sink.put(Kind::Files as u16, &[IoSlice::new(&part)]).map_err(DumpError::Sink)?;
            report.bytes += part.len() as u64;
        }
        let living = self.tree.processes.iter().filter(|p| !p.is_zombie());
        for (process, image) in living.zip(&mut images) {
            // Last of all: signals arrive at a stopped process too.
            queues(process, image).map_err(failed("read queued signals", process.pid))?;
            report.bytes += image::put(sink, Kind::Process, image).map_err(DumpError::Sink)?;
        }
        sink.put(Kind::End as u16, &[]).map_err(DumpError::Sink)?;
        Ok(report)
    }

    /// As late as possible: what a peer has sent is still received, and one that
    /// waits for an answer of the stopped tree sends no more. What is dropped
    /// costs it a retransmission timeout.
    fn hold_packets(&mut self) -> Result<(), DumpError> {
        let Some(hold) = &mut self.hold else { return Ok(()) };
        match hold.depart() {
            Err(err) if self.options.tcp != TcpPolicy::Keep => {
                tracing::warn!(%err, "packets are not held back");
                self.hold = None;
                Ok(())
            }
            held => held.map_err(failed("hold back the packets", self.tree.processes[0].pid)),
        }
    }

    fn head(
        &self,
        images: &[image::Process],
        stats: &[Stat],
        names: &Names,
    ) -> Result<Head, DumpError> {
        let root = self.tree.processes[0].pid;
        let mut nodes = Vec::with_capacity(self.tree.processes.len());
        for (process, stat) in self.tree.processes.iter().zip(stats) {
            let parent = names.ids.get(&stat.ppid).filter(|_| process.pid != root);
            let mut node = node(parent.copied().unwrap_or(0), &process.status, stat);
            let image = images.iter().find(|i| i.pid == node.pid);
            let stopped = process.threads.first().is_some_and(|t| t.job_stopped);
            // Whether the parent has waited for the stop.
            node.stopped = stopped.then_some(stat.exit_code == 0);
            node.subreaper = image.is_some_and(|i| i.mm.is_subreaper());
            nodes.push(node);
        }
        if self.options.shell_job {
            adopt_session(&mut nodes);
        }
        reachable(&self.baseline, &mut nodes);
        head_of(root, nodes)
    }

    /// Every open file of the tree.
    fn files(&self, objects: &mut Objects) -> Result<(files::Image, Connections), DumpError> {
        let living = || self.tree.processes.iter().filter(|p| !p.is_zombie());
        let tables: Vec<TableRef> =
            living().map(|p| TableRef { pid: p.pid, ns_pid: p.status.tgid() }).collect();
        let tasks: Vec<Pid> = living().map(|p| p.pid).collect();
        let init = self.tree.processes[0].pid;
        let ctx = files::Context { options: &self.options, init, tasks: &tasks };
        files::dump(&tables, &ctx, objects)
    }

    /// The System V objects, if the tree has an ipc namespace with some.
    fn sysv(&self, maps: &IdMaps) -> Result<Option<sysv::Dump>, DumpError> {
        let root = self.tree.processes[0].pid;
        let tasks: Vec<Pid> = self.tree.processes.iter().map(|p| p.pid).collect();
        let living = self.tree.processes.iter().filter(|p| !p.is_zombie());
        let vmas = living.flat_map(|p| p.vmas.iter().map(|vma| (p.pid, vma)));
        sysv::dump(root, &tasks, vmas, maps).map_err(failed("take down the System V objects", root))
    }

    /// Takes what is ours out of the tree, which stays stopped: nothing more is
    /// asked of it. To be called while others are waited for, so that
    /// [`Frozen::park`] has less to do.
    pub fn withdraw(&mut self) -> Result<(), DumpError> {
        self.tree.withdraw()
    }

    /// Lets the tree run on and says when that failed.
    pub fn thaw(mut self) -> Result<(), DumpError> {
        self.tree.thaw()
    }

    /// Ends every process of the tree without one more instruction of theirs.
    ///
    /// A network namespace that outlives it stays mute if connections are kept,
    /// until another container comes: they go on elsewhere under its address.
    pub fn kill(mut self) -> Result<(), DumpError> {
        let root = self.tree.processes[0].pid;
        self.connections.silence().map_err(failed("silence the connections", root))?;
        let keeps = self.options.tcp == TcpPolicy::Keep;
        if !keeps && let Some(hold) = &mut self.hold {
            // Whoever is connected hears the end.
            hold.lift().map_err(failed("let packets pass", root))?;
        }
        self.tree.kill()?;
        // Not before: a tree that lives must not be left mute if we are killed.
        match &mut self.hold {
            Some(hold) if keeps => hold.keep().map_err(failed("hold back the packets", root)),
            _ => Ok(()),
        }
    }

    /// Detaches but leaves every process stopped (SIGSTOP) and mute: the caller
    /// does not know whether the destination runs it, so nobody may run it here.
    ///
    /// [`Hold::release`] before it goes on. What is returned is best dropped
    /// when there is time.
    pub fn park(mut self) -> Result<Parked, DumpError> {
        let root = self.tree.processes[0].pid;
        if let Some(hold) = &mut self.hold {
            hold.keep().map_err(failed("hold back the packets", root))?;
        }
        if let Err(err) = self.tree.park() {
            if let Some(hold) = &mut self.hold {
                hold.lift().map_err(failed("let packets pass", root))?;
            }
            return Err(err);
        }
        Ok(Parked { _hold: self.hold, _baseline: self.baseline })
    }
}

/// For how long a tree runs before it is stopped once more.
const PAUSES: [Duration; 5] = {
    let ms = Duration::from_millis;
    [ms(1), ms(2), ms(5), ms(10), ms(20)]
};

/// A stopped tree, but for its memory.
struct Gathered {
    head: Head,
    images: Vec<image::Process>,
    sysv: Option<sysv::Dump>,
    objects: Objects,
    files: files::Image,
}

/// A tree that was let go but is stopped. Dropping this changes nothing, but
/// takes long while the tree is there: the end of a userfaultfd visits every page
/// that it has watched, 33 to 98 ms for a GiB.
pub struct Parked {
    _hold: Option<Hold>,
    _baseline: Baseline,
}

/// The head of an image of the tree below `root`.
pub(crate) fn head_of(root: Pid, nodes: Vec<tree::Node>) -> Result<Head, DumpError> {
    let xstate_len = host::xstate_len().map_err(failed("read the CPU's features", root))?;
    Ok(Head {
        version: image::VERSION,
        arch: std::env::consts::ARCH.to_owned(),
        xstate_len,
        vdso: host::vdso_checksum().map_err(failed("read the vDSO", Pid::this()))?,
        nodes,
    })
}

pub(crate) fn failed(what: &'static str, pid: Pid) -> impl Fn(io::Error) -> DumpError {
    move |source| DumpError::Process { what, pid, source }
}

/// Reads the signals queued for a process and each of its threads.
fn queues(process: &Process, image: &mut image::Process) -> io::Result<()> {
    for (thread, image) in process.threads.iter().zip(&mut image.threads) {
        image.queue = Queue::dump(thread, false)?;
    }
    image.queue = Queue::dump(&process.threads[0], true)?;
    Ok(())
}

/// What tasks and users are called inside the tree.
struct Names {
    /// Pids and tids there by what they are to us.
    ids: BTreeMap<i32, i32>,
    maps: IdMaps,
}

/// Dumps one process, its threads one after the other.
fn dump_process(
    process: &mut Process,
    stat: &Stat,
    names: &Names,
) -> Result<image::Process, DumpError> {
    let pid = process.pid;
    let tgid = process.status.tgid();
    let statuses = &process.statuses;
    let signals = SignalUse::of(statuses);
    let (leader, others) = process.threads.split_first_mut().ok_or(DumpError::Vanished(pid))?;
    judge_thread(leader).map_err(failed("move a thread", pid))?;
    let xstate = ptrace::xstate(pid).map_err(failed("read the registers", pid))?;
    let remote = Remote::install(leader, others, (tgid, tgid), &mut process.vmas, &signals)
        .map_err(failed("bring in the stub", pid))?;
    let remote = process.remote.insert(remote);

    let mut batch = Batch::new();
    let actions = signals::ask(&mut batch);
    let asked_mm = mm::ask(&mut batch);
    let asked_timers = timers::ask(pid, |tid| names.ids.get(&tid).copied(), &mut batch)
        .map_err(failed("read the timers", pid))?;
    let asked_limits = limits::ask(&mut batch);
    let asked_leader = threads::ask(&mut batch);
    let results = remote.run(leader, &batch).map_err(failed("ask for its state", pid))?;
    let mut images = Vec::with_capacity(statuses.len());
    let image = threads::answer(&asked_leader, &results, leader, &statuses[0], &names.maps, xstate);
    images.push(image.map_err(failed("read a thread", pid))?);
    let timers = timers::answer(asked_timers, &results);
    for (thread, status) in others.iter_mut().zip(&statuses[1..]) {
        let image = dump_thread(remote, thread, status, &names.maps);
        images.push(image.map_err(failed("read a thread", pid))?);
    }
    Ok(image::Process {
        pid: tgid,
        mm: mm::answer(&asked_mm, &results, pid, stat).map_err(failed("read the exe link", pid))?,
        fs: fs::dump(pid, process.status.umask).map_err(failed("read the directories", pid))?,
        actions: signals::answer(&actions, &results),
        queue: Queue::default(),
        timers,
        limits: limits::answer(&asked_limits, &results, pid)
            .map_err(failed("read resource limits", pid))?,
        threads: images,
    })
}

/// Asks a thread through its process's stub and sends it home at once.
fn dump_thread(
    remote: &Remote,
    thread: &mut Tracee,
    status: &Status,
    maps: &IdMaps,
) -> io::Result<threads::Image> {
    judge_thread(thread)?;
    let xstate = ptrace::xstate(thread.tid)?;
    let lent = remote.lend(thread, status.tid())?;
    let mut batch = Batch::new();
    let asked = threads::ask(&mut batch);
    let results = lent.run(thread, &batch);
    thread.go_home()?;
    threads::answer(&asked, &results?, thread, status, maps, xstate)
}

/// Refuses what only a tracer can see.
fn judge_thread(thread: &Tracee) -> io::Result<()> {
    // Kernels before 6.4 cannot tell whether it is in use.
    if ptrace::has_user_dispatch(thread.tid).unwrap_or(false) {
        return Err(io::Error::other("it uses syscall user dispatch, which cannot be moved"));
    }
    Ok(())
}
