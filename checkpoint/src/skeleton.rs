//! The program a process runs until its own memory is in place: a page of code
//! with the stub in it and the stub's data area, nothing else.

use std::{
    ffi::CString,
    io::{self, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MemFdCreateFlag, memfd_create},
    unistd::Pid,
};

use crate::{
    stub::{self, DATA_LEN, Place},
    sys,
};

/// Where the code is linked: low, where programs have nothing.
const CODE: u64 = 0x2_0000;
/// Where the stub lies in the page of code.
const STUB_AT: u64 = 0x200;
/// Where the data area lies.
const DATA: u64 = 0x4_0000;

/// First address above the skeleton; an image may map nothing below.
pub(crate) const END: u64 = DATA + DATA_LEN;

/// Places of the stub in a process that runs the skeleton.
pub(crate) const PLACE: Place = Place { code: CODE + STUB_AT, data: DATA };

/// `pause(2)` for ever.
const ENTRY: [u8; 9] = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];

const EHDR: u64 = 64;
const PHDR: u64 = 56;
const HEADERS: u64 = 3;

/// The skeleton as an ELF program.
fn elf() -> Vec<u8> {
    const PT_LOAD: u32 = 1;
    const PT_GNU_STACK: u32 = 0x6474_e551;
    const READ: u32 = 4;
    const WRITE: u32 = 2;
    const EXECUTE: u32 = 1;
    let entry = EHDR + HEADERS * PHDR;
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |out: &mut Vec<u8>, v: u16| out.extend_from_slice(&v.to_le_bytes());
    let word = |out: &mut Vec<u8>, v: u32| out.extend_from_slice(&v.to_le_bytes());
    let long = |out: &mut Vec<u8>, v: u64| out.extend_from_slice(&v.to_le_bytes());
    half(&mut out, 2); // ET_EXEC
    half(&mut out, 62); // EM_X86_64
    word(&mut out, 1);
    long(&mut out, CODE + entry);
    long(&mut out, EHDR); // program headers
    long(&mut out, 0); // no sections
    word(&mut out, 0);
    for v in [EHDR, PHDR, HEADERS, 0, 0, 0] {
        half(&mut out, u16::try_from(v).expect("small"));
    }
    let mut segment = |kind: u32, flags: u32, addr: u64, file: u64, memory: u64| {
        word(&mut out, kind);
        word(&mut out, flags);
        for v in [0, addr, addr, file, memory, 0x1000] {
            long(&mut out, v);
        }
    };
    segment(PT_LOAD, READ | EXECUTE, CODE, 0x1000, 0x1000);
    segment(PT_LOAD, READ | WRITE, DATA, 0, DATA_LEN);
    segment(PT_GNU_STACK, READ | WRITE, 0, 0, 0);
    out.extend_from_slice(&ENTRY);
    out.resize(usize::try_from(STUB_AT).expect("small"), 0);
    out.extend_from_slice(stub::code());
    out.resize(0x1000, 0);
    out
}

/// The program in a sealed memory file.
fn program() -> io::Result<OwnedFd> {
    let name = CString::new("dunlin-skeleton").expect("no NUL inside");
    let flags = MemFdCreateFlag::MFD_CLOEXEC | MemFdCreateFlag::MFD_ALLOW_SEALING;
    let mut file = std::fs::File::from(memfd_create(&name, flags)?);
    file.write_all(&elf())?;
    let seals = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_SEAL;
    fcntl(file.as_raw_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// Replaces the calling process by the skeleton: an almost empty address space
/// that waits to be seized. Keeps fds 0, 1 and 2 and every fd without
/// close-on-exec. Returns only on failure.
#[must_use]
pub fn exec() -> io::Error {
    match program() {
        Ok(program) => sys::process::exec(program.as_fd()),
        Err(err) => err,
    }
}

/// Starts the skeleton as a child of the caller, with pid `pid` in the caller's
/// pid namespace: the root of a tree that is no container.
pub fn spawn(pid: Pid) -> io::Result<Pid> {
    sys::process::spawn(program()?.as_fd(), pid)
}
