//! What a thread has of its own: registers, signal mask and stack, name, and
//! the addresses it told the kernel (`clone(2)`, `rseq(2)`, `sigaltstack(2)`).

use std::io;

use libc::user_regs_struct;
use serde::{Deserialize, Serialize};

use super::{creds, limits, signals::Queue};
use crate::{
    proc::Status,
    stub::{Batch, Buf, Call, Results, Tracee, args},
    sys::{
        ptrace::{self, Rseq},
        task,
    },
};

/// One thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    pub(crate) tid: i32,
    name: Vec<u8>,
    regs: Vec<u64>,
    /// The xsave area in the standard format: x87, SSE, AVX, AVX-512, AMX, PKRU.
    xstate: Vec<u8>,
    mask: u64,
    /// `stack_t`: pointer, flags, size.
    signal_stack: [u64; 3],
    robust_list: (u64, u64),
    rseq: Rseq,
    clear_child_tid: u64,
    pub(crate) queue: Queue,
    pub(crate) creds: creds::Image,
    pub(crate) limits: limits::Thread,
}

/// Questions asked by [`ask`].
pub(crate) struct Asked {
    signal_stack: Buf,
    clear_child_tid: Buf,
    creds: creds::Asked,
    name: Buf,
    slack: Call,
}

const PR_GET_TID_ADDRESS: i32 = 40;

/// Asks a thread for what only it can tell.
pub(crate) fn ask(batch: &mut Batch) -> Asked {
    let signal_stack = batch.space(24);
    batch.call(libc::SYS_sigaltstack, args![0_u64, signal_stack]);
    let clear_child_tid = batch.space(8);
    batch.call(libc::SYS_prctl, args![PR_GET_TID_ADDRESS, clear_child_tid]);
    let name = batch.space(16);
    batch.call(libc::SYS_prctl, args![libc::PR_GET_NAME, name]);
    let slack = limits::Thread::ask(batch);
    Asked { signal_stack, clear_child_tid, creds: creds::ask(batch), name, slack }
}

/// Puts the image of a thread together, without queued signals.
pub(crate) fn answer(
    asked: &Asked,
    results: &Results<'_>,
    task: &Tracee,
    status: &Status,
    ids: &creds::IdMaps,
    xstate: Vec<u8>,
) -> io::Result<Image> {
    let tid = task.tid;
    let name = results.bytes(asked.name);
    Ok(Image {
        tid: status.tid(),
        name: name.split(|&byte| byte == 0).next().unwrap_or_default().to_vec(),
        regs: to_words(&task.portable_regs()),
        xstate,
        mask: task.mask,
        signal_stack: [0, 8, 16].map(|at| results.u64(asked.signal_stack, at)),
        robust_list: task::robust_list(tid)?,
        // Kernels before 5.13 cannot tell; glibc's threads there have none.
        rseq: ptrace::rseq(tid).unwrap_or_default(),
        clear_child_tid: results.u64(asked.clear_child_tid, 0),
        queue: Queue::default(),
        creds: creds::answer(&asked.creds, results, tid, status, ids)?,
        limits: limits::Thread::answer(asked.slack, results, tid)?,
    })
}

/// Gives a new thread what it has of its own, except credentials.
pub(crate) fn restore(image: &Image, batch: &mut Batch) {
    let name = batch.string(&image.name);
    batch.call(libc::SYS_prctl, args![libc::PR_SET_NAME, name]);
    image.limits.restore_slack(batch);
    batch.call(libc::SYS_set_tid_address, args![image.clear_child_tid]);
    let (head, len) = image.robust_list;
    if head != 0 {
        batch.call(libc::SYS_set_robust_list, args![head, len]);
    }
    let [pointer, flags, size] = image.signal_stack;
    if flags & SS_DISABLE == 0 {
        // Whether it is in use follows from the stack pointer.
        let raw: Vec<u8> =
            [pointer, flags & !SS_ONSTACK, size].iter().flat_map(|w| w.to_le_bytes()).collect();
        let stack = batch.bytes(&raw);
        batch.call(libc::SYS_sigaltstack, args![stack, 0_u64]);
    }
    let Rseq { area, size, signature, flags, .. } = image.rseq;
    if area != 0 {
        let [size, flags, signature] = [size, flags, signature].map(u64::from);
        batch.call(libc::SYS_rseq, args![area, size, flags, signature]);
    }
}

const SS_ONSTACK: u64 = 1;
const SS_DISABLE: u64 = 2;

impl Image {
    /// Gives the thread the registers it goes on with.
    pub(crate) fn enter(&self, task: &mut Tracee) -> io::Result<()> {
        task.regs = from_words(&self.regs, &task.regs)?;
        task.mask = self.mask;
        ptrace::set_xstate(task.tid, &self.xstate)
    }
}

/// The registers in the order of `struct user_regs_struct`.
fn to_words(regs: &user_regs_struct) -> Vec<u64> {
    let r = regs;
    vec![
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx,
        r.rsi, r.rdi, r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds,
        r.es, r.fs, r.gs,
    ]
}

/// The other way; segment selectors of code and stack stay the kernel's.
fn from_words(words: &[u64], own: &user_regs_struct) -> io::Result<user_regs_struct> {
    let words: [u64; 27] = words.try_into().map_err(|_| io::ErrorKind::InvalidData)?;
    let [
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax,
        rip,
        _cs,
        eflags,
        rsp,
        _ss,
        fs_base,
        gs_base,
        ds,
        es,
        fs,
        gs,
    ] = words;
    Ok(user_regs_struct {
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax,
        rip,
        cs: own.cs,
        eflags,
        rsp,
        ss: own.ss,
        fs_base,
        gs_base,
        ds,
        es,
        fs,
        gs,
    })
}
