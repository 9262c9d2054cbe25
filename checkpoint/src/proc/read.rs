//! Reading files of `/proc`: std would ask for size and place of each first.

use std::io;

use rustix::fs::{Mode, OFlags, open};

/// Room for most of them.
const ROOM: usize = 4096;

/// Reads `path` below `/proc`.
pub(crate) fn read(path: &str) -> io::Result<Vec<u8>> {
    let file = open(format!("/proc/{path}"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut text = vec![0; ROOM];
    let mut len = 0;
    loop {
        let n = rustix::io::read(&file, &mut text[len..])?;
        len += n;
        if n == 0 {
            text.truncate(len);
            return Ok(text);
        }
        if text.len() - len < ROOM {
            text.resize(2 * text.len(), 0);
        }
    }
}

/// Reads `path` below `/proc` as text.
pub(crate) fn text(path: &str) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(io::Error::other)
}
