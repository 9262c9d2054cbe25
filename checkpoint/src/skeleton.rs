//! The program a process runs until its own memory is in place.

use std::io;

/// Replaces the calling process by the skeleton: an almost empty address space
/// that waits to be seized. Keeps fds 0, 1 and 2 and every fd without
/// close-on-exec. Returns only on failure.
pub fn exec() -> io::Error {
    io::Error::from(io::ErrorKind::Unsupported)
}
