//! Pre-copy: memory that travels while the tree runs.
//!
//! One momentary stop gives each process a userfaultfd with which we then watch
//! its writes from outside. A round sends what was written since the last one;
//! what is left is sent by the dump, in the freeze.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    fs, io,
    os::fd::OwnedFd,
    rc::Rc,
    time::Instant,
};

use nix::unistd::Pid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::{
    DumpError, Options,
    dump::{Frozen, failed, head_of},
    freeze::{self, Process},
    image::{self, ImageSink, Kind},
    inspect::{adopt_session, nodes, require},
    intervals::Intervals,
    proc::{self, Stat, Status, Vma, VmaKind},
    resource::{
        memory::{self, Backing, Change, KernelPages, Layout, Mapping},
        pages::{self, Sent},
        shared::{self, Objects},
        tree,
    },
    stub::{Batch, Remote, SignalUse, args},
    sys::userfaultfd::{self, WriteTracker},
};

/// What one round did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Pages sent.
    pub pages: u64,
    /// Bytes put into the sink.
    pub bytes: u64,
    /// How long it took, in microseconds.
    pub elapsed_us: u64,
    /// For how long the tree stood still to be given what watches it, in
    /// microseconds; 0 when nothing was new.
    pub stopped_us: u64,
}

/// A running tree whose memory is on its way. Dropping it leaves the tree as it
/// was.
pub struct Precopy {
    root: Pid,
    options: Options,
    sent: Baseline,
}

/// What the destination has by now.
#[derive(Default)]
pub(crate) struct Baseline {
    pub(crate) nodes: Vec<tree::Node>,
    trackers: BTreeMap<i32, Tracker>,
    objects: Objects,
    /// How many of the objects the destination knows.
    announced: usize,
    /// Sizes of mapped files since [`Baseline::begin`].
    sizes: Sizes,
}

impl Precopy {
    /// Refuses what cannot move and prepares the rounds.
    ///
    /// `None` where pre-copy is of no use or not safe, with the reason.
    pub fn start(root: Pid, options: &Options) -> Result<Result<Self, String>, DumpError> {
        require(root, options)?;
        if let Some(reason) = obstacle(root) {
            return Ok(Err(reason));
        }
        let sent = Baseline::default();
        Ok(Ok(Self { root, options: options.clone(), sent }))
    }

    /// Sends what was written since the last round, everything in the first.
    pub fn round(&mut self, sink: &mut dyn ImageSink) -> Result<RoundReport, DumpError> {
        let started = Instant::now();
        let mut report = RoundReport::default();
        self.sent.begin();
        let mut living = self.look()?;
        if living.iter().any(|l| !self.sent.has(l.node.pid, l.node.generation)) {
            report.stopped_us = self.watch()?;
            living = self.look()?;
        }
        let nodes: Vec<tree::Node> = living.iter().map(|l| l.node.clone()).collect();
        if nodes != self.sent.nodes {
            let head = head_of(self.root, nodes.clone())?;
            report.bytes += image::put(sink, Kind::Head, &head).map_err(DumpError::Sink)?;
            self.sent.keep(&nodes);
            self.sent.nodes = nodes;
        }
        for Living { host, node } in living {
            // One that ends meanwhile is missed by the next look, and so is one in
            // the middle of exec or exit: it has no vDSO.
            let Ok(vmas) = proc::vmas(host) else { continue };
            if KernelPages::of(&vmas).is_none() {
                continue;
            }
            match self.sent.round(host, node.pid, vmas, Pass::Running, sink) {
                Ok(sent) => {
                    report.pages += sent.pages;
                    report.bytes += sent.bytes;
                }
                Err(DumpError::Process { source, .. })
                    if source.kind() == io::ErrorKind::NotFound || !still_runs(host, &node) =>
                {
                    tracing::debug!(%host, %source, "changed under a round: left to the next");
                }
                Err(err) => return Err(err),
            }
        }
        report.elapsed_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(report)
    }

