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

/// Length of an xsave area in the standard format with every component that
/// this kernel lets user space have, in bytes (CPUID leaf 0xd).
pub(crate) fn xstate_len() -> io::Result<u32> {
    Ok(std::arch::x86_64::__cpuid_count(0xd, 0).ebx)
}
