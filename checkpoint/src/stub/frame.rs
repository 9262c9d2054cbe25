//! Ways back for a target whose engine died: a signal frame for
//! `rt_sigreturn(2)`, and a trampoline that needs no writable memory.

use libc::user_regs_struct;

const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// `UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS`.
const UC_FLAGS: u64 = 7;
/// Bytes of `struct rt_sigframe` rounded up to the alignment of xsave.
const FRAME: usize = 448;
/// Component bits of the AMX tiles.
const AMX: u64 = 0b11 << 17;
/// Where the AMX components begin in an xsave area.
const AMX_OFFSET: usize = 2752;

/// Bytes reserved for a frame.
pub(super) const LEN: usize = FRAME + crate::sys::ptrace::MAX_XSTATE + 64;

/// Lays out a frame for the 64-byte aligned address `base`: a sigreturn with
/// `rsp = base + 8` resumes `regs` with `mask` and the extended state.
pub(super) fn encode(base: u64, regs: &user_regs_struct, mask: u64, xstate: &[u8]) -> Vec<u8> {
    let mut out = vec![0_u8; FRAME];
    let mut put = |at: usize, value: u64| out[at..at + 8].copy_from_slice(&value.to_le_bytes());
    let uc = 8;
    put(uc, UC_FLAGS);
    // An invalid flag: the kernel ignores the failing sigaltstack, which thereby
    // stays as it is.
    put(uc + 24, 0x7fff_0000);
    let gprs = [
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rdi,
        regs.rsi,
        regs.rbp,
        regs.rbx,
        regs.rdx,
        regs.rax,
        regs.rcx,
        regs.rsp,
        regs.rip,
        regs.eflags,
    ];
    for (i, value) in gprs.into_iter().enumerate() {
        put(uc + 40 + i * 8, value);
    }
    put(uc + 184, regs.cs | regs.ss << 48);
    put(uc + 224, base + FRAME as u64);
    put(uc + 296, mask);
    out.extend_from_slice(&fpstate(xstate));
    out
}

/// An xsave area as the kernel wants it in a signal frame.
fn fpstate(xstate: &[u8]) -> Vec<u8> {
    let used = u64::from_le_bytes(xstate[512..520].try_into().expect("eight bytes"));
    // A task that never asked for AMX has a smaller area, and a frame larger
    // than that is restored without its AVX half.
    let len = if used & AMX == 0 { xstate.len().min(AMX_OFFSET) } else { xstate.len() };
    let mut out = xstate[..len].to_vec();
    let size = u32::try_from(len).expect("at most MAX_XSTATE");
    // fx_sw_reserved, at 464: magic, size with the magic behind, features, size.
    // The kernel wrote its feature mask there.
    let features = u64::from_le_bytes(out[464..472].try_into().expect("eight bytes"));
    let features = if used & AMX == 0 { features & !AMX } else { features };
    out[464..468].copy_from_slice(&FP_XSTATE_MAGIC1.to_le_bytes());
    out[468..472].copy_from_slice(&(size + 4).to_le_bytes());
    out[472..480].copy_from_slice(&features.to_le_bytes());
    out[480..484].copy_from_slice(&size.to_le_bytes());
    out.extend_from_slice(&FP_XSTATE_MAGIC2.to_le_bytes());
    out
}

/// Bytes reserved for a trampoline.
pub(super) const TRAMPOLINE: usize = 256;