    /// Stops the tree; the dump then sends what is left.
    pub fn freeze(self) -> Result<Frozen, DumpError> {
        Frozen::new(self.root, self.options, self.sent)
    }

    /// The processes as they are now. Zombies wait for the freeze.
    fn look(&self) -> Result<Vec<Living>, DumpError> {
        let hosts =
            proc::processes_below(self.root).map_err(|_| DumpError::NoProcess(self.root))?;
        let mut found = Vec::with_capacity(hosts.len());
        for host in hosts {
            let (Ok(status), Ok(stat)) = (Status::of(host), Stat::of(host)) else { continue };
            found.push((host, status, stat));
        }
        let is_living = |status: &Status| status.state != 'Z';
        if found.first().is_none_or(|(host, status, _)| *host != self.root || !is_living(status)) {
            return Err(DumpError::NoProcess(self.root));
        }
        let mut nodes = nodes(found.iter().map(|(host, status, stat)| (*host, status, stat)));
        if self.options.shell_job {
            adopt_session(&mut nodes);
        }
        let living = found.iter().zip(nodes).filter(|((_, status, _), _)| is_living(status));
        Ok(living.map(|((host, ..), node)| Living { host: *host, node }).collect())
    }

    /// Stops the tree for a moment and gives what is new a userfaultfd. Returns
    /// for how long it stood still, in microseconds.
    fn watch(&mut self) -> Result<u64, DumpError> {
        let started = Instant::now();
        let mut tree = freeze::freeze(self.root)?;
        for process in tree.processes.iter_mut().filter(|p| !p.is_zombie()) {
            let pid = process.pid;
            let stat = Stat::of(pid).map_err(|_| DumpError::Vanished(pid))?;
            let (ns_pid, generation) = (process.status.tgid(), stat.generation());
            if !self.sent.has(ns_pid, generation) {
                match Tracker::install(process, generation) {
                    Ok(tracker) => self.sent.adopt(ns_pid, tracker),
                    // Killed by another before that one stood still.
                    Err(err) if err.raw_os_error() == Some(libc::ESRCH) => {
                        tracing::debug!(%pid, "killed while the tree was stopped");
                    }
                    Err(err) => return Err(failed("watch the memory", pid)(err)),
                }
            }
        }
        tree.thaw()?;
        Ok(u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX))
    }
}

/// A process that is no zombie.
struct Living {
    host: Pid,
    node: tree::Node,
}

/// Whether this is still the same run of the same program.
fn still_runs(host: Pid, node: &tree::Node) -> bool {
    Status::of(host).is_ok_and(|status| !matches!(status.state, 'Z' | 'X'))
        && Stat::of(host).is_ok_and(|stat| stat.generation() == node.generation)
}

/// Why memory cannot be sent ahead.
fn obstacle(root: Pid) -> Option<String> {
    for pid in proc::processes_below(root).ok()? {
        let dir = fs::read_dir(format!("/proc/{pid}/fdinfo")).ok()?;
        for entry in dir.flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let flags = text.lines().find_map(|l| l.strip_prefix("flags:"));
            let flags = flags.and_then(|f| i32::from_str_radix(f.trim(), 8).ok()).unwrap_or(0);
            // The device writes to the page long after the kernel was asked, and
            // nobody notices that it did.
            if flags & libc::O_DIRECT != 0 && flags & libc::O_PATH == 0 {
                let fd = entry.file_name();
                return Some(format!(
                    "fd {} of pid {pid} is open for direct I/O",
                    fd.to_string_lossy()
                ));
            }
        }
    }
    None
}

/// In which state the process is while its memory is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// It runs on: what it writes from now on is for the next round.
    Running,
    /// It stands still: what is sent now is the last.
    Frozen,
}

impl Baseline {
    /// Begins to look at all processes once more.
    pub(crate) fn begin(&mut self) {
        self.sizes.clear();
    }

    fn has(&self, pid: i32, generation: u64) -> bool {
        self.trackers.get(&pid).is_some_and(|t| t.generation == generation)
    }

