//! The tree while records arrive, and when it is complete.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::unistd::Pid;
use serde::de::DeserializeOwned;

use super::{
    Sandbox,
    task::{Task, close_all},
};
use crate::{
    RestoreError, host,
    image::{self, Head, Kind, Process},
    resource::{
        files::{self, Assembly, Opened, Target},
        memory::{Backing, Layout},
        pages::{self, Runs},
        shared::{Created, Object, ObjectId},
        sysv,
        tree::{self, Step},
    },
    stub::{Batch, args},
    sys::ptrace,
};

/// A tree of which the image is still arriving. Dropping it kills the tree.
pub(super) struct Builder {
    tasks: Tasks,
    root: i32,
    /// Root directory of the container.
    directory: OwnedFd,
    /// Network namespace of the container.
    netns: OwnedFd,
    stdio: [OwnedFd; 3],
    head: Option<Head>,
    objects: Created,
    /// System V segments, attached by us until all who use them have.
    segments: sysv::Created,
    /// Files of which not all has arrived.
    assembly: Assembly,
    files: Option<Opened>,
    processes: BTreeMap<i32, Process>,
    /// Files known to be here as the image wants them.
    checked: BTreeSet<(Vec<u8>, u64)>,
}

/// The processes by their pids in the image. Dropping them kills them.
#[derive(Default)]
struct Tasks(BTreeMap<i32, Task>);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.values().for_each(Task::kill);
        ptrace::reap(self.0.values().flat_map(Task::hosts).collect());
    }
}

impl Builder {
    /// Takes over the sandbox's init.
    pub(super) fn seize(sandbox: Sandbox) -> Result<Self, RestoreError> {
        let Sandbox { init, stdio } = sandbox;
        let failed = |source| RestoreError::Process {
            what: "take over the sandbox".into(),
            pid: init.as_raw(),
            source,
        };
        let task = Task::seize(init).map_err(failed)?;
        let root = task.pid;
        let tasks = Tasks(BTreeMap::from([(root, task)]));
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let path = format!("/proc/{init}/root");
        let directory = rustix::fs::open(path, flags, rustix::fs::Mode::empty())
            .map_err(|err| failed(err.into()))?;
        let netns = File::open(format!("/proc/{init}/ns/net")).map_err(failed)?.into();
        Ok(Self {
            tasks,
            root,
            directory,
            netns,
            assembly: Assembly::default(),
            files: None,
            stdio,
            head: None,
            objects: Created::default(),
            segments: sysv::Created::default(),
            processes: BTreeMap::new(),
            checked: BTreeSet::new(),
        })
    }

