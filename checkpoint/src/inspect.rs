//! The verdict: what of a running tree cannot move, found without stopping it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Read,
    path::PathBuf,
    thread,
    time::Duration,
};

use nix::unistd::Pid;

use crate::{
    DumpError, Finding, Judgement, Options, Verdict,
    dump::failed,
    proc::{self, Stat, Status},
    resource::{
        files::{self, TableRef},
        memory, sysv, tree,
    },
    skeleton,
};

/// Milliseconds between looks at a tree before it is called unmovable.
const BETWEEN_LOOKS: [u64; 4] = [1, 2, 4, 8];

/// Judges the tree below `root`.
///
/// It runs, so a look may fall into the middle of a change, or of a connection
/// that is about to be accepted; what is really in the way is there at each.
pub(crate) fn inspect(root: Pid, options: &Options) -> Result<Verdict, DumpError> {
    for ms in BETWEEN_LOOKS {
        match look(root, options)? {
            verdict if verdict.is_movable() => return Ok(verdict),
            verdict => tracing::debug!(?verdict, "looking again"),
        }
        thread::sleep(Duration::from_millis(ms));
    }
    look(root, options)
}

fn look(root: Pid, options: &Options) -> Result<Verdict, DumpError> {
    let mut verdict = Verdict::default();
    let processes = proc::processes_below(root).map_err(|_| DumpError::NoProcess(root))?;
    let home = Home::of(root).ok_or(DumpError::NoProcess(root))?;
    let mut found = Vec::new();
    let mut tables = Vec::new();
    for &pid in &processes {
        // What has ended meanwhile has nothing to refuse.
        let (Ok(status), Ok(stat)) = (Status::of(pid), Stat::of(pid)) else { continue };
        if status.state != 'Z' {
            tables.push(TableRef { pid, ns_pid: status.tgid() });
            judge_process(pid, &status, &stat, &home, &mut verdict);
        }
        found.push((pid, status, stat));
    }
    let obstacle = sysv::judge(root, &processes);
    if let Some(reason) = obstacle.map_err(failed("judge the System V objects", root))? {
        verdict.refuse("the ipc namespace".into(), reason, "");
    }
    let mut nodes = nodes(found.iter().map(|(pid, status, stat)| (*pid, status, stat)));
    let tables = tables.as_slice();
    let tasks = &processes;
    verdict
        .findings
        .extend(files::inspect(tables, &files::Context { options, init: root, tasks })?);
    if options.shell_job && nodes.first().is_some_and(|n| n.sid != n.pid) {
        adopt_session(&mut nodes);
    }
    let root_sid = nodes.first().map_or(0, |n| if n.sid == n.pid { n.pid } else { n.sid });
    if let Err(reason) = tree::plan(&nodes, root_sid, &BTreeSet::new()) {
        verdict.refuse(format!("the process tree of {root}"), reason, "");
    }
    Ok(verdict)
}

/// Refuses a tree with something in it that cannot move.
pub(crate) fn require(root: Pid, options: &Options) -> Result<(), DumpError> {
    let verdict = inspect(root, options)?;
    match verdict.findings.into_iter().find(|f| f.judgement == Judgement::Refused) {
        Some(finding) => Err(DumpError::Refused(Box::new(finding))),
        None => Ok(()),
    }
}

/// Every one of `processes` as the planner of the tree sees it, root first.
pub(crate) fn nodes<'p>(
    processes: impl Iterator<Item = (Pid, &'p Status, &'p Stat)> + Clone,
) -> Vec<tree::Node> {
    let ids: BTreeMap<i32, i32> =
        processes.clone().map(|(pid, status, _)| (pid.as_raw(), status.tgid())).collect();
    let parent = |stat: &Stat| ids.get(&stat.ppid).copied().unwrap_or(0);
    let mut nodes: Vec<tree::Node> =
        processes.map(|(_, status, stat)| node(parent(stat), status, stat)).collect();
    if let Some(root) = nodes.first_mut() {
        root.ppid = 0;
    }
    nodes
}

/// A process as the planner of the tree sees it; `ppid` is its parent's pid in
/// the tree, 0 when that is not in it.
pub(crate) fn node(ppid: i32, status: &Status, stat: &Stat) -> tree::Node {
    tree::Node {
        pid: status.tgid(),
        ppid,
        pgid: status.pgid(),
        sid: status.sid(),
        exit_signal: stat.exit_signal,
        generation: stat.generation(),
        subreaper: false,
        stopped: None,
        zombie: (status.state == 'Z')
            .then(|| tree::Zombie { status: stat.exit_code, name: stat.comm.clone() }),
    }
}