    /// Watches a process by `tracker` from now on. What the destination has of
    /// a program that ran there before is still what it has.
    fn adopt(&mut self, pid: i32, mut tracker: Tracker) {
        if let Some(former) = self.trackers.remove(&pid) {
            tracker.layout = former.layout;
            tracker.sent = former.sent;
        }
        self.trackers.insert(pid, tracker);
    }

    /// Watches no longer where a process has called exec since the last round:
    /// its userfaultfd watches the memory of the former program.
    pub(crate) fn forget_former(&mut self, nodes: &[tree::Node]) {
        for node in nodes {
            if let Some(tracker) = self.trackers.get_mut(&node.pid)
                && tracker.generation != node.generation
            {
                tracker.stop_watching();
            }
        }
    }

    /// Forgets what the destination will have thrown away when it has read
    /// these nodes.
    pub(crate) fn keep(&mut self, nodes: &[tree::Node]) {
        let kept = tree::kept(&self.nodes, nodes);
        for (pid, tracker) in &mut self.trackers {
            let is_new = self.nodes.iter().all(|n| n.pid != *pid);
            if !is_new && !kept.contains(pid) {
                tracker.forget();
            }
        }
    }

    /// The mappings that the last look at a process found.
    pub(crate) fn known_vmas(&self, pid: i32) -> &[Vma] {
        self.trackers.get(&pid).map_or(&[], |t| &t.vmas)
    }

    /// Sends the mappings of a process if they have changed, and the pages that
    /// the destination does not have.
    pub(crate) fn round(
        &mut self,
        host: Pid,
        pid: i32,
        vmas: Vec<Vma>,
        pass: Pass,
        sink: &mut dyn ImageSink,
    ) -> Result<Sent, DumpError> {
        let (objects, sizes) = (&mut self.objects, &mut self.sizes);
        let tracker = self.trackers.get_mut(&pid);
        let mut layout = memory::layout(
            pid,
            &vmas,
            tracker.is_some(),
            |vma| objects.identify(host, vma),
            |vma| file_size(sizes, host, vma),
        )
        .map_err(failed("take down the memory map", host))?;
        if pass == Pass::Running {
            // Their segments are made in the freeze.
            layout.mappings.retain(|m| !matches!(m.backing, Backing::Segment { .. }));
        }
        if objects.len() != self.announced {
            // Mappings name them, so they come first; content waits.
            objects.announce(sink).map_err(DumpError::Sink)?;
            self.announced = objects.len();
        }
        match tracker {
            Some(tracker) => {
                let sent = tracker.round(host, layout, pass, sink);
                tracker.vmas = vmas;
                sent.map_err(failed("send the memory", host))
            }
            None => send_all(host, &layout, sink).map_err(failed("send the memory", host)),
        }
    }
}

/// Sizes of files by path, device and inode: on overlayfs files of two layers may
/// have both numbers in common.
type Sizes = HashMap<(Vec<u8>, (u64, u64)), u64>;

/// The size of a mapped file: most are mapped many times, and by many.
fn file_size(sizes: &mut Sizes, host: Pid, vma: &Vma) -> io::Result<u64> {
    let VmaKind::File { path, id, .. } = &vma.kind else { return shared::file_size(host, vma) };
    match sizes.entry((path.clone(), *id)) {
        Entry::Occupied(known) => Ok(*known.get()),
        Entry::Vacant(place) => Ok(*place.insert(shared::file_size(host, vma)?)),
    }
}

fn send_all(host: Pid, layout: &Layout, sink: &mut dyn ImageSink) -> io::Result<Sent> {
    let bytes = image::put(sink, Kind::Layout, layout)?;
    let sent = pages::dump(host, layout.pid, &layout.mappings, sink)?;
    Ok(Sent { bytes: sent.bytes + bytes, ..sent })
}