    /// Takes one record; returns how many pages it filled.
    pub(super) fn record(&mut self, kind: Kind, body: &[u8]) -> Result<u64, RestoreError> {
        match (&self.head, kind) {
            (None, Kind::Head) => self.begin(decode(body)?)?,
            (None, _) => return Err(RestoreError::Image("it does not begin with its head".into())),
            (Some(_), Kind::Object) => {
                let object: Object = decode(body)?;
                self.objects
                    .create(object, self.directory.as_fd())
                    .map_err(RestoreError::Source)?;
            }
            (Some(_), Kind::ObjectPages) => {
                let Runs { owner, runs, data } = runs(body)?;
                let filled = match sysv::segment(owner) {
                    Some(id) => self.segments.fill(id, &runs, data),
                    None => self.objects.fill(owner, &runs, data),
                };
                filled.map_err(RestoreError::Source)?;
                return Ok(data.len() as u64 / 4096);
            }
            (Some(_), Kind::Sysv) => {
                let image: sysv::Image = decode(body)?;
                let task = self.task(self.root)?;
                self.segments = sysv::restore(task.host(), image)
                    .map_err(|err| task.failed("make the System V objects", err))?;
            }
            (Some(_), Kind::Layout) => self.map(decode(body)?)?,
            (Some(_), Kind::Pages) => {
                let Runs { owner, runs, data } = runs(body)?;
                let task = self.task(i32::try_from(owner).unwrap_or(0))?;
                pages::restore(task.host(), &task.forced, &runs, data)
                    .map_err(|err| task.failed("fill memory", err))?;
                return Ok(data.len() as u64 / 4096);
            }
            (Some(_), Kind::Process) => {
                let process: Process = decode(body)?;
                if process.threads.iter().any(|t| !t.queue.is_valid()) || !process.queue.is_valid()
                {
                    return Err(RestoreError::Image("a queued signal is malformed".into()));
                }
                self.task(process.pid)?;
                self.processes.insert(process.pid, process);
            }
            (Some(_), Kind::Files) => {
                let Some(image) = self.assembly.take(body)? else { return Ok(0) };
                let [stdin, stdout, stderr] = &self.stdio;
                let stdio = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
                let (root, netns) = (self.directory.as_fd(), self.netns.as_fd());
                let (tasks, objects) = (&self.tasks.0, &self.objects);
                let host = &|pid| tasks.get(&pid).map(Task::host);
                let target = Target { root, netns, stdio, objects, host };
                self.files = Some(files::open(&image, &target)?);
            }
            (Some(_), Kind::Drop) => {
                let image::Drop { pid, ranges } = decode(body)?;
                self.task(pid)?.drop_pages(&ranges)?;
            }
            (Some(_), Kind::Head) => self.reshape(decode(body)?)?,
            (Some(_), Kind::End) => {
                return Err(RestoreError::Image("a record out of place".into()));
            }
        }
        Ok(0)
    }

    fn task(&self, pid: i32) -> Result<&Task, RestoreError> {
        let unknown = || RestoreError::Image(format!("pid {pid} is not in its tree"));
        self.tasks.0.get(&pid).ok_or_else(unknown)
    }

    /// Checks that the image can live here and creates the tree.
    fn begin(&mut self, head: Head) -> Result<(), RestoreError> {
        let missing = |object: &str, reason: String| {
            Err(RestoreError::Missing { object: object.into(), reason })
        };
        if head.version != image::VERSION {
            let (theirs, ours) = (head.version, image::VERSION);
            return missing("image", format!("it has version {theirs}, this Dunlin reads {ours}"));
        }
        if head.arch != std::env::consts::ARCH {
            return missing("CPU", format!("the image is of a {} machine", head.arch));
        }
        let xstate = ptrace::xstate(self.task(self.root)?.host()).map_err(RestoreError::Source)?;
        if xstate.len() as u64 != u64::from(head.xstate_len) {
            let (theirs, ours) = (head.xstate_len, xstate.len());
            return missing("CPU", format!("its xsave area has {ours} bytes, not {theirs}"));
        }
        if host::vdso_checksum().map_err(RestoreError::Source)? != head.vdso {
            return missing("kernel", "its vDSO differs from the source's".into());
        }
        let root_sid = crate::proc::Status::of(self.task(self.root)?.host())
            .map_err(RestoreError::Source)?
            .sid();
        if head.nodes.first().map(|n| n.pid) != Some(self.root) {
            return missing("pid", format!("the tree's root is not pid {}", self.root));
        }
        let none = BTreeSet::new();
        let steps = tree::plan(&head.nodes, root_sid, &none).map_err(RestoreError::Image)?;
        let mut batch = Batch::new();
        close_all(&mut batch);
        self.task(self.root)?.run("close the skeleton's files", &batch)?;
        for step in &steps {
            self.step(step)?;
        }
        self.head = Some(head);
        Ok(())
    }

