//! What the kernel knows of an address space as a whole: program break, exe
//! link, command line, environment, auxiliary vector (`PR_SET_MM_MAP`).

use std::{fs, io, os::unix::ffi::OsStrExt};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::{
    proc::{self, Stat},
    stub::{Batch, Call, Results, args},
};

/// An address space as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// In the order of `struct prctl_mm_map`: code, data, break, stack, command
    /// line, environment.
    fields: [u64; 11],
    auxv: Vec<u8>,
    /// Path of the program, as seen from the container's root.
    pub(crate) exe: Vec<u8>,
    /// `PR_SET_DUMPABLE`.
    dumpable: u64,
    /// `PR_SET_THP_DISABLE`.
    no_huge_pages: bool,
    /// `PR_SET_MDWE` bits.
    deny_write_execute: u64,
    /// `PR_SET_CHILD_SUBREAPER`, of the process.
    child_subreaper: bool,
    personality: u64,
}

/// Questions asked by [`ask`].
pub(crate) struct Asked {
    brk: Call,
    dumpable: Call,
    no_huge_pages: Call,
    deny_write_execute: Call,
    child_subreaper: crate::stub::Buf,
    personality: Call,
}

/// `personality(2)` changes nothing when told this.
const ASK_PERSONALITY: u64 = 0xffff_ffff;
const PR_GET_MDWE: i32 = 66;
const PR_SET_MDWE: i32 = 65;
const PR_GET_THP_DISABLE: i32 = 42;
const PR_SET_THP_DISABLE: i32 = 41;

/// Asks for what `/proc` does not tell.
pub(crate) fn ask(batch: &mut Batch) -> Asked {
    let zero = 0_u64;
    let brk = batch.call(libc::SYS_brk, args![zero]);
    let dumpable = batch.call(libc::SYS_prctl, args![libc::PR_GET_DUMPABLE]);
    let no_huge_pages =
        batch.try_call(libc::SYS_prctl, args![PR_GET_THP_DISABLE, zero, zero, zero, zero]);
    let deny_write_execute =
        batch.try_call(libc::SYS_prctl, args![PR_GET_MDWE, zero, zero, zero, zero]);
    let child_subreaper = batch.space(4);
    batch.call(libc::SYS_prctl, args![libc::PR_GET_CHILD_SUBREAPER, child_subreaper]);
    let personality = batch.call(libc::SYS_personality, args![ASK_PERSONALITY]);
    Asked { brk, personality, dumpable, no_huge_pages, deny_write_execute, child_subreaper }
}

/// Puts the image of `pid`'s address space together.
pub(crate) fn answer(
    asked: &Asked,
    results: &Results<'_>,
    pid: Pid,
    stat: &Stat,
) -> io::Result<Image> {
    let exe = fs::read_link(format!("/proc/{pid}/exe"))?;
    Ok(Image {
        fields: [
            stat.start_code,
            stat.end_code,
            stat.start_data,
            stat.end_data,
            stat.start_brk,
            results.get(asked.brk)?,
            stat.start_stack,
            stat.arg.0,
            stat.arg.1,
            stat.env.0,
            stat.env.1,
        ],
        auxv: proc::read(&format!("{pid}/auxv"))?,
        exe: exe.as_os_str().as_bytes().to_vec(),
        dumpable: results.get(asked.dumpable)?,
        no_huge_pages: results.get(asked.no_huge_pages).unwrap_or(0) & 1 != 0,
        deny_write_execute: results.get(asked.deny_write_execute).unwrap_or(0),
        child_subreaper: results.u32(asked.child_subreaper, 0) != 0,
        personality: results.get(asked.personality)?,
    })
}

impl Image {
    pub(crate) fn is_subreaper(&self) -> bool {
        self.child_subreaper
    }
}

/// Tells the kernel about the address space. Nothing of the skeleton may be
/// mapped any more: the exe link moves only when the old program is gone.
pub(crate) fn restore(image: &Image, batch: &mut Batch) {
    let auxv = batch.bytes(&image.auxv);
    let mut raw: Vec<u8> = image.fields.iter().flat_map(|f| f.to_le_bytes()).collect();
    raw.extend_from_slice(&[0; 8]); // auxv, below
    let auxv_size = u32::try_from(image.auxv.len()).unwrap_or(u32::MAX);
    raw.extend_from_slice(&auxv_size.to_le_bytes());
    raw.extend_from_slice(&[0; 4]); // exe_fd, by the stub
    let len = raw.len();
    let map = batch.bytes(&raw);
    batch.address(map.skip(88), auxv);
    let path = batch.string(&image.exe);
    let exe = batch.call(libc::SYS_open, args![path, libc::O_RDONLY | libc::O_CLOEXEC]);
    batch.store(exe, map.skip(100));
    let set = u64::from(libc::PR_SET_MM_MAP.cast_unsigned());
    batch.call(libc::SYS_prctl, args![libc::PR_SET_MM, set, map, len as u64, 0_u64]);
    batch.call(libc::SYS_close, args![exe]);
    batch.call(libc::SYS_personality, args![image.personality]);
    let flag = |batch: &mut Batch, option: i32, value: u64| {
        batch.call(libc::SYS_prctl, args![option, value, 0_u64, 0_u64, 0_u64]);
    };
    if image.no_huge_pages {
        flag(batch, PR_SET_THP_DISABLE, 1);
    }
    if image.child_subreaper {
        flag(batch, libc::PR_SET_CHILD_SUBREAPER, 1);
    }
}

/// What forbids further work on the address space or is undone by a change of
/// credentials: comes after both.
pub(crate) fn seal(image: &Image, batch: &mut Batch) {
    let zero = 0_u64;
    if image.deny_write_execute != 0 {
        let bits = image.deny_write_execute;
        batch.call(libc::SYS_prctl, args![PR_SET_MDWE, bits, zero, zero, zero]);
    }
    // 2 (set-uid program) cannot be asked for; 0 protects as much.
    let dumpable = u64::from(image.dumpable == 1);
    batch.call(libc::SYS_prctl, args![libc::PR_SET_DUMPABLE, dumpable, zero, zero, zero]);
}
