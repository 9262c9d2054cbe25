//! Mappings of a process (`mmap(2)`), and what changed in them since they were
//! last looked at.

use std::{collections::BTreeMap, io};

use serde::{Deserialize, Serialize};

use super::{shared::ObjectId, sysv};
use crate::{
    proc::{Vma, VmaKind},
    stub::{Batch, args},
};

/// What a mapping shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Backing {
    /// Zeros until written.
    Anonymous,
    /// A file of the container, by path from its root, of `size` bytes.
    File { path: Vec<u8>, size: u64, offset: u64 },
    /// A memory object without a name, which the image carries.
    Object { id: ObjectId, offset: u64 },
    /// A System V segment of `size` bytes.
    Segment { id: i32, size: u64, offset: u64 },
}

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    prot: i32,
    pub(crate) shared: bool,
    /// A shared mapping that may be made writable: its file is open for writing.
    may_write: bool,
    /// Counted against the commit limit although it is not writable: it once was.
    accounted: bool,
    grows_down: bool,
    no_reserve: bool,
    lock: Lock,
    /// `madvise(2)` values in force.
    advice: Vec<i32>,
    pub(crate) backing: Backing,
}

/// Whether pages are locked in memory (`mlock2(2)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Lock {
    No,
    Yes,
    OnFault,
}

/// Place of the kernel's `[vvar]`, `[vvar_vclock]` and `[vdso]`, which lie one
/// behind the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KernelPages {
    pub(crate) start: u64,
    pub(crate) lens: Vec<u64>,
}

impl KernelPages {
    /// The group in a memory map.
    pub(crate) fn of(vmas: &[Vma]) -> Option<Self> {
        let group: Vec<&Vma> =
            vmas.iter().filter(|v| matches!(v.kind, VmaKind::Vvar | VmaKind::Vdso)).collect();
        Some(Self {
            start: group.first()?.start,
            lens: group.iter().map(|v| v.end - v.start).collect(),
        })
    }

    pub(crate) fn end(&self) -> u64 {
        self.start + self.lens.iter().sum::<u64>()
    }
}

/// The address space of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layout {
    /// The process, in its own pid namespace.
    pub(crate) pid: i32,
    pub(crate) mappings: Vec<Mapping>,
    pub(crate) kernel_pages: Option<KernelPages>,
}

impl Layout {
    /// Whether `later` shows the same address space: an exec makes another, which
    /// shares nothing with the former, and puts the vDSO elsewhere.
    pub(crate) fn is_same_space(&self, later: &Self) -> bool {
        self.kernel_pages == later.kernel_pages
    }
}

/// `VmFlags` words that have a `madvise(2)` value.
const ADVICE: [(&[u8; 2], i32); 8] = [
    (b"dc", libc::MADV_DONTFORK),
    (b"dd", libc::MADV_DONTDUMP),
    (b"wf", libc::MADV_WIPEONFORK),
    (b"hg", libc::MADV_HUGEPAGE),
    (b"nh", libc::MADV_NOHUGEPAGE),
    (b"mg", libc::MADV_MERGEABLE),
    (b"rr", libc::MADV_RANDOM),
    (b"sr", libc::MADV_SEQUENTIAL),
];

/// Why a mapping cannot move.
///
/// A userfaultfd is ours where the process is `tracked`.
pub(crate) fn unmovable(vma: &Vma, tracked: bool) -> Option<String> {
    const WORDS: [(&[u8; 2], &str); 7] = [
        (b"ht", "is made of huge pages (hugetlbfs)"),
        (b"io", "shows a device"),
        (b"pf", "shows a device"),
        (b"um", "is watched by a userfaultfd"),
        (b"uw", "is watched by a userfaultfd"),
        (b"ui", "is watched by a userfaultfd"),
        (b"ss", "is a shadow stack"),
    ];
    match &vma.kind {
        VmaKind::Vdso | VmaKind::Vvar | VmaKind::Vsyscall => return None,
        VmaKind::Special(name) => return Some(format!("is {name}, a kernel object")),
        VmaKind::File { .. } => {
            if let super::shared::Nature::Unmovable(what) = super::shared::nature(vma) {
                return Some(what.to_owned());
            }
        }
        VmaKind::Anonymous => {}
    }
    let ours = |word: &[u8; 2]| tracked && word == b"uw";
    WORDS
        .iter()
        .find(|(word, _)| vma.has(word) && !ours(word))
        .map(|(_, reason)| (*reason).to_owned())
}