    /// Gives the tree the shape it has by now: what has ended goes, what is new
    /// comes, the others keep what they hold.
    fn reshape(&mut self, head: Head) -> Result<(), RestoreError> {
        let old = self.head.take().map(|head| head.nodes).unwrap_or_default();
        let kept = tree::kept(&old, &head.nodes);
        let gone: Vec<&tree::Node> = old.iter().filter(|n| !kept.contains(&n.pid)).collect();
        for node in &gone {
            self.task(node.pid)?.kill();
        }
        for node in gone.iter().rev() {
            ptrace::reap(self.remove(node.pid)?.hosts().collect());
        }
        for node in gone {
            // Orphans of one that is gone too are the root's.
            let reaper = if kept.contains(&node.ppid) { node.ppid } else { self.root };
            let mut batch = Batch::new();
            batch.try_call(libc::SYS_wait4, args![node.pid, 0_u64, 0_u64, 0_u64]);
            self.task(reaper)?.run("reap a process", &batch)?;
        }
        let steps =
            tree::plan(&head.nodes, head.nodes[0].sid, &kept).map_err(RestoreError::Image)?;
        for step in &steps {
            self.step(step)?;
        }
        self.head = Some(head);
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), RestoreError> {
        let mut batch = Batch::new();
        match *step {
            Step::Fork { parent, pid, exit_signal } => {
                let parent = self.task(parent)?;
                let child = parent
                    .fork(pid, exit_signal)
                    .map_err(|err| parent.failed(&format!("create child {pid}"), err))?;
                self.tasks.0.insert(pid, child);
                Ok(())
            }
            Step::NewSession { pid } => {
                batch.call(libc::SYS_setsid, []);
                self.task(pid)?.run("found a session", &batch)
            }
            Step::JoinGroup { pid, pgid } => {
                batch.call(libc::SYS_setpgid, args![0_u64, pgid]);
                self.task(pid)?.run("join a process group", &batch)
            }
            Step::Subreaper { pid } => {
                let (zero, one) = (0_u64, 1_u64);
                let set = libc::PR_SET_CHILD_SUBREAPER;
                batch.call(libc::SYS_prctl, args![set, one, zero, zero, zero]);
                self.task(pid)?.run("take in orphans", &batch)
            }
            Step::Leave { parent, pid } => {
                self.remove(pid)?.exit(0).map_err(RestoreError::Source)?;
                batch.call(libc::SYS_wait4, args![pid, 0_u64, 0_u64, 0_u64]);
                self.task(parent)?.run("reap a stand-in", &batch)
            }
            Step::Stop { pid, waited_by } => {
                let task = self.task(pid)?;
                task.stop().map_err(|err| task.failed("stop it as it was", err))?;
                let Some(parent) = waited_by else { return Ok(()) };
                batch.call(libc::SYS_wait4, args![pid, 0_u64, libc::WUNTRACED, 0_u64]);
                self.task(parent)?.run("wait for a stopped child", &batch)
            }
            Step::Die { pid, ref zombie } => self.remove(pid)?.die(zombie).map_err(|source| {
                RestoreError::Process { what: "leave a zombie".into(), pid, source }
            }),
        }
    }

    fn remove(&mut self, pid: i32) -> Result<Task, RestoreError> {
        let unknown = || RestoreError::Image(format!("pid {pid} is not in its tree"));
        self.tasks.0.remove(&pid).ok_or_else(unknown)
    }