/// Machine code that executes the syscall laid out in the registers, keeps what
/// it returned in rbx and tells of it by sending `told` to its own thread `ids`
/// (group, thread): a stop for a living tracer, nothing without one. Then it puts
/// `mask` and `regs` back and jumps to where they point: one syscall executed on
/// loan, with no memory but this code. In between it takes back the SIGTRAP that
/// the kernel sends when a tracer dies at a stop before or behind a syscall; all
/// signals are blocked so far.
/// Flags survive because `syscall` restores them from r11 and nothing in between
/// computes: an `xor` to make a zero would be seen by a program that was about
/// to branch.
pub(super) fn trampoline(
    regs: &user_regs_struct,
    mask: u64,
    ids: (i32, i32),
    told: i32,
) -> Vec<u8> {
    let mut code = vec![
        0x0f, 0x05, // syscall
        0x48, 0x89, 0xc3, // mov rbx, rax
        0xb8, 234, 0, 0, 0, // mov eax, tgkill
    ];
    for (mov_imm32, value) in [(0xbf, ids.0), (0xbe, ids.1), (0xba, told)] {
        code.push(mov_imm32); // mov edi, esi, edx
        code.extend_from_slice(&value.to_le_bytes());
    }
    code.extend_from_slice(&[
        0x0f, 0x05, // syscall
        0xb8, 128, 0, 0, 0, // mov eax, rt_sigtimedwait
        0xbe, 0, 0, 0, 0, // mov esi, NULL
        0x41, 0xba, 8, 0, 0, 0, // mov r10d, sizeof(set)
    ]);
    code.extend_from_slice(&[0x48, 0x8d, 0x3d]); // lea rdi, [rip + set]
    relative(&mut code, MASK + 16);
    code.extend_from_slice(&[0x48, 0x8d, 0x15]); // lea rdx, [rip + no time]
    relative(&mut code, MASK + 24);
    code.extend_from_slice(&[
        0x0f, 0x05, // syscall
        0xb8, 14, 0, 0, 0, // mov eax, rt_sigprocmask
        0xbf, 2, 0, 0, 0, // mov edi, SIG_SETMASK
        0xba, 0, 0, 0, 0, // mov edx, NULL
        0x41, 0xba, 8, 0, 0, 0, // mov r10d, sizeof(mask)
    ]);
    code.extend_from_slice(&[0x48, 0x8d, 0x35]); // lea rsi, [rip + mask]
    relative(&mut code, MASK);
    code.extend_from_slice(&[0x0f, 0x05]); // syscall
    let moves = [
        ([0x48, 0xb8], regs.rax),
        ([0x48, 0xbb], regs.rbx),
        ([0x48, 0xbf], regs.rdi),
        ([0x48, 0xbe], regs.rsi),
        ([0x48, 0xba], regs.rdx),
        ([0x49, 0xba], regs.r10),
        ([0x49, 0xb8], regs.r8),
        ([0x49, 0xb9], regs.r9),
        ([0x48, 0xb9], regs.rcx),
        ([0x49, 0xbb], regs.r11),
    ];
    for (mov_imm64, value) in moves {
        code.extend_from_slice(&mov_imm64);
        code.extend_from_slice(&value.to_le_bytes());
    }
    code.extend_from_slice(&[0xff, 0x25]); // jmp [rip + target]
    relative(&mut code, MASK + 8);
    debug_assert!(code.len() <= MASK, "the trampoline has grown out of its room");
    code.resize(MASK, 0xcc);
    code.extend_from_slice(&mask.to_le_bytes());
    code.extend_from_slice(&regs.rip.to_le_bytes());
    code.extend_from_slice(&SIGTRAP.to_le_bytes());
    code.extend_from_slice(&[0; 16]); // no time
    code
}

/// Where the trampoline keeps the mask; the address to jump to follows, the set
/// that holds SIGTRAP, and a timeout of zero.
const MASK: usize = TRAMPOLINE - 40;

/// A set with nothing but SIGTRAP in it.
pub(super) const SIGTRAP: u64 = 1 << (libc::SIGTRAP - 1);

/// Appends the distance from the end of the four bytes to offset `to`.
fn relative(code: &mut Vec<u8>, to: usize) {
    let distance = u32::try_from(to - (code.len() + 4)).expect("the data lies behind");
    code.extend_from_slice(&distance.to_le_bytes());
}
