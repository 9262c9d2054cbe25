//! The image: a sequence of records, each `(kind, body)`.
//!
//! The engine writes them to an [`ImageSink`] and reads them from an
//! [`ImageSource`]; whether that is a file or a socket is the caller's affair.

mod file;

use std::io::{self, IoSlice};

pub use file::{FileError, FileSink, FileSource, NAME as FILE_NAME};

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
