//! The image: a sequence of records, each `(kind, body)`.
//!
//! The engine writes them to an [`ImageSink`] and reads them from an
//! [`ImageSource`]; whether that is a file or a socket is the caller's affair.

mod file;
mod records;

use std::io::{self, IoSlice};

use serde::Serialize;

use crate::RestoreError;

pub use file::{FileError, FileSink, FileSource, NAME as FILE_NAME};
pub(crate) use records::{Drop, Head, Process};

/// Version of the records' bodies; an image of another one is refused.
pub const VERSION: u16 = 1;

/// Longest record body, in bytes; judged before anything is allocated for it.
pub const MAX_BODY: u32 = 4 << 20;

/// Where records go.
pub trait ImageSink {
    /// Takes one record whose body is `parts` joined, at most [`MAX_BODY`] bytes.
    fn put(&mut self, kind: u16, parts: &[IoSlice<'_>]) -> io::Result<()>;
}

/// Where records come from.
pub trait ImageSource {
    /// Reads the next record's body into `body`, replacing what was in it.
    ///
    /// Returns its kind, or `None` at the proper end of the image. An image
    /// that is cut short is an error, never an end.
    fn next(&mut self, body: &mut Vec<u8>) -> io::Result<Option<u16>>;
}

/// What a record holds. The numbers are the format: append, never renumber.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Kind {
    /// What the image needs of a host, and the shape of the tree.
    Head = 1,
    /// A memory object that processes share.
    Object = 2,
    /// Content of one.
    ObjectPages = 3,
    /// The mappings of one process.
    Layout = 4,
    /// Content of its private pages.
    Pages = 5,
    /// Open files of the whole tree.
    Files = 6,
    /// Everything else of one process.
    Process = 7,
    /// Nothing follows.
    End = 8,
    /// Pages that were sent and are gone since.
    Drop = 9,
    /// System V objects.
    Sysv = 10,
}

impl Kind {
    pub(crate) fn of(raw: u16) -> Option<Self> {
        const ALL: [Kind; 10] = [
            Kind::Head,
            Kind::Object,
            Kind::ObjectPages,
            Kind::Layout,
            Kind::Pages,
            Kind::Files,
            Kind::Process,
            Kind::End,
            Kind::Drop,
            Kind::Sysv,
        ];
        ALL.into_iter().find(|&kind| kind as u16 == raw)
    }
}

/// Bit of a record's kind: its value goes on in the next record.
const CONTINUED: u16 = 1 << 15;

/// Largest value put together from several records, in bytes.
const MAX_VALUE: usize = 1 << 30;

/// Puts one value of our own encoding, in as many records as it takes.
pub(crate) fn put<T: Serialize>(
    sink: &mut dyn ImageSink,
    kind: Kind,
    value: &T,
) -> io::Result<u64> {
    const CHUNK: usize = 1 << 20;
    let body = postcard::to_stdvec(value).map_err(io::Error::other)?;
    let mut rest = body.as_slice();
    while let Some((chunk, tail)) = rest.split_at_checked(CHUNK) {
        sink.put(kind as u16 | CONTINUED, &[IoSlice::new(chunk)])?;
        rest = tail;
    }
    sink.put(kind as u16, &[IoSlice::new(rest)])?;
    Ok(body.len() as u64)
}

/// Puts values together that came in several records.
#[derive(Default)]
pub(crate) struct Assembler {
    partial: Option<(Kind, Vec<u8>)>,
}

impl Assembler {
    /// Takes one record; with the last one of a value `body` becomes all of it.
    pub(crate) fn take(
        &mut self,
        raw: u16,
        body: &mut Vec<u8>,
    ) -> Result<Option<Kind>, RestoreError> {
        let damaged = |text: String| Err(RestoreError::Image(text));
        let Some(kind) = Kind::of(raw & !CONTINUED) else {
            return damaged(format!("record of unknown kind {raw}"));
        };
        let mut value = match self.partial.take() {
            None if raw & CONTINUED == 0 => return Ok(Some(kind)),
            None => Vec::new(),
            Some((begun, value)) if begun == kind => value,
            Some(_) => return damaged("a record inside another".into()),
        };
        if value.len() + body.len() > MAX_VALUE {
            return damaged("a value is too long".into());
        }
        value.append(body);
        if raw & CONTINUED == 0 {
            *body = value;
            return Ok(Some(kind));
        }
        self.partial = Some((kind, value));
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[derive(Default)]
    struct Records(VecDeque<(u16, Vec<u8>)>);

    impl ImageSink for Records {
        fn put(&mut self, kind: u16, parts: &[IoSlice<'_>]) -> io::Result<()> {
            self.0.push_back((kind, parts.iter().flat_map(|p| p.iter().copied()).collect()));
            Ok(())
        }
    }

    #[test]
    fn a_long_value_comes_in_pieces_and_is_whole_again() {
        let value: Vec<u32> = (0..1_000_000).map(|n| n * 4099).collect();
        let mut records = Records::default();
        put(&mut records, Kind::Files, &value).unwrap();
        assert!(records.0.len() > 3, "{} records", records.0.len());
        let mut assembler = Assembler::default();
        let last = records.0.len() - 1;
        for (i, (raw, mut body)) in records.0.into_iter().enumerate() {
            let kind = assembler.take(raw, &mut body).unwrap();
            assert_eq!(kind, (i == last).then_some(Kind::Files));
            if i == last {
                assert_eq!(postcard::from_bytes::<Vec<u32>>(&body).unwrap(), value);
            }
        }
    }

    #[test]
    fn values_do_not_interleave() {
        let mut assembler = Assembler::default();
        let first = Kind::Files as u16 | CONTINUED;
        assert_eq!(assembler.take(first, &mut vec![1]).unwrap(), None);
        assert!(assembler.take(Kind::Process as u16, &mut vec![2]).is_err());
    }
}