/// Takes down the mappings of a process. `object` names memory objects.
pub(crate) fn layout(
    pid: i32,
    vmas: &[Vma],
    tracked: bool,
    mut object: impl FnMut(&Vma) -> io::Result<Option<ObjectId>>,
    mut file_size: impl FnMut(&Vma) -> io::Result<u64>,
) -> io::Result<Layout> {
    let mut mappings = Vec::with_capacity(vmas.len());
    for vma in vmas {
        if let Some(reason) = unmovable(vma, tracked) {
            return Err(io::Error::other(format!("mapping {:#x} {reason}", vma.start)));
        }
        let backing = match &vma.kind {
            VmaKind::Vdso | VmaKind::Vvar | VmaKind::Vsyscall | VmaKind::Special(_) => continue,
            VmaKind::Anonymous => Backing::Anonymous,
            VmaKind::File { offset, id, .. } if sysv::is_segment(vma) => {
                let id = i32::try_from(id.1).map_err(io::Error::other)?;
                Backing::Segment { id, size: file_size(vma)?, offset: *offset }
            }
            VmaKind::File { path, offset, .. } => match object(vma)? {
                Some(id) => Backing::Object { id, offset: *offset },
                None => {
                    Backing::File { path: path.clone(), size: file_size(vma)?, offset: *offset }
                }
            },
        };
        mappings.push(Mapping {
            start: vma.start,
            end: vma.end,
            prot: vma.prot(),
            shared: vma.is_shared(),
            may_write: vma.has(b"mw"),
            accounted: vma.has(b"ac") && !vma.is_writable() && !vma.is_shared(),
            grows_down: vma.has(b"gd"),
            no_reserve: vma.has(b"nr"),
            lock: match (vma.has(b"lo"), vma.has(b"lf")) {
                (false, _) => Lock::No,
                (true, false) => Lock::Yes,
                (true, true) => Lock::OnFault,
            },
            advice: ADVICE.iter().filter(|(word, _)| vma.has(word)).map(|(_, a)| *a).collect(),
            backing,
        });
    }
    Ok(Layout { pid, mappings, kernel_pages: KernelPages::of(vmas) })
}

impl Mapping {
    /// Adds the calls that make the mapping; `objects` has the fd of each
    /// memory object in the process.
    pub(crate) fn restore(&self, objects: &BTreeMap<ObjectId, u64>, batch: &mut Batch) {
        let flag = |on: bool, flag: i32| if on { flag } else { 0 };
        let flags = libc::MAP_FIXED_NOREPLACE
            | if self.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE }
            | flag(self.grows_down, libc::MAP_GROWSDOWN)
            | flag(self.no_reserve, libc::MAP_NORESERVE);
        let (start, len) = (self.start, self.end - self.start);
        let map = |batch: &mut Batch, flags: i32, fd: crate::stub::Arg, offset: u64| {
            let prot = self.prot | flag(self.accounted, libc::PROT_WRITE);
            let mut args = args![start, len, prot, flags, 0_u64, offset];
            args[4] = fd;
            batch.call(libc::SYS_mmap, args);
        };
        match &self.backing {
            Backing::Anonymous => map(batch, flags | libc::MAP_ANONYMOUS, (-1).into(), 0),
            Backing::File { path, offset, .. } => {
                let write = self.shared && self.may_write;
                let mode = if write { libc::O_RDWR } else { libc::O_RDONLY };
                let path = batch.string(path);
                let fd = batch.call(libc::SYS_open, args![path, mode | libc::O_CLOEXEC]);
                map(batch, flags, fd.into(), *offset);
                batch.call(libc::SYS_close, args![fd]);
            }
            // Attached before, by `sysv::attach`.
            Backing::Segment { .. } => {
                batch.call(libc::SYS_mprotect, args![start, len, self.prot]);
            }
            Backing::Object { id, offset } => {
                let fd = objects.get(id).copied().unwrap_or(u64::MAX);
                map(batch, flags, fd.into(), *offset);
            }
        }
        if self.accounted {
            batch.call(libc::SYS_mprotect, args![start, len, self.prot]);
        }
        for &advice in &self.advice {
            batch.call(libc::SYS_madvise, args![start, len, advice]);
        }
    }

    /// Locks the pages, once they are filled.
    pub(crate) fn lock(&self, batch: &mut Batch) {
        let flags = match self.lock {
            Lock::No => return,
            Lock::Yes => 0_u64,
            Lock::OnFault => 1,
        };
        batch.call(libc::SYS_mlock2, args![self.start, self.end - self.start, flags]);
    }

    /// Whether a page of zeros need not travel.
    pub(crate) fn zeros_are_free(&self) -> bool {
        matches!(self.backing, Backing::Anonymous)
    }
}

impl Mapping {
    pub(crate) fn is_writable(&self) -> bool {
        self.prot & libc::PROT_WRITE != 0
    }

    /// Whether it may be made writable.
    pub(crate) fn may_write(&self) -> bool {
        self.may_write
    }

    /// The part of the mapping in `start..end`, which lies inside it.
    pub(crate) fn clip(&self, start: u64, end: u64) -> Self {
        let skipped = start - self.start;
        let mut part = Self { start, end, ..self.clone() };
        match &mut part.backing {
            Backing::Anonymous => {}
            Backing::File { offset, .. }
            | Backing::Object { offset, .. }
            | Backing::Segment { offset, .. } => *offset += skipped,
        }
        part
    }

