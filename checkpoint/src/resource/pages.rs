//! Content of a process's private memory.
//!
//! A page travels when it is the process's own: anonymous, or a private copy of
//! a file's page. Untouched pages, pages of zeros and pages still equal to the
//! file never do.

use std::{io, io::IoSlice};

use nix::unistd::Pid;

use super::memory::{Backing, Mapping};
use crate::{
    image::{ImageSink, Kind},
    sys::memory::{self, Filter, ForcedMemory, PAGE, PAGE_LEN, category},
};

/// Pages read at a time: small enough to stay in the cache until they are sent.
const CHUNK: usize = 256 << 10;

/// What has been put into a sink.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sent {
    pub(crate) pages: u64,
    pub(crate) bytes: u64,
}

/// Ranges that could not be read: unmapped since they were found.
pub(crate) type Lost = Vec<(u64, u64)>;

/// Which pages are the process's own.
const OWN: Filter = Filter {
    all: 0,
    any: category::PRESENT | category::SWAPPED,
    none: category::FILE | category::PFNZERO,
};

/// The same where no page is a file's: to tell whether one is, the kernel looks
/// each up, which takes ten times as long as all the rest.
const OWN_ANONYMOUS: Filter = Filter { none: category::PFNZERO, ..OWN };

/// Which pages of a mapping are the process's own.
fn own_in(mapping: &Mapping) -> Filter {
    if mapping.backing == Backing::Anonymous { OWN_ANONYMOUS } else { OWN }
}

/// A mapping from this size on is worth a scan of its own.
const LARGE: u64 = 1 << 20;

/// Ranges of the process's own pages in the private ones of `mappings`, each
/// within one mapping.
pub(crate) fn own(host: Pid, mappings: &[Mapping]) -> io::Result<Vec<(u64, u64)>> {
    let private = || mappings.iter().filter(|m| !m.shared);
    let mut ranges = Vec::new();
    // One scan for all between two large ones: each call costs more than the
    // pages of a small mapping.
    let mut small: Option<(u64, u64)> = None;
    let mut scan = |(start, end), filter| -> io::Result<()> {
        ranges.extend(memory::scan(host, start, end, filter)?);
        Ok(())
    };
    for mapping in private() {
        if mapping.backing == Backing::Anonymous && LARGE <= mapping.end - mapping.start {
            small.take().map_or(Ok(()), |small| scan(small, OWN))?;
            scan((mapping.start, mapping.end), OWN_ANONYMOUS)?;
        } else {
            let start = small.map_or(mapping.start, |(start, _)| start);
            small = Some((start, mapping.end));
        }
    }
    small.map_or(Ok(()), |small| scan(small, OWN))?;
    let mut own = Vec::with_capacity(ranges.len());
    let mut from = 0;
    for mapping in private() {
        while ranges.get(from).is_some_and(|r| r.1 <= mapping.start) {
            from += 1;
        }
        let inside = ranges[from..].iter().take_while(|r| r.0 < mapping.end);
        own.extend(inside.map(|r| (r.0.max(mapping.start), r.1.min(mapping.end))));
    }
    Ok(own)
}

/// Takes the pages of `range`, a part of `mapping`, that were written since the
/// last time, and starts to watch them for the next.
pub(crate) fn take_written(
    host: Pid,
    mapping: &Mapping,
    range: (u64, u64),
) -> io::Result<Vec<(u64, u64)>> {
    let filter = Filter { all: category::WRITTEN, ..own_in(mapping) };
    memory::scan_and_protect(host, range.0, range.1, filter)
}

/// Sends the pages of all `mappings` that are the process's own.
pub(crate) fn dump(
    host: Pid,
    pid: i32,
    mappings: &[Mapping],
    sink: &mut dyn ImageSink,
) -> io::Result<Sent> {
    let ranges = own(host, mappings)?;
    let (sent, lost) = send(host, pid, mappings, &ranges, &|_| true, sink)?;
    if lost.is_empty() { Ok(sent) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Sends the pages of `ranges`, which are in order and each in one of
/// `mappings`. Zeros stay at home where `fresh` says that the destination has
/// nothing else at that address yet.
pub(crate) fn send(
    host: Pid,
    pid: i32,
    mappings: &[Mapping],
    ranges: &[(u64, u64)],
    fresh: &dyn Fn((u64, u64)) -> bool,
    sink: &mut dyn ImageSink,
) -> io::Result<(Sent, Lost)> {
    let mut sender = Sender::new(host, pid, sink)?;
    let mut mappings = mappings.iter().peekable();
    for &range in ranges {
        while mappings.next_if(|m| m.end <= range.0).is_some() {}
        let zeros_are_free = mappings.peek().is_some_and(|m| m.zeros_are_free());
        sender.add(range, zeros_are_free && fresh(range))?;
    }
    sender.flush()?;
    Ok((sender.sent, sender.lost))
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
    lost: Lost,
}

impl<'s> Sender<'s> {
    fn new(host: Pid, pid: i32, sink: &'s mut dyn ImageSink) -> io::Result<Self> {
        let forced = ForcedMemory::open(host)?;
        let buf = vec![0; CHUNK];
        Ok(Self {
            host,
            pid,
            sink,
            forced,
            buf,
            wanted: Vec::new(),
            len: 0,
            sent: Sent::default(),
            lost: Lost::new(),
        })
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
    /// Ranges that are gone move from `wanted` to `lost`.
    fn read(&mut self) -> io::Result<()> {
        let ranges: Vec<(u64, u64)> = self.wanted.iter().map(|w| (w.0, w.1)).collect();
        let buf = &mut self.buf[..self.len];
        if memory::read(self.host, buf, &ranges).is_ok_and(|n| n == self.len) {
            return Ok(());
        }
        let mut at = 0;
        let (forced, lost) = (&self.forced, &mut self.lost);
        let mut failure = None;
        self.wanted.retain(|&(start, len, _)| {
            let size = usize::try_from(len).expect("at most a chunk");
            match forced.read(&mut buf[at..at + size], start) {
                Ok(()) => {
                    at += size;
                    true
                }
                // What procfs says of an address with nothing mapped there.
                Err(err) if err.raw_os_error() == Some(libc::EIO) => {
                    lost.push((start, start + len));
                    false
                }
                Err(err) => {
                    failure.get_or_insert(err);
                    false
                }
            }
        });
        self.len = at;
        failure.map_or(Ok(()), Err)
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
pub(crate) fn restore(
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
