//! Stopping a whole tree, and letting it go.

use std::{
    collections::BTreeMap,
    fs, io,
    time::{Duration, Instant},
};

use nix::unistd::Pid;

use crate::{
    DumpError,
    proc::{self, Status, Vma},
    stub::{Remote, Tracee},
    sys::ptrace::{self, Seize},
};

/// One frozen process.
pub(crate) struct Process {
    /// Its pid as we see it.
    pub(crate) pid: Pid,
    pub(crate) status: Status,
    /// Its threads, leader first; none for a zombie.
    pub(crate) threads: Vec<Tracee>,
    /// What the kernel says of each of them.
    pub(crate) statuses: Vec<Status>,
    pub(crate) remote: Option<Remote>,
    pub(crate) vmas: Vec<Vma>,
}

impl Process {
    pub(crate) fn is_zombie(&self) -> bool {
        self.threads.is_empty()
    }
}

/// A stopped tree, root first. Dropping it thaws it.
pub(crate) struct FrozenTree {
    pub(crate) processes: Vec<Process>,
}

/// How often a tree that is in the middle of a `vfork` is let go to finish it.
const VFORK_PATIENCE: u32 = 200;

/// How long threads that are let go are waited for: one in a `vfork` whose child
/// does not call exec never stops.
const PATIENCE: Duration = Duration::from_secs(5);

/// Stops every thread of the tree below `root`.
pub(crate) fn freeze(root: Pid) -> Result<FrozenTree, DumpError> {
    for _ in 0..VFORK_PATIENCE {
        match try_freeze(root) {
            Ok(Attempt::Frozen(tree)) => return Ok(tree),
            // The parent cannot stop before its child has called exec, and the
            // child, once stopped, never does: let both go and come back.
            Ok(Attempt::InVfork) => std::thread::sleep(Duration::from_millis(1)),
            // Ended just then, as the processes of a busy shell do.
            Err(DumpError::Vanished(pid)) if pid != root => {
                tracing::debug!(%pid, "ended while the tree was stopped");
            }
            Err(err) => return Err(err),
        }
    }
    let source = io::Error::other("it waits for the child of a vfork that does not call exec");
    Err(DumpError::Process { what: "stop all threads", pid: root, source })
}

enum Attempt {
    Frozen(FrozenTree),
    InVfork,
}

/// Seized threads by process; dropped, they are let go.
#[derive(Default)]
struct Seized {
    order: Vec<Pid>,
    threads: BTreeMap<Pid, Vec<(Pid, Option<Tracee>)>>,
}

impl Drop for Seized {
    fn drop(&mut self) {
        let mut leaving = Leaving::default();
        // Children first: a parent in vfork stops only when its child has gone on.
        for pid in self.order.iter().rev() {
            for (tid, tracee) in self.threads.remove(pid).into_iter().flatten() {
                match tracee {
                    Some(tracee) => leaving.release(&tracee),
                    // Asked to stop but not waited for: detaching needs the stop.
                    None => leaving.unsettled.push(tid),
                }
            }
        }
        leaving.finish();
    }
}

/// Threads on their way out of our hands.
#[derive(Default)]
struct Leaving {
    unsettled: Vec<Pid>,
    /// Killed meanwhile: their parents learn of it when we have seen it.
    dead: Vec<Pid>,
}

impl Leaving {
    fn release(&mut self, tracee: &Tracee) {
        if let Err(err) = tracee.release() {
            tracing::debug!(tid = %tracee.tid, %err, "thread killed before it was released");
            self.dead.push(tracee.tid);
        }
    }

    /// Waits for all of them together: each may be waiting for another. What is
    /// not seen in time is let go by our own end.
    fn finish(mut self) {
        let started = Instant::now();
        loop {
            let mut waiting = std::mem::take(&mut self.unsettled);
            waiting.retain(|&tid| match ptrace::has_status(tid) {
                Ok(false) => true,
                Ok(true) => {
                    match Tracee::settle(tid) {
                        Ok(Some(tracee)) => self.release(&tracee),
                        Ok(None) => {}
                        Err(_) => self.dead.push(tid),
                    }
                    false
                }
                Err(_) => false,
            });
            self.dead.retain(|&tid| !ptrace::has_ended(tid));
            if waiting.is_empty() && self.dead.is_empty() {
                return;
            }
            if PATIENCE < started.elapsed() {
                tracing::warn!(?waiting, dead = ?self.dead, "threads could not be let go yet");
                return;
            }
            self.unsettled = waiting;
            std::thread::yield_now();
        }
    }
}

