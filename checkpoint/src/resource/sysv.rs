//! System V shared memory, semaphore sets and message queues (`sysvipc(7)`).
//!
//! They belong to an ipc namespace, not to a process: all that are in the
//! container's own move, whoever uses them, and keep their ids. To see them
//! takes a thread in that namespace.
//!
//! What a process has promised to undo at its end (`SEM_UNDO`) the kernel shows
//! nobody, only that there is a list. Lost are the times and the processes of
//! last use.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io, thread,
};

use nix::{
    sched::{CloneFlags, setns},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::{
    creds::IdMaps,
    memory::{Backing, Mapping},
    pages::Sent,
    shared::{self, Nature, ObjectId},
};
use crate::{
    image::{self, ImageSink},
    proc::{self, Stat, Vma, VmaKind},
    stub::{Batch, Remote, Tracee, args},
    sys::{
        kcmp,
        sysv::{self, Attached, Kind, Perm, SHM_DEST, SHM_LOCKED},
    },
};

/// Owners of content count up from here: objects have their inodes below, and
/// deleted files the numbers from 1 << 63.
const FIRST_SEGMENT: ObjectId = 1 << 62;

/// What a segment is that does not belong to the container.
pub(crate) const FOREIGN: &str =
    "is System V shared memory of an ipc namespace that is not the container's own";

/// All objects of an ipc namespace.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    segments: Vec<Segment>,
    sets: Vec<Set>,
    queues: Vec<Queue>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Segment {
    perm: Perm,
    size: u64,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Set {
    perm: Perm,
    values: Vec<u16>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Queue {
    perm: Perm,
    /// Bytes that it may hold.
    limit: u64,
    /// Type and text, oldest first.
    messages: Vec<(i64, Vec<u8>)>,
}

/// Whether a mapping is of a segment.
pub(crate) fn is_segment(vma: &Vma) -> bool {
    matches!(vma.kind, VmaKind::File { .. }) && matches!(shared::nature(vma), Nature::Segment)
}

/// The segment whose content has this owner, if it is one's.
pub(crate) fn segment(owner: ObjectId) -> Option<i32> {
    owner.checked_sub(FIRST_SEGMENT).and_then(|id| i32::try_from(id).ok())
}

/// Whether the processes of `root` share their ipc namespace with us.
pub(crate) fn is_ours(root: Pid) -> io::Result<bool> {
    Ok(namespace(root)? == fs::read_link("/proc/self/ns/ipc")?)
}

fn namespace(pid: Pid) -> io::Result<std::path::PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/ipc"))
}

/// Does something in the ipc namespace of `pid`.
fn inside<T: Send>(pid: Pid, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(format!("/proc/{pid}/ns/ipc"))?;
    let work = || {
        setns(&namespace, CloneFlags::CLONE_NEWIPC)?;
        work()
    };
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Why the System V objects of the tree below `root` cannot move; `tasks` are
/// its processes. Those of a namespace that is ours too are not the tree's.
pub(crate) fn judge(root: Pid, tasks: &[Pid]) -> io::Result<Option<String>> {
    if is_ours(root)? { Ok(None) } else { inside(root, || obstacle(root, tasks)) }
}

/// What is in the way of the objects in this thread's namespace.
fn obstacle(root: Pid, tasks: &[Pid]) -> io::Result<Option<String>> {
    let [segments, sets, queues] = [Kind::Segment, Kind::Set, Kind::Queue].map(sysv::ids);
    let sets = sets?;
    if segments?.is_empty() && sets.is_empty() && queues?.is_empty() {
        return Ok(None);
    }
    if let Some(pid) = outsider(root, tasks)? {
        return Ok(Some(format!(
            "holds System V objects, and pid {pid} lives in it, which is not in the tree"
        )));
    }
    let undoer = if sets.is_empty() { None } else { undoer(tasks) };
    Ok(undoer.map(|task| {
        format!(
            "holds System V semaphores for which thread {task} may have a list of \
                 adjustments (SEM_UNDO), which cannot be read"
        )
    }))
}

/// A process that lives in the namespace of `root` and is none of `tasks`.
fn outsider(root: Pid, tasks: &[Pid]) -> io::Result<Option<Pid>> {
    let (home, tasks): (_, BTreeSet<&Pid>) = (namespace(root)?, tasks.iter().collect());
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let pid = Pid::from_raw(pid);
        if namespace(pid).is_ok_and(|there| there == home) && !is_below(pid, &tasks) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// Whether a process is one of `tasks` or was born of them since they were
/// listed, for a tree that runs.
fn is_below(pid: Pid, tasks: &BTreeSet<&Pid>) -> bool {
    let mut at = pid;
    while !tasks.contains(&at) {
        match Stat::of(at) {
            Ok(stat) if stat.ppid == 0 => return false,
            Ok(stat) => at = Pid::from_raw(stat.ppid),
            Err(_) if at == pid => return true,
            // It has ended, and whom it left has another parent now.
            Err(_) => at = pid,
        }
    }
    true
}

/// A task that has a list of adjustments: we have none since we entered the
/// namespace.
fn undoer(tasks: &[Pid]) -> Option<Pid> {
    let mut threads = tasks.iter().flat_map(|pid| proc::threads(*pid).unwrap_or_default());
    threads.find(|tid| kcmp::same_undo(*tid).is_ok_and(|same| !same))
}

/// The key with which the segment was made that a mapping calls `/SYSV…`: one
/// that is marked to be removed has lost it.
fn first_key(path: &[u8]) -> i32 {
    let digits = path.strip_prefix(b"/SYSV").and_then(|hex| std::str::from_utf8(hex).ok());
    let key = digits.and_then(|hex| u32::from_str_radix(hex, 16).ok());
    key.map_or(libc::IPC_PRIVATE, u32::cast_signed)
}

/// The objects of a frozen tree, and the files that have the segments' content.
pub(crate) struct Dump {
    image: Image,
    content: Vec<(i32, File)>,
}

/// Takes down all objects of the ipc namespace of `root`, if it has any.
pub(crate) fn dump<'v>(
    root: Pid,
    tasks: &[Pid],
    vmas: impl Iterator<Item = (Pid, &'v Vma)>,
    maps: &IdMaps,
) -> io::Result<Option<Dump>> {
    let is_ours = is_ours(root)?;
    let mut attached = BTreeMap::new();
    for (pid, vma) in vmas.filter(|(_, vma)| is_segment(vma)) {
        if let VmaKind::File { path, id: (_, inode), .. } = &vma.kind
            && let Ok(id) = i32::try_from(*inode)
            && !attached.contains_key(&id)
        {
            if is_ours {
                return Err(io::Error::other(format!("mapping {:#x} {FOREIGN}", vma.start)));
            }
            attached.insert(id, (shared::map_file(pid, vma)?, first_key(path)));
        }
    }
    if is_ours {
        return Ok(None);
    }
    let found = inside(root, || match obstacle(root, tasks)? {
        Some(reason) => Err(io::Error::other(format!("the ipc namespace {reason}"))),
        None => Dump::read(attached),
    })?;
    found.map(|dump| dump.named(maps)).transpose()
}

impl Dump {
    /// Reads the objects of this thread's namespace. `attached` has the files
    /// and first keys of segments that are in use; to open the others takes an
    /// attachment of ours.
    fn read(mut attached: BTreeMap<i32, (File, i32)>) -> io::Result<Option<Self>> {
        let (mut segments, mut content) = (Vec::new(), Vec::new());
        for id in sysv::ids(Kind::Segment)? {
            let mut stat = Kind::Segment.stat(id)?;
            let file = match attached.remove(&id) {
                Some((file, key)) => {
                    stat.perm.key = key;
                    file
                }
                None => Attached::new(id, stat.size, false)?.1,
            };
            if rustix::fs::fstatfs(&file)?.f_type == libc::HUGETLBFS_MAGIC {
                return Err(io::Error::other(format!("segment {id} is made of huge pages")));
            }
            segments.push(Segment { perm: stat.perm, size: stat.size });
            content.push((id, file));
        }
        // A key that a marked one had may be another's by now.
        segments.sort_by_key(|segment: &Segment| segment.perm.mode & SHM_DEST == 0);
        if let Some((id, _)) = attached.pop_first() {
            return Err(io::Error::other(format!("segment {id} is not of their namespace")));
        }
        let mut sets = Vec::new();
        for id in sysv::ids(Kind::Set)? {
            let stat = Kind::Set.stat(id)?;
            sets.push(Set { perm: stat.perm, values: sysv::values(id, stat.size)? });
        }
        let mut queues = Vec::new();
        for id in sysv::ids(Kind::Queue)? {
            let stat = Kind::Queue.stat(id)?;
            let (count, bytes) = stat.messages;
            let messages =
                (0..count).map(|n| sysv::peek(id, n, bytes)).collect::<Result<_, _>>()?;
            queues.push(Queue { perm: stat.perm, limit: stat.size, messages });
        }
        let is_empty = segments.is_empty() && sets.is_empty() && queues.is_empty();
        let image = Image { segments, sets, queues };
        Ok((!is_empty).then_some(Self { image, content }))
    }

    /// The same with users called what they are inside.
    fn named(mut self, maps: &IdMaps) -> io::Result<Self> {
        for perm in self.image.perms() {
            (perm.uid, perm.gid) = maps.inside(perm.uid, perm.gid)?;
            (perm.cuid, perm.cgid) = maps.inside(perm.cuid, perm.cgid)?;
        }
        Ok(self)
    }

    /// Sends the objects, then the segments' content.
    pub(crate) fn send(&self, sink: &mut dyn ImageSink) -> io::Result<Sent> {
        let bytes = image::put(sink, image::Kind::Sysv, &self.image)?;
        let mut sent = Sent { pages: 0, bytes };
        let mut buf = vec![0; 256 << 10];
        for (id, file) in &self.content {
            let owner = FIRST_SEGMENT + u64::from(id.cast_unsigned());
            let content = shared::send_content(owner, file, &mut buf, sink)?;
            sent.pages += content.pages;
            sent.bytes += content.bytes;
        }
        Ok(sent)
    }
}

impl Image {
    fn perms(&mut self) -> impl Iterator<Item = &mut Perm> {
        let segments = self.segments.iter_mut().map(|it| &mut it.perm);
        let sets = self.sets.iter_mut().map(|it| &mut it.perm);
        segments.chain(sets).chain(self.queues.iter_mut().map(|it| &mut it.perm))
    }
}

/// Segments on the destination, attached by us so that those that are marked to
/// be removed last until their users have them.
#[derive(Default)]
pub(crate) struct Created(BTreeMap<i32, (u64, Attached, File)>);

/// Makes all objects in the ipc namespace of `init`.
pub(crate) fn restore(init: Pid, mut image: Image) -> io::Result<Created> {
    if is_ours(init)? {
        return Err(io::Error::other("the container has no ipc namespace of its own here"));
    }
    let maps = IdMaps::of(init)?;
    for perm in image.perms() {
        (perm.uid, perm.gid) = maps.outside(perm.uid, perm.gid)?;
        (perm.cuid, perm.cgid) = maps.outside(perm.cuid, perm.cgid)?;
    }
    inside(init, || {
        let Image { segments, sets, queues } = image;
        let mut created = Created::default();
        for Segment { perm, size } in segments {
            Kind::Segment.create(&perm, size)?;
            let (attached, file) = Attached::new(perm.id, size, true)?;
            if perm.mode & SHM_LOCKED != 0 {
                sysv::lock(perm.id)?;
            }
            // Its key is free for another from now on.
            if perm.mode & SHM_DEST != 0 {
                Kind::Segment.remove(perm.id)?;
            }
            created.0.insert(perm.id, (size, attached, file));
        }
        for Set { perm, values } in sets {
            Kind::Set.create(&perm, values.len() as u64)?;
            sysv::set_values(perm.id, &values)?;
        }
        for Queue { perm, limit, messages } in queues {
            Kind::Queue.create(&perm, limit)?;
            for (kind, text) in messages {
                sysv::send(perm.id, kind, &text)?;
            }
        }
        Ok(created)
    })
}

impl Created {
    /// Fills ranges `(offset, length)` of a segment.
    pub(crate) fn fill(&self, id: i32, runs: &[(u64, u64)], data: &[u8]) -> io::Result<()> {
        let (size, _, file) = self.0.get(&id).ok_or(io::ErrorKind::InvalidData)?;
        shared::fill_file(file, *size, runs, data)
    }
}

/// Attaches a segment, or the part of it that `mapping` shows, to a process.
///
/// `shmat(2)` knows whole segments only, so it goes elsewhere first. The place
/// that it is meant for is taken beforehand, or the kernel might choose that.
pub(crate) fn attach(mapping: &Mapping, remote: &Remote, task: &Tracee) -> io::Result<()> {
    let Backing::Segment { id, size, offset } = mapping.backing else { return Ok(()) };
    let (start, len) = (mapping.start, mapping.end - mapping.start);
    let whole = size.next_multiple_of(4096);
    if offset.checked_add(len).is_none_or(|end| whole < end) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut batch = Batch::new();
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    batch.call(libc::SYS_mmap, args![start, len, libc::PROT_NONE, flags, -1, 0_u64]);
    let mode = if mapping.may_write() { 0 } else { libc::SHM_RDONLY };
    let attached = batch.call(libc::SYS_shmat, args![id, 0_u64, mode]);
    let at = remote.run(task, &batch)?.get(attached)?;
    let mut batch = Batch::new();
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    batch.call(libc::SYS_mremap, args![at + offset, len, len, flags, start]);
    for (from, to) in [(0, offset), (offset + len, whole)] {
        if from < to {
            batch.call(libc::SYS_munmap, args![at + from, to - from]);
        }
    }
    remote.run(task, &batch).map(drop)
}
