//! The image: a sequence of records, each `(kind, body)`.
//!
//! The engine writes them to an [`ImageSink`] and reads them from an
//! [`ImageSource`]; whether that is a file or a socket is the caller's affair.

mod file;
mod records;

use std::io::{self, IoSlice};

use serde::Serialize;

pub use file::{FileError, FileSink, FileSource, NAME as FILE_NAME};
pub(crate) use records::{Head, Process};

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
}

impl Kind {
    pub(crate) fn of(raw: u16) -> Option<Self> {
        const ALL: [Kind; 8] = [
            Kind::Head,
            Kind::Object,
            Kind::ObjectPages,
            Kind::Layout,
            Kind::Pages,
            Kind::Files,
            Kind::Process,
            Kind::End,
        ];
        ALL.into_iter().find(|&kind| kind as u16 == raw)
    }
}

/// Puts one record of our own encoding.
pub(crate) fn put<T: Serialize>(
    sink: &mut dyn ImageSink,
    kind: Kind,
    value: &T,
) -> io::Result<u64> {
    let body = postcard::to_stdvec(value).map_err(io::Error::other)?;
    sink.put(kind as u16, &[IoSlice::new(&body)])?;
    Ok(body.len() as u64)
}
