//! What `/proc/PID/fdinfo/FD` says.

use std::{io, os::fd::RawFd};

use nix::unistd::Pid;
use rustix::fs::OFlags;

use crate::proc;

/// Flags the kernel shows that are no status of the description.
const NO_STATUS: u32 = libc::O_CLOEXEC.cast_unsigned();

/// The lines every file has, and the rest as it stands.
#[derive(Debug)]
pub(super) struct FdInfo {
    pub(super) pos: u64,
    flags: u32,
    pub(super) mnt_id: u64,
    /// Lines only this kind of file has.
    pub(super) rest: String,
}

impl FdInfo {
    pub(super) fn read(pid: Pid, fd: RawFd) -> io::Result<Self> {
        let text = proc::text(&format!("{pid}/fdinfo/{fd}"))?;
        Self::parse(&text).ok_or_else(|| io::Error::other("fdinfo in an unknown form"))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut info = Self { pos: 0, flags: 0, mnt_id: 0, rest: String::new() };
        for line in text.lines() {
            match line.split_once(':').map(|(key, value)| (key, value.trim())) {
                // A position beyond the signed range is shown negative.
                Some(("pos", value)) => info.pos = value.parse::<i64>().ok()?.cast_unsigned(),
                Some(("flags", value)) => info.flags = u32::from_str_radix(value, 8).ok()?,
                Some(("mnt_id", value)) => info.mnt_id = value.parse().ok()?,
                Some(("ino", _)) => (),
                _ => {
                    info.rest.push_str(line);
                    info.rest.push('\n');
                }
            }
        }
        Some(info)
    }

    pub(super) fn cloexec(&self) -> bool {
        self.flags & libc::O_CLOEXEC.cast_unsigned() != 0
    }

    /// Access mode and status flags.
    pub(super) fn status_flags(&self) -> u32 {
        self.flags & !NO_STATUS
    }

    pub(super) fn oflags(&self) -> OFlags {
        OFlags::from_bits_retain(self.status_flags())
    }

    pub(super) fn can_read(&self) -> bool {
        let mode = self.oflags() & OFlags::ACCMODE;
        mode == OFlags::RDONLY || mode == OFlags::RDWR
    }

    pub(super) fn can_write(&self) -> bool {
        let mode = self.oflags() & OFlags::ACCMODE;
        mode == OFlags::WRONLY || mode == OFlags::RDWR
    }

    /// The value of a line `key: value` that only this kind of file has.
    pub(super) fn field(&self, key: &str) -> Option<&str> {
        self.rest.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name == key).then_some(value.trim())
        })
    }
}