/// What is known of one process's memory and what was sent of it.
struct Tracker {
    generation: u64,
    /// `None` when the program that it watched is gone.
    uffd: Option<WriteTracker>,
    vmas: Vec<Vma>,
    layout: Option<Rc<Layout>>,
    /// Where writes are watched.
    watched: Intervals,
    /// Pages that the destination has.
    sent: Intervals,
    /// Pages that could not be read when they were to be sent.
    owed: Intervals,
    /// Pages sent in the last round.
    last: Vec<(u64, u64)>,
}

impl Tracker {
    /// Makes the stopped process create a userfaultfd and takes it over.
    fn install(process: &mut Process, generation: u64) -> io::Result<Self> {
        let mut vmas = proc::vmas(process.pid)?;
        let tgid = process.status.tgid();
        let threads = process.threads.split_first_mut();
        let (leader, others) = threads.ok_or(io::ErrorKind::NotFound)?;
        let signals = SignalUse::of(&process.statuses);
        let remote = Remote::install(leader, others, (tgid, tgid), &mut vmas, &signals)?;
        // Whatever happens next, thawing takes the stub out again.
        let remote = process.remote.insert(remote);
        let mut batch = Batch::new();
        let call = batch.call(libc::SYS_userfaultfd, args![userfaultfd::FLAGS]);
        let fd = remote.run(leader, &batch)?.get(call)?;
        let stolen = steal(process.pid, fd);
        let mut batch = Batch::new();
        batch.call(libc::SYS_close, args![fd]);
        remote.run(leader, &batch)?;
        Ok(Self {
            generation,
            uffd: Some(WriteTracker::new(stolen?)?),
            vmas,
            layout: None,
            watched: Intervals::default(),
            sent: Intervals::default(),
            owed: Intervals::default(),
            last: Vec::new(),
        })
    }

    /// The destination has nothing of it any more.
    fn forget(&mut self) {
        self.layout = None;
        self.sent = Intervals::default();
        self.watched = Intervals::default();
        self.last.clear();
    }

    fn stop_watching(&mut self) {
        self.uffd = None;
        self.watched = Intervals::default();
        self.last.clear();
    }

    fn round(
        &mut self,
        host: Pid,
        layout: Layout,
        pass: Pass,
        sink: &mut dyn ImageSink,
    ) -> io::Result<Sent> {
        let mut bytes = 0;
        if self.layout.take_if(|old| !old.is_same_space(&layout)).is_some() {
            self.sent = Intervals::default();
            self.watched = Intervals::default();
            self.owed = Intervals::default();
        }
        let old = self.layout.as_ref().map_or(&[][..], |old| &old.mappings);
        let changes = memory::changes(old, &layout.mappings);
        let is_first = self.layout.is_none();
        if is_first || !changes.is_empty() {
            bytes += image::put(sink, Kind::Layout, &layout)?;
        }
        let mut fresh = Intervals::default();
        for change in &changes {
            let range = match change {
                Change::Protect(..) => continue,
                Change::Unmap(start, end) => (*start, *end),
                Change::Map(mapping) => {
                    fresh.insert((mapping.start, mapping.end));
                    (mapping.start, mapping.end)
                }
            };
            self.sent.remove(range);
            self.watched.remove(range);
        }
        // From here on, for the destination has it whatever fails below; so do
        // pages that are owed.
        let layout = Rc::clone(self.layout.insert(Rc::new(layout)));
        let (ns_pid, mappings) = (layout.pid, layout.mappings.as_slice());
        self.take(host, mappings, &fresh, pass)?;
        if pass == Pass::Frozen {
            // What the kernel wrote on behalf of a call that was under way while
            // the page was taken.
            self.owed.extend(self.last.drain(..));
            bytes += self.drop_gone(host, ns_pid, mappings, sink)?;
        }
        let private = || mappings.iter().filter(|m| !m.shared);
        let ranges: Vec<(u64, u64)> =
            private().flat_map(|m| self.owed.within((m.start, m.end))).collect();
        let sent = &self.sent;
        let is_fresh = |range| !sent.touches(range);
        let (done, lost) = pages::send(host, ns_pid, mappings, &ranges, &is_fresh, sink)?;
        if pass == Pass::Frozen && !lost.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.sent.extend(ranges.iter().copied());
        lost.iter().for_each(|range| self.sent.remove(*range));
        self.owed = Intervals::default();
        self.owed.extend(lost);
        self.last = if is_first { Vec::new() } else { ranges };
        Ok(Sent { bytes: done.bytes + bytes, ..done })
    }