/// A job of a shell keeps the session that the destination gives it.
pub(crate) fn adopt_session(nodes: &mut [tree::Node]) {
    let Some(outside) = nodes.first().map(|n| n.sid) else { return };
    let pids: BTreeSet<i32> = nodes.iter().map(|n| n.pid).collect();
    for node in nodes.iter_mut().filter(|n| n.sid == outside) {
        node.sid = 0;
        if !pids.contains(&node.pgid) {
            node.pgid = 0;
        }
    }
}

impl Verdict {
    fn refuse(&mut self, object: String, reason: impl Into<String>, remedy: &str) {
        self.findings.push(Finding {
            object,
            judgement: Judgement::Refused,
            reason: reason.into(),
            remedy: remedy.to_owned(),
        });
    }
}

/// The root's namespaces: all of the tree has to be in them.
struct Home {
    namespaces: Vec<(&'static str, PathBuf)>,
    depth: usize,
    /// System V objects are then the host's.
    shares_ipc: bool,
}

/// Namespaces that are created for the whole container.
const NAMESPACES: [&str; 6] = ["mnt", "net", "uts", "ipc", "user", "pid"];

impl Home {
    fn of(root: Pid) -> Option<Self> {
        let link = |name| Some((name, namespace(root, name)?));
        let namespaces = NAMESPACES.into_iter().map(link).collect::<Option<_>>()?;
        let shares_ipc = sysv::is_ours(root).ok()?;
        Some(Self { shares_ipc, namespaces, depth: Status::of(root).ok()?.ns_pid.len() })
    }
}

fn namespace(pid: Pid, name: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/{name}")).ok()
}

fn judge_process(pid: Pid, status: &Status, stat: &Stat, home: &Home, verdict: &mut Verdict) {
    let me = format!("pid {pid} ({})", String::from_utf8_lossy(&stat.comm));
    let mut refuse = |reason: &str, remedy: &str| verdict.refuse(me.clone(), reason, remedy);
    if status.tracer != 0 {
        let reason = format!("is traced by pid {}", status.tracer);
        refuse(&reason, "end the debugger or tracer first");
    }
    if status.shadow_stack {
        refuse("uses a shadow stack", "start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off");
    }
    if status.ns_pid.len() != home.depth {
        refuse("is in a nested pid namespace", "");
    }
    for (name, wanted) in home.namespaces.iter().filter(|(name, _)| *name != "pid") {
        if namespace(pid, name).is_some_and(|own| own != *wanted) {
            refuse(&format!("is in another {name} namespace than the root of the tree"), "");
        }
    }
    if is_32_bit(pid) {
        refuse("is a 32-bit program", "run a 64-bit build of it");
    }
    if fs::read_link(format!("/proc/{pid}/exe"))
        .is_ok_and(|exe| exe.as_os_str().as_encoded_bytes().ends_with(b" (deleted)"))
    {
        refuse("runs a program whose file was deleted", "restart it");
    }
    let mut threads = proc::threads(pid).unwrap_or_default();
    threads.retain(|&tid| tid != pid);
    for tid in threads {
        if Status::of(Pid::from_raw(tid.as_raw())).is_ok_and(|s| s.tracer != 0) {
            refuse(&format!("has a traced thread {tid}"), "end the debugger or tracer first");
        }
    }
    let Ok(vmas) = proc::vmas(pid) else { return };
    for vma in &vmas {
        if home.shares_ipc && sysv::is_segment(vma) {
            verdict.refuse(format!("mapping {:#x} of {me}", vma.start), sysv::FOREIGN, "");
        }
        if let Some(reason) = memory::unmovable(vma, false) {
            let object = format!("mapping {:#x} of {me}", vma.start);
            verdict.refuse(object, reason, "");
        }
    }
    if vmas.first().is_some_and(|v| v.start < skeleton::END) {
        let reason = format!("maps memory below {:#x}, where the stub goes", skeleton::END);
        verdict.refuse(me.clone(), reason, "");
    }
    if memory::KernelPages::of(&vmas).is_none() && !vmas.is_empty() {
        verdict.refuse(me, "has no vDSO", "boot the kernel with vdso=1");
    }
}

/// The class byte of the program's ELF header.
fn is_32_bit(pid: Pid) -> bool {
    let mut head = [0; 5];
    File::open(format!("/proc/{pid}/exe")).and_then(|mut f| f.read_exact(&mut head)).is_ok()
        && head == *b"\x7fELF\x01"
}