    /// Whether both, which cover the same addresses, show the same memory.
    fn shows_the_same(&self, other: &Self) -> bool {
        self.shared == other.shared
            && self.may_write == other.may_write
            && self.grows_down == other.grows_down
            && self.no_reserve == other.no_reserve
            && self.advice == other.advice
            && self.backing == other.backing
    }
}

/// One difference between two layouts of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nothing is mapped there any more.
    Unmap(u64, u64),
    /// This is mapped there now, with nothing of what was there before.
    Map(Mapping),
    /// The same memory has another protection.
    Protect(u64, u64, i32),
}

/// What turns `old` into `new`, in order of addresses. Both ends compute it, so
/// that both know which pages have to travel again.
pub(crate) fn changes(old: &[Mapping], new: &[Mapping]) -> Vec<Change> {
    let mut edges: Vec<u64> =
        old.iter().chain(new).flat_map(|mapping| [mapping.start, mapping.end]).collect();
    edges.sort_unstable();
    edges.dedup();
    let mut changes = Vec::new();
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    for (&start, &end) in edges.iter().zip(edges.iter().skip(1)) {
        let before = covering(&mut old, start).map(|m| m.clip(start, end));
        let after = covering(&mut new, start).map(|m| m.clip(start, end));
        match (before, after) {
            (None, None) => {}
            (Some(_), None) => changes.push(Change::Unmap(start, end)),
            (Some(before), Some(after)) if before.shows_the_same(&after) => {
                if before.prot != after.prot {
                    changes.push(Change::Protect(start, end, after.prot));
                }
            }
            (before, Some(after)) => {
                if before.is_some() {
                    changes.push(Change::Unmap(start, end));
                }
                changes.push(Change::Map(after));
            }
        }
    }
    changes
}

/// The mapping at `addr`; addresses asked for only ever grow.
fn covering<'m>(
    mappings: &mut std::iter::Peekable<std::slice::Iter<'m, Mapping>>,
    addr: u64,
) -> Option<&'m Mapping> {
    while mappings.next_if(|m| m.end <= addr).is_some() {}
    mappings.peek().copied().filter(|m| m.start <= addr)
}

impl Change {
    /// Adds the calls that make the change.
    pub(crate) fn restore(&self, objects: &BTreeMap<ObjectId, u64>, batch: &mut Batch) {
        match self {
            Self::Unmap(start, end) => {
                batch.call(libc::SYS_munmap, args![*start, end - start]);
            }
            Self::Map(mapping) => mapping.restore(objects, batch),
            Self::Protect(start, end, prot) => {
                batch.call(libc::SYS_mprotect, args![*start, end - start, *prot]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anonymous(start: u64, end: u64, prot: i32) -> Mapping {
        Mapping {
            start,
            end,
            prot,
            shared: false,
            may_write: true,
            accounted: false,
            grows_down: false,
            no_reserve: false,
            lock: Lock::No,
            advice: Vec::new(),
            backing: Backing::Anonymous,
        }
    }

    fn file(start: u64, end: u64, offset: u64) -> Mapping {
        let backing = Backing::File { path: b"/a".to_vec(), size: 9, offset };
        Mapping { backing, ..anonymous(start, end, 1) }
    }

    #[test]
    fn a_grown_heap_adds_only_what_is_new() {
        let (old, new) = ([anonymous(0x1000, 0x3000, 3)], [anonymous(0x1000, 0x6000, 3)]);
        assert_eq!(changes(&old, &new), [Change::Map(anonymous(0x3000, 0x6000, 3))]);
        assert_eq!(changes(&new, &old), [Change::Unmap(0x3000, 0x6000)]);
        assert_eq!(changes(&new, &new), []);
    }

    #[test]
    fn a_hole_and_a_protected_page_in_the_middle() {
        let old = [anonymous(0x1000, 0x5000, 3)];
        let new = [anonymous(0x1000, 0x2000, 3), anonymous(0x3000, 0x4000, 1)];
        let expected = [
            Change::Unmap(0x2000, 0x3000),
            Change::Protect(0x3000, 0x4000, 1),
            Change::Unmap(0x4000, 0x5000),
        ];
        assert_eq!(changes(&old, &new), expected);
    }

    #[test]
    fn a_file_mapped_at_another_offset_is_new() {
        let (old, new) = ([file(0x1000, 0x3000, 0)], [file(0x2000, 0x3000, 0x1000)]);
        assert_eq!(changes(&old, &new), [Change::Unmap(0x1000, 0x2000)]);
        let moved = [file(0x2000, 0x3000, 0x5000)];
        let expected = [
            Change::Unmap(0x1000, 0x2000),
            Change::Unmap(0x2000, 0x3000),
            Change::Map(moved[0].clone()),
        ];
        assert_eq!(changes(&old, &moved), expected);
    }
}
