//! What of a host an image depends on.

use std::io;

use nix::unistd::Pid;

use crate::{
    proc::{self, VmaKind},
    sys::memory,
};

/// Checksum of the kernel's vDSO as every new process gets it.
pub(crate) fn vdso_checksum() -> io::Result<u32> {
    let vmas = proc::vmas(Pid::this())?;
    let vdso = vmas.iter().find(|v| v.kind == VmaKind::Vdso).ok_or(io::ErrorKind::NotFound)?;
    let mut code = vec![0; usize::try_from(vdso.len()).expect("x86-64")];
    memory::read_exact(Pid::this(), &mut code, vdso.start)?;
    Ok(crc32fast::hash(&code))
}
