//! The only code of ours that ever runs inside a target: a loop that executes
//! a batch of syscalls from a page mapped there, and the skeleton's entry.
//!
//! The loop heals itself. When the batch is done it sends itself a signal that
//! the target ignores: with a tracer that is a stop, without one (the engine
//! died) nothing happens, and the next instruction is an `rt_sigreturn` to
//! where the target was interrupted.
#![allow(unsafe_code, reason = "the stub is assembly")]

mod batch;
mod frame;
mod remote;
mod told;
mod tracee;

pub(crate) use batch::{Arg, Batch, Buf, Call, args};
/// Bytes in front of the loop where the source's way in and out lies.
pub(crate) const TRAMPOLINE: u64 = frame::TRAMPOLINE as u64;

pub(crate) use remote::{DATA_LEN, Place, Remote, Results, find_hole, find_slack};
pub(crate) use told::SignalUse;
pub(crate) use tracee::Tracee;

use std::arch::global_asm;

/// End of a batch: in place of a syscall number.
const END: u64 = u64::MAX;
/// Flag of an item: end the batch when the call fails.
const CHECK: u64 = 1;
/// Flag of an item: argument `i` is the address of its value, at bit `8 + i`.
const INDIRECT: u64 = 1 << 8;

// Registers: rbx the current item, r12 the header in front of the batch.
// Nothing is pushed: rsp stays the target's own, so a signal that arrives here
// after the engine's death is handled like at any other point of the program.
global_asm!(
    ".pushsection .rodata.dunlin_stub, \"a\"",
    ".balign 16",
    ".globl dunlin_stub_begin, dunlin_stub_told, dunlin_stub_healed, dunlin_stub_end",
    "dunlin_stub_begin:",
    "2: mov rax, [rbx]",
    "cmp rax, -1",
    "je 9f",
    "mov rcx, [rbx + 64]",
    "mov rdi, [rbx + 8]",
    "test ecx, 0x100",
    "jz 3f",
    "mov rdi, [rdi]",
    "3: mov rsi, [rbx + 16]",
    "test ecx, 0x200",
    "jz 3f",
    "mov rsi, [rsi]",
    "3: mov rdx, [rbx + 24]",
    "test ecx, 0x400",
    "jz 3f",
    "mov rdx, [rdx]",
    "3: mov r10, [rbx + 32]",
    "test ecx, 0x800",
    "jz 3f",
    "mov r10, [r10]",
    "3: mov r8, [rbx + 40]",
    "test ecx, 0x1000",
    "jz 3f",
    "mov r8, [r8]",
    "3: mov r9, [rbx + 48]",
    "syscall",
    "mov [rbx + 56], rax",
    "mov rcx, [rbx + 72]",
    "test rcx, rcx",
    "jz 4f",
    "mov [rcx], eax",
    "4: test byte ptr [rbx + 64], 1",
    "jz 5f",
    "cmp rax, -4095",
    "jae 9f",
    "5: add rbx, 80",
    "jmp 2b",
    // tgkill(tgid, tid, signal): the stop of a living engine.
    "9: mov eax, 234",
    "mov edi, [r12]",
    "mov esi, [r12 + 4]",
    "mov edx, [r12 + 8]",
    "syscall",
    "dunlin_stub_told:",
    // rt_sigaction(signal, old, NULL, 8), where the signal had to be borrowed.
    "cmp dword ptr [r12 + 12], 0",
    "jne 6f",
    "mov eax, 13",
    "mov edi, [r12 + 8]",
    "lea rsi, [r12 + 32]",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    // rt_sigtimedwait({SIGTRAP}, NULL, {0}, 8): what the kernel sends when the
    // engine dies at a stop around the call above.
    "6: mov eax, 128",
    "lea rdi, [r12 + 64]",
    "xor esi, esi",
    "lea rdx, [r12 + 72]",
    "mov r10d, 8",
    "syscall",
    "dunlin_stub_healed:",
    "mov rsp, [r12 + 16]",
    "mov eax, 15",
    "syscall",
    "dunlin_stub_end:",
    ".popsection",
);

unsafe extern "C" {
    static dunlin_stub_begin: u8;
    static dunlin_stub_told: u8;
    static dunlin_stub_healed: u8;
    static dunlin_stub_end: u8;
}

/// The loop's machine code, runnable at any address.
pub(crate) fn code() -> &'static [u8] {
    let (begin, end) = (&raw const dunlin_stub_begin, &raw const dunlin_stub_end);
    // SAFETY: both symbols delimit one run of initialised read-only bytes.
    unsafe { std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin)) }
}

/// Offset in [`code`] of the restore of a borrowed signal's action.
fn told_offset() -> u64 {
    offset(&raw const dunlin_stub_told)
}

/// Offset in [`code`] behind that.
fn healed_offset() -> u64 {
    offset(&raw const dunlin_stub_healed)
}

fn offset(symbol: *const u8) -> u64 {
    // SAFETY: both symbols lie in the same run of bytes, `begin` first.
    unsafe { symbol.offset_from_unsigned(&raw const dunlin_stub_begin) as u64 }
}
