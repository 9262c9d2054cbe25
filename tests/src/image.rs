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

    /// Inverts one bit, counted over the bodies of all records joined.
    pub fn flip(&mut self, bit: usize) {
        let mut byte = bit / 8;
        for (_, body) in &mut self.records {
            match body.get_mut(byte) {
                Some(found) => return *found ^= 1 << (bit % 8),
                None => byte -= body.len(),
            }
        }
    }

    /// Bits in the bodies of all records.
    #[must_use]
    pub fn bits(&self) -> usize {
        self.records.iter().map(|(_, body)| body.len() * 8).sum()
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