    /// Makes the mappings of one process.
    fn map(&mut self, layout: Layout) -> Result<(), RestoreError> {
        let mut wanted: BTreeSet<ObjectId> = BTreeSet::new();
        for mapping in &layout.mappings {
            match &mapping.backing {
                Backing::Anonymous | Backing::Segment { .. } => {}
                Backing::File { path, size, .. } => {
                    check_file(self.directory.as_fd(), path, *size, &mut self.checked)?;
                }
                Backing::Object { id, .. } => {
                    wanted.insert(*id);
                }
            }
        }
        let unknown = |id| RestoreError::Image(format!("memory object {id} is missing"));
        let objects: Vec<(ObjectId, BorrowedFd<'_>)> = wanted
            .into_iter()
            .map(|id| Ok((id, self.objects.get(id).ok_or_else(|| unknown(id))?)))
            .collect::<Result<_, RestoreError>>()?;
        let pid = layout.pid;
        let unknown = || RestoreError::Image(format!("pid {pid} is not in its tree"));
        self.tasks.0.get_mut(&pid).ok_or_else(unknown)?.map(layout, &objects)
    }

    /// Completes every process.
    pub(super) fn finish(mut self) -> Result<Built, RestoreError> {
        if self.head.is_none() {
            return Err(RestoreError::Image("it is empty".into()));
        }
        let files = self
            .files
            .take()
            .ok_or_else(|| RestoreError::Image("it lacks the open files".into()))?;
        let incomplete = |pid: &i32| RestoreError::Image(format!("pid {pid} is incomplete"));
        for (pid, task) in &mut self.tasks.0 {
            let process = self.processes.get(pid).ok_or_else(|| incomplete(pid))?;
            if task.layout.is_none() {
                return Err(incomplete(pid));
            }
            task.become_process(process, &files)?;
        }
        self.objects.seal().map_err(RestoreError::Source)?;
        let Self { tasks, root, processes, .. } = self;
        Ok(Built { tasks, root, processes, files })
    }
}

/// Judges a file that is to be mapped: the same name must show the same program.
fn check_file(
    root: BorrowedFd<'_>,
    path: &[u8],
    size: u64,
    checked: &mut BTreeSet<(Vec<u8>, u64)>,
) -> Result<(), RestoreError> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, openat2};
    if !checked.insert((path.to_vec(), size)) {
        return Ok(());
    }
    let missing = |reason: String| RestoreError::Missing {
        object: format!("file {}", String::from_utf8_lossy(path)),
        reason,
    };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
        .map_err(|err| missing(io::Error::from(err).to_string()))?;
    let here = fstat(&file).map_err(|err| missing(io::Error::from(err).to_string()))?.st_size;
    if here.cast_unsigned() != size {
        return Err(missing(format!("it has {here} bytes, the source's has {size}")));
    }
    Ok(())
}

fn runs(body: &[u8]) -> Result<Runs<'_>, RestoreError> {
    pages::decode_runs(body).ok_or_else(|| RestoreError::Image("pages without a head".into()))
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, RestoreError> {
    postcard::from_bytes(body).map_err(|err| RestoreError::Image(err.to_string()))
}

/// A complete tree. Dropping it kills it.
pub(super) struct Built {
    tasks: Tasks,
    root: i32,
    processes: BTreeMap<i32, Process>,
    files: Opened,
}

impl Built {
    pub(super) fn processes(&self) -> u64 {
        self.tasks.0.len() as u64
    }

    pub(super) fn threads(&self) -> u64 {
        self.tasks.0.values().map(Task::thread_count).sum()
    }

    /// Arms every timer, then lets every thread run.
    pub(super) fn thaw(mut self) -> Result<(), RestoreError> {
        for (pid, task) in &self.tasks.0 {
            task.lock(self.files.posix_locks(*pid))?;
            if let Some(control) = self.files.control(*pid) {
                task.control(control);
            }
        }
        let hosts: BTreeMap<i32, Pid> = self
            .tasks
            .0
            .iter()
            .flat_map(|(pid, task)| {
                self.processes[pid].threads.iter().map(|thread| thread.tid).zip(task.hosts())
            })
            .collect();
        self.files.arm(&|pid| hosts.get(&pid).copied())?;
        // An end of a pipe that we keep would hide its closing.
        drop(self.files);
        for (pid, task) in &mut self.tasks.0 {
            let process = &self.processes[pid];
            task.arm(process)?;
            task.strip(process)?;
        }
        let tasks = std::mem::take(&mut self.tasks.0);
        // Nobody may find a parent, a peer or a child that does not exist yet;
        // all do. The root comes last: as long as it is ours, our end is the
        // end of all of it, and after that all of it runs.
        let (root, rest) = tasks.into_iter().partition::<Vec<_>, _>(|(pid, _)| *pid == self.root);
        for (pid, task) in rest.into_iter().chain(root) {
            task.release().map_err(|source| RestoreError::Process {
                what: "let it run".into(),
                pid,
                source,
            })?;
        }
        Ok(())
    }
}