    /// Adds to what is owed the pages that were written, or came, since the last
    /// time.
    fn take(
        &mut self,
        host: Pid,
        mappings: &[Mapping],
        fresh: &Intervals,
        pass: Pass,
    ) -> io::Result<()> {
        if self.uffd.is_none() {
            self.owed.extend(pages::own(host, mappings)?);
            return Ok(());
        }
        // In this order: a page that is read before writes to it are noticed
        // could change in between.
        for mapping in mappings.iter().filter(|m| !m.shared) {
            let range = (mapping.start, mapping.end);
            if mapping.is_writable() && self.watched.within(range) != [range] {
                self.watched.insert(range);
            }
            for range in self.watched.within(range) {
                match self.take_written(host, mapping, range) {
                    Ok(written) => self.owed.extend(written),
                    // Unmapped since we looked: the next round knows better.
                    Err(err) if pass == Pass::Running => {
                        tracing::debug!(%err, start = range.0, "mapping changed meanwhile");
                        self.watched.remove(range);
                    }
                    Err(err) => return Err(err),
                }
            }
            for range in fresh.within(range) {
                if !self.watched.touches(range) {
                    self.owed.extend(pages::own(host, &[mapping.clip(range.0, range.1)])?);
                }
            }
        }
        Ok(())
    }

    /// Takes what was written in a range that is to be watched. A mapping that
    /// has replaced the one we knew is not yet, and all of it counts as written.
    fn take_written(
        &self,
        host: Pid,
        mapping: &Mapping,
        range: (u64, u64),
    ) -> io::Result<Vec<(u64, u64)>> {
        match pages::take_written(host, mapping, range) {
            Err(err) if err.raw_os_error() == Some(libc::EPERM) => {
                self.uffd.as_ref().ok_or(err)?.register(range)?;
                pages::take_written(host, mapping, range)
            }
            other => other,
        }
    }

    /// Names pages that were sent and are the process's own no longer.
    fn drop_gone(
        &mut self,
        host: Pid,
        pid: i32,
        mappings: &[Mapping],
        sink: &mut dyn ImageSink,
    ) -> io::Result<u64> {
        let mut gone = self.sent.clone();
        pages::own(host, mappings)?.into_iter().for_each(|range| gone.remove(range));
        let ranges: Vec<(u64, u64)> = gone.iter().collect();
        if ranges.is_empty() {
            return Ok(0);
        }
        for &range in &ranges {
            self.sent.remove(range);
            self.owed.remove(range);
        }
        image::put(sink, Kind::Drop, &image::Drop { pid, ranges })
    }
}

/// Duplicates fd `fd` of `pid` into this process.
fn steal(pid: Pid, fd: u64) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(io::ErrorKind::NotFound)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    Ok(pidfd_getfd(pidfd_open(pid, PidfdFlags::empty())?, fd, PidfdGetfdFlags::empty())?)
}

/// The nodes of a frozen tree such that the destination can get there from what
/// it has: where it cannot, all but the root are made anew.
pub(crate) fn reachable(baseline: &Baseline, nodes: &mut [tree::Node]) {
    let Some(root) = nodes.first().map(|n| n.sid) else { return };
    let kept: BTreeSet<i32> = tree::kept(&baseline.nodes, nodes);
    if !baseline.nodes.is_empty() && tree::plan(nodes, root, &kept).is_err() {
        nodes.iter_mut().skip(1).for_each(|node| node.generation = !node.generation);
    }
}
