//! Private memory of a process: its mappings and the pages it has written.
//!
//! A page travels when it is the process's own: anonymous, or a private copy of
//! a file's page. Untouched pages, pages of zeros and pages still equal to the
//! file never do.

use std::{collections::BTreeMap, io, io::IoSlice};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::shared::ObjectId;
use crate::{
    image::{ImageSink, Kind},
    proc::{Vma, VmaKind},
    stub::{Batch, args},
    sys::memory::{self, Filter, ForcedMemory, PAGE, PAGE_LEN, category},
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

/// `VmFlags` words that have a `madvise(2)` value.
const ADVICE: [(&[u8; 2], i32); 7] = [
    (b"dc", libc::MADV_DONTFORK),
    (b"dd", libc::MADV_DONTDUMP),
    (b"wf", libc::MADV_WIPEONFORK),
    (b"hg", libc::MADV_HUGEPAGE),
    (b"nh", libc::MADV_NOHUGEPAGE),
    (b"mg", libc::MADV_MERGEABLE),
    (b"rr", libc::MADV_RANDOM),
];

/// Why a mapping cannot move.
pub(crate) fn unmovable(vma: &Vma) -> Option<String> {
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
    WORDS.iter().find(|(word, _)| vma.has(word)).map(|(_, reason)| (*reason).to_owned())
}

/// Takes down the mappings of a process. `object` names memory objects.
pub(crate) fn layout(
    pid: i32,
    vmas: &[Vma],
    mut object: impl FnMut(&Vma) -> io::Result<Option<ObjectId>>,
    mut file_size: impl FnMut(&Vma) -> io::Result<u64>,
) -> io::Result<Layout> {
    let mut mappings = Vec::with_capacity(vmas.len());
    for vma in vmas {
        if let Some(reason) = unmovable(vma) {
            return Err(io::Error::other(format!("mapping {:#x} {reason}", vma.start)));
        }
        let backing = match &vma.kind {
            VmaKind::Vdso | VmaKind::Vvar | VmaKind::Vsyscall | VmaKind::Special(_) => continue,
            VmaKind::Anonymous => Backing::Anonymous,
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
    fn zeros_are_free(&self) -> bool {
        matches!(self.backing, Backing::Anonymous)
    }
}

/// Pages read at a time: small enough to stay in the cache until they are sent.
const CHUNK: usize = 256 << 10;

/// What has been put into a sink.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sent {
    pub(crate) pages: u64,
    pub(crate) bytes: u64,
}

/// Sends the process's own pages.
pub(crate) fn dump_pages(host: Pid, layout: &Layout, sink: &mut dyn ImageSink) -> io::Result<Sent> {
    let private: Vec<&Mapping> = layout.mappings.iter().filter(|m| !m.shared).collect();
    let (Some(first), Some(last)) = (private.first(), private.last()) else {
        return Ok(Sent::default());
    };
    let filter = Filter {
        all: 0,
        any: category::PRESENT | category::SWAPPED,
        none: category::FILE | category::PFNZERO,
    };
    // The mappings are in order of addresses and so are the ranges.
    let ranges = memory::scan(host, first.start, last.end, filter)?;
    let mut sender = Sender::new(host, layout.pid, sink)?;
    let mut from = 0;
    for mapping in private {
        while ranges.get(from).is_some_and(|r| r.1 <= mapping.start) {
            from += 1;
        }
        for &(start, end) in ranges[from..].iter().take_while(|r| r.0 < mapping.end) {
            let range = (start.max(mapping.start), end.min(mapping.end));
            sender.add(range, mapping.zeros_are_free())?;
        }
    }
    sender.flush()?;
    Ok(sender.sent)
}

/// Gathers pages of many ranges into records.
struct Sender<'s> {
    host: Pid,
    pid: i32,
    sink: &'s mut dyn ImageSink,
    forced: ForcedMemory,
    buf: Vec<u8>,
    /// Ranges `(start, len)` that the next read fills `buf` with, and whether
    /// zeros among them are left out.
    wanted: Vec<(u64, u64, bool)>,
    len: usize,
    sent: Sent,
}

impl<'s> Sender<'s> {
    fn new(host: Pid, pid: i32, sink: &'s mut dyn ImageSink) -> io::Result<Self> {
        let forced = ForcedMemory::open(host)?;
        let buf = vec![0; CHUNK];
        Ok(Self { host, pid, sink, forced, buf, wanted: Vec::new(), len: 0, sent: Sent::default() })
    }

    fn add(&mut self, (mut start, end): (u64, u64), skip_zeros: bool) -> io::Result<()> {
        while start < end {
            let room = (CHUNK - self.len) as u64;
            let len = room.min(end - start);
            self.wanted.push((start, len, skip_zeros));
            self.len += usize::try_from(len).expect("at most a chunk");
            start += len;
            if self.len == CHUNK {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        self.read()?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut parts = Vec::new();
        let mut at = 0;
        for &(start, len, skip_zeros) in &self.wanted {
            let len = usize::try_from(len).expect("at most a chunk");
            let mut addr = start;
            for page in self.buf[at..at + len].chunks(PAGE_LEN) {
                if !(skip_zeros && is_zero(page)) {
                    parts.push(IoSlice::new(page));
                    self.sent.pages += 1;
                    match runs.last_mut() {
                        Some(run) if run.0 + run.1 == addr => run.1 += PAGE,
                        _ => runs.push((addr, PAGE)),
                    }
                }
                addr += PAGE;
            }
            at += len;
        }
        if !runs.is_empty() {
            let head = encode_runs(u64::from(self.pid.cast_unsigned()), &runs);
            parts.insert(0, IoSlice::new(&head));
            self.sink.put(Kind::Pages as u16, &parts)?;
            self.sent.bytes += parts.iter().map(|p| p.len() as u64).sum::<u64>();
        }
        self.wanted.clear();
        self.len = 0;
        Ok(())
    }

    /// Fills the buffer; what the process itself may not read is read by force.
    fn read(&mut self) -> io::Result<()> {
        let ranges: Vec<(u64, u64)> = self.wanted.iter().map(|w| (w.0, w.1)).collect();
        let buf = &mut self.buf[..self.len];
        if memory::read(self.host, buf, &ranges).is_ok_and(|n| n == self.len) {
            return Ok(());
        }
        let mut at = 0;
        for (start, len) in ranges {
            let len = usize::try_from(len).expect("at most a chunk");
            self.forced.read(&mut buf[at..at + len], start)?;
            at += len;
        }
        Ok(())
    }
}

fn is_zero(page: &[u8]) -> bool {
    page.chunks(64).all(|line| line == &[0; 64][..line.len()])
}

/// Encodes the head of a record of pages: its owner, then the runs
/// `(address, length)` whose bytes follow.
pub(crate) fn encode_runs(owner: u64, runs: &[(u64, u64)]) -> Vec<u8> {
    let words = [owner, runs.len() as u64].into_iter().chain(runs.iter().flat_map(|r| [r.0, r.1]));
    words.flat_map(u64::to_le_bytes).collect()
}

/// A record of pages.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Runs<'b> {
    /// A process by its pid, or a memory object.
    pub(crate) owner: u64,
    /// Where the bytes belong: `(address or offset, length)`, one behind the other.
    pub(crate) runs: Vec<(u64, u64)>,
    pub(crate) data: &'b [u8],
}

/// Decodes a record of pages; `None` when its lengths do not add up.
pub(crate) fn decode_runs(body: &[u8]) -> Option<Runs<'_>> {
    let word = |body: &mut &[u8]| {
        let (first, rest) = body.split_first_chunk::<8>()?;
        *body = rest;
        Some(u64::from_le_bytes(*first))
    };
    let mut rest = body;
    let owner = word(&mut rest)?;
    let n = word(&mut rest)?;
    if (rest.len() as u64) / 16 < n {
        return None;
    }
    let mut runs = Vec::with_capacity(usize::try_from(n).ok()?);
    let mut total = 0_u64;
    for _ in 0..n {
        let run = (word(&mut rest)?, word(&mut rest)?);
        total = total.checked_add(run.1)?;
        runs.push(run);
    }
    (total == rest.len() as u64).then_some(Runs { owner, runs, data: rest })
}

/// Fills pages of a process that stands in the skeleton's place.
pub(crate) fn restore_pages(
    host: Pid,
    forced: &ForcedMemory,
    runs: &[(u64, u64)],
    data: &[u8],
) -> io::Result<()> {
    let mut data = data;
    for runs in runs.chunks(memory::MAX_RANGES) {
        let len = runs.iter().map(|r| r.1).sum::<u64>();
        let (part, rest) = data.split_at(usize::try_from(len).expect("fits the record"));
        data = rest;
        if memory::write(host, part, runs).is_ok_and(|n| n == part.len()) {
            continue;
        }
        let mut at = 0;
        for &(start, len) in runs {
            let len = usize::try_from(len).expect("fits the record");
            forced.write(&part[at..at + len], start)?;
            at += len;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_decode_to_what_was_encoded(
            owner: u64,
            runs in proptest::collection::vec((any::<u64>(), 0_u64..64), 0..20),
        ) {
            let mut body = encode_runs(owner, &runs);
            let data = vec![7; usize::try_from(runs.iter().map(|r| r.1).sum::<u64>()).unwrap()];
            body.extend_from_slice(&data);
            prop_assert_eq!(decode_runs(&body), Some(Runs { owner, runs, data: &data }));
            body.push(0);
            prop_assert_eq!(decode_runs(&body), None);
        }

        #[test]
        fn any_bytes_are_judged(body: Vec<u8>) {
            let _ = decode_runs(&body);
        }
    }
}
