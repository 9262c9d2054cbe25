//! An image held in memory, and ones that fail or lie.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use dunlin_checkpoint::image::{ImageSink, ImageSource};

/// Records as the engine wrote them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Memory {
    records: VecDeque<(u16, Vec<u8>)>,
}

impl Memory {
    /// How many records there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether nothing was written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Drops all records from the `n`th on.
    pub fn truncate(&mut self, n: usize) {
        self.records.truncate(n);
    }

    /// Inverts one bit of record `n`, counted round if the record is shorter.
    pub fn flip(&mut self, n: usize, bit: usize) {
        if let Some((_, body)) = self.records.get_mut(n)
            && !body.is_empty()
        {
            let byte = bit / 8 % body.len();
            body[byte] ^= 1 << (bit % 8);
        }
    }
}

impl ImageSink for Memory {
    fn put(&mut self, kind: u16, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let mut body = Vec::with_capacity(parts.iter().map(|part| part.len()).sum());
        parts.iter().for_each(|part| body.extend_from_slice(part));
        self.records.push_back((kind, body));
        Ok(())
    }
}

impl ImageSource for Memory {
    fn next(&mut self, body: &mut Vec<u8>) -> io::Result<Option<u16>> {
        Ok(self.records.pop_front().map(|(kind, record)| {
            *body = record;
            kind
        }))
    }
}

/// A sink that takes `room` records and then fails as a full disk does.
#[derive(Debug)]
pub struct Full {
    /// Records it still takes.
    pub room: usize,
}

impl ImageSink for Full {
    fn put(&mut self, _kind: u16, _parts: &[IoSlice<'_>]) -> io::Result<()> {
        let left = self.room.checked_sub(1);
        self.room = left.ok_or(io::ErrorKind::StorageFull)?;
        Ok(())
    }
}