fn try_freeze(root: Pid) -> Result<Attempt, DumpError> {
    let mut seized = Seized::default();
    // A pass that finds nothing new proves that nobody was left to fork.
    loop {
        let processes = proc::processes_below(root).map_err(|_| DumpError::NoProcess(root))?;
        let mut new = Vec::new();
        for pid in processes {
            if !seized.threads.contains_key(&pid) {
                seized.order.push(pid);
                seized.threads.insert(pid, Vec::new());
            }
            for tid in proc::threads(pid).unwrap_or_default() {
                let known = &seized.threads[&pid];
                if known.iter().all(|(t, _)| *t != tid) && request_stop(tid)? {
                    seized.threads.get_mut(&pid).expect("inserted above").push((tid, None));
                    new.push((pid, tid));
                }
            }
        }
        if new.is_empty() {
            break;
        }
        for (pid, tid) in new {
            let stopped = match wait_unless_vfork(tid) {
                Ok(Some(stopped)) => stopped,
                Ok(None) => return Ok(Attempt::InVfork),
                // Killed by another that does not stand still yet.
                Err(err) if is_gone(&err) => return Err(DumpError::Vanished(pid)),
                Err(source) => {
                    return Err(DumpError::Process { what: "stop a thread", pid: tid, source });
                }
            };
            let threads = seized.threads.get_mut(&pid).expect("inserted above");
            match stopped {
                Settled::Stopped(tracee) => {
                    let slot = threads.iter_mut().find(|(t, _)| *t == tid).expect("pushed above");
                    slot.1 = Some(*tracee);
                }
                Settled::Gone => threads.retain(|(t, _)| *t != tid),
            }
        }
    }
    collect(seized).map(Attempt::Frozen)
}

enum Settled {
    Stopped(Box<Tracee>),
    Gone,
}

/// Waits for the stop of `tid`, unless it is the parent in a `vfork`.
fn wait_unless_vfork(tid: Pid) -> io::Result<Option<Settled>> {
    let mut spins = 0_u32;
    while !ptrace::has_status(tid)? {
        spins += 1;
        if spins.is_multiple_of(64) && is_in_vfork(tid) {
            return Ok(None);
        }
        nix::sched::sched_yield()?;
    }
    Ok(Some(match Tracee::settle(tid)? {
        Some(tracee) => Settled::Stopped(Box::new(tracee)),
        None => Settled::Gone,
    }))
}

