//! Working directory, root directory and umask of a process (`CLONE_FS`).

use std::{fs, io, os::unix::ffi::OsStrExt};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::stub::{Batch, args};

/// Where a process stands in the file system. Paths are told from the root of
/// its mount namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    cwd: Vec<u8>,
    root: Vec<u8>,
    umask: u32,
}

/// Reads the directories of `pid`.
pub(crate) fn dump(pid: Pid, umask: u32) -> io::Result<Image> {
    let link = |name: &str| -> io::Result<Vec<u8>> {
        let path = fs::read_link(format!("/proc/{pid}/{name}"))?;
        Ok(path.as_os_str().as_bytes().to_vec())
    };
    Ok(Image { cwd: link("cwd")?, root: link("root")?, umask })
}

/// Puts the process there. Comes after everything that opens paths: they are
/// told from the container's root.
pub(crate) fn restore(image: &Image, batch: &mut Batch) {
    let Image { cwd, root, umask } = image;
    let path = batch.string(cwd);
    batch.call(libc::SYS_chdir, args![path]);
    if root != b"/" {
        let path = batch.string(root);
        batch.call(libc::SYS_chroot, args![path]);
    }
    batch.call(libc::SYS_umask, args![u64::from(*umask)]);
}