/// In a `vfork` the kernel holds the parent in an uninterruptible clone.
fn is_in_vfork(tid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{tid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    let call = fs::read_to_string(format!("/proc/{tid}/syscall")).unwrap_or_default();
    let nr = call.split_whitespace().next().and_then(|w| w.parse::<i64>().ok());
    state == Some('D') && matches!(nr, Some(libc::SYS_vfork | libc::SYS_clone | libc::SYS_clone3))
}

fn is_gone(err: &io::Error) -> bool {
    err.raw_os_error() == Some(libc::ESRCH)
}

/// Seizes a thread and asks it to stop; `false` when it has none to stop.
fn request_stop(tid: Pid) -> Result<bool, DumpError> {
    let request =
        |suspend_seccomp| match Tracee::request_stop(tid, Seize::Source { suspend_seccomp }) {
            Ok(()) => Ok(true),
            Err(err) if is_gone(&err) => Ok(false),
            Err(err) => Err(err),
        };
    // To ask first whether there is anything to suspend costs more than to do it.
    let seized = request(true).or_else(|source| match Status::of(tid) {
        // What has ended cannot be seized, nor asked what it was.
        Err(_) => Ok(false),
        Ok(status) if matches!(status.state, 'Z' | 'X') => Ok(false),
        // A kernel without `CONFIG_CHECKPOINT_RESTORE`, or a caller that is
        // filtered itself, cannot suspend.
        Ok(status) if status.seccomp == 0 => request(false),
        Ok(_) => Err(source),
    });
    seized.map_err(|source| DumpError::Process { what: "trace a thread", pid: tid, source })
}

/// Turns the seized threads into processes.
fn collect(mut seized: Seized) -> Result<FrozenTree, DumpError> {
    let mut found = Vec::with_capacity(seized.order.len());
    for &pid in &seized.order {
        let threads = &seized.threads[&pid];
        match Status::of(pid) {
            // One that was stopped and then killed, by another that did not
            // stand still yet, is about to be a zombie.
            Ok(status)
                if status.state != 't'
                    && threads.iter().any(|(tid, t)| *tid == pid && t.is_some()) =>
            {
                return Err(DumpError::Vanished(pid));
            }
            Ok(status) => found.push((pid, status)),
            // It ended, and its parent reaped it, before that one stood still.
            Err(_) if threads.iter().all(|(_, t)| t.is_none()) => {}
            Err(_) => return Err(DumpError::Vanished(pid)),
        }
    }
    let mut tree = FrozenTree { processes: Vec::with_capacity(found.len()) };
    for (pid, status) in found {
        let threads = seized.threads.remove(&pid).unwrap_or_default();
        let mut threads: Vec<Tracee> = threads.into_iter().filter_map(|(_, t)| t).collect();
        threads.sort_by_key(|t| t.tid != pid);
        let (remote, vmas) = (None, Vec::new());
        tree.processes.push(Process { pid, status, threads, statuses: Vec::new(), remote, vmas });
    }
    // From here on the tree's own drop thaws them.
    for process in &mut tree.processes {
        for thread in &process.threads {
            process.statuses.push(if thread.tid == process.pid {
                process.status.clone()
            } else {
                Status::of(thread.tid).map_err(|_| DumpError::Vanished(process.pid))?
            });
        }
    }
    if tree.processes.first().is_none_or(Process::is_zombie) {
        return Err(DumpError::NoProcess(tree.processes.first().map_or(Pid::this(), |p| p.pid)));
    }
    Ok(tree)
}

impl FrozenTree {
    /// Lets everything run on, root last: it may be what watches the others.
    pub(crate) fn thaw(&mut self) -> Result<(), DumpError> {
        let mut first = Ok(());
        let mut leaving = Leaving::default();
        for process in std::mem::take(&mut self.processes).into_iter().rev() {
            let Process { pid, threads, remote, .. } = process;
            if let (Some(remote), Some(leader)) = (remote, threads.first())
                && let Err(source) = remote.remove(leader)
                && !is_gone(&source)
            {
                let what = "remove the stub";
                first = first.and(Err(DumpError::Process { what, pid, source }));
            }
            threads.iter().for_each(|thread| leaving.release(thread));
        }
        leaving.finish();
        first
    }

    /// Takes the stub out of every process that has it.
    pub(crate) fn withdraw(&mut self) -> Result<(), DumpError> {
        for Process { pid, threads, remote, .. } in &mut self.processes {
            if let (Some(remote), Some(leader)) = (remote.take(), threads.first()) {
                remote.remove(leader).map_err(|source| {
                    let what = "remove the stub";
                    DumpError::Process { what, pid: *pid, source }
                })?;
            }
        }
        Ok(())
    }

    /// Lets go of every process but leaves it stopped.
    pub(crate) fn park(&mut self) -> Result<(), DumpError> {
        // Before the stop is queued: it would end the stub's last batch.
        self.withdraw()?;
        for process in self.processes.iter().filter(|p| !p.is_zombie()) {
            // Takes effect when the thread is let go, before its next
            // instruction.
            nix::sys::signal::kill(process.pid, nix::sys::signal::SIGSTOP).map_err(|err| {
                let (what, pid) = ("stop the process", process.pid);
                DumpError::Process { what, pid, source: err.into() }
            })?;
        }
        self.thaw()
    }

    /// Ends every process without one more instruction of its own.
    pub(crate) fn kill(&mut self) -> Result<(), DumpError> {
        let processes = std::mem::take(&mut self.processes);
        for process in processes.iter().filter(|p| !p.is_zombie()) {
            match nix::sys::signal::kill(process.pid, nix::sys::signal::SIGKILL) {
                Ok(()) | Err(nix::Error::ESRCH) => {}
                Err(err) => {
                    let (what, pid) = ("end the process", process.pid);
                    return Err(DumpError::Process { what, pid, source: err.into() });
                }
            }
        }
        // A parent learns of the end only when the tracer has seen it.
        let threads = processes.iter().flat_map(|p| &p.threads);
        ptrace::reap(threads.map(|thread| thread.tid).collect());
        Ok(())
    }
}

impl Drop for FrozenTree {
    fn drop(&mut self) {
        if let Err(err) = self.thaw() {
            tracing::error!(%err, "could not thaw a process");
        }
    }
}
