//! What is held in registers, and nowhere else, across the move.
#![allow(unsafe_code, reason = "only assembly can hold a value in a register")]

use std::arch::asm;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, ensure};
use dunlin_tests::Skipped;
use nix::libc;

use crate::sys::{Mapping, PAGE, call};
use crate::world::{Random, Scenario, while_open};

/// Holds patterns in all general registers until `flag` is set; says whether
/// each is still there.
fn general(flag: &AtomicBool) -> bool {
    let changed: u64;
    // SAFETY: rbx and rbp are put back, all others declared; the red zone is
    // not ours, as `nostack` is not claimed.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            ".macro all do",
            "\\do rax, 0x1111222233334444",
            "\\do rbx, 0x2111222233334444",
            "\\do rcx, 0x3111222233334444",
            "\\do rdx, 0x4111222233334444",
            "\\do rsi, 0x5111222233334444",
            "\\do rdi, 0x6111222233334444",
            "\\do rbp, 0x7111222233334444",
            "\\do r8,  0x8111222233334444",
            "\\do r9,  0x9111222233334444",
            "\\do r10, 0xa111222233334444",
            "\\do r11, 0xb111222233334444",
            "\\do r12, 0xc111222233334444",
            "\\do r13, 0xd111222233334444",
            "\\do r14, 0xe111222233334444",
            ".endm",
            ".macro compare register, value",
            "mov r15, \\value",
            "cmp \\register, r15",
            "jne 3f",
            ".endm",
            "all movabs",
            "2:",
            "pause",
            "cmp byte ptr [r15], 0",
            "je 2b",
            "all compare",
            "xor eax, eax",
            "jmp 4f",
            "3:",
            "mov eax, 1",
            "4:",
            ".purgem all",
            ".purgem compare",
            "pop rbp",
            "pop rbx",
            inout("r15") flag.as_ptr() => _,
            out("rax") changed, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _,
            out("r14") _,
        );
    }
    changed == 0
}

/// The general registers.
pub(crate) fn registers_general() -> Result<Scenario> {
    let wait = |kept: &mut bool| Ok(*kept = while_open(|flag| Ok(general(flag)))?);
    let check = |kept: &mut bool| {
        ensure!(*kept, "a general register changed");
        Ok(())
    };
    Scenario::waiting(false, wait, check, |kept| Ok(*kept = false))
}

/// Vector registers of 64 bytes (or 32 and 16 of those), and mask registers.
#[repr(C, align(64))]
struct Vectors([u64; 8 * 32 + 8]);

impl Vectors {
    fn pattern() -> Box<Self> {
        let mut random = Random(21);
        Box::new(Self(std::array::from_fn(|_| random.word())))
    }
}

/// Holds `vectors` in zmm0-31 and k1-7 until `flag` is set, and puts there what is left.
#[target_feature(enable = "avx512f,avx512bw")]
fn avx512(flag: &AtomicBool, vectors: &mut Vectors) {
    // SAFETY: `vectors` is as large as all registers; all are declared.
    unsafe {
        asm!(
            ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "vmovdqu64 zmm\\n, [rsi + 64 * \\n]",
            ".endr",
            ".irp n,1,2,3,4,5,6,7",
            "kmovq k\\n, [rsi + 64 * 32 + 8 * \\n]",
            ".endr",
            "2:",
            "pause",
            "cmp byte ptr [rdi], 0",
            "je 2b",
            ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "vmovdqu64 [rsi + 64 * \\n], zmm\\n",
            ".endr",
            ".irp n,1,2,3,4,5,6,7",
            "kmovq [rsi + 64 * 32 + 8 * \\n], k\\n",
            ".endr",
            in("rdi") flag.as_ptr(), in("rsi") vectors.0.as_mut_ptr(),
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
            out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
            out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
            out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
            out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
            out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
            out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
            out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            out("k1") _, out("k2") _, out("k3") _, out("k4") _, out("k5") _, out("k6") _, out("k7") _,
        );
    }
}

/// Holds the first half of `vectors` in ymm0-15 until `flag` is set.
#[target_feature(enable = "avx")]
fn avx(flag: &AtomicBool, vectors: &mut Vectors) {
    // SAFETY: as above.
    unsafe {
        asm!(
            ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "vmovdqu ymm\\n, [rsi + 32 * \\n]",
            ".endr",
            "2:",
            "pause",
            "cmp byte ptr [rdi], 0",
            "je 2b",
            ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "vmovdqu [rsi + 32 * \\n], ymm\\n",
            ".endr",
            in("rdi") flag.as_ptr(), in("rsi") vectors.0.as_mut_ptr(),
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
            out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
        );
    }
}

fn vectors(wait: fn(&mut Box<Vectors>) -> Result<()>) -> Result<Scenario> {
    let check = |vectors: &mut Box<Vectors>| {
        let changed = vectors.0.iter().zip(Vectors::pattern().0).position(|(is, was)| *is != was);
        ensure!(changed.is_none(), "vector registers differ at word {changed:?}");
        Ok(())
    };
    Scenario::waiting(Vectors::pattern(), wait, check, |vectors| Ok(vectors.0[9] ^= 1))
}

/// The AVX registers.
pub(crate) fn registers_avx() -> Result<Scenario> {
    if !is_x86_feature_detected!("avx") {
        return Err(Skipped("AVX".into()).into());
    }
    vectors(|vectors| {
        while_open(|flag| {
            // SAFETY: this processor has AVX.
            Ok(unsafe { avx(flag, vectors) })
        })
    })
}

/// The AVX-512 registers.
pub(crate) fn registers_avx512() -> Result<Scenario> {
    if !is_x86_feature_detected!("avx512bw") {
        return Err(Skipped("AVX-512".into()).into());
    }
    vectors(|vectors| {
        while_open(|flag| {
            // SAFETY: this processor has AVX-512.
            Ok(unsafe { avx512(flag, vectors) })
        })
    })
}

/// Control words, status and three values of the x87, and MXCSR.
#[derive(Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct Float {
    control: u16,
    status: u16,
    mxcsr: u32,
    stack: [[u8; 10]; 3],
}

/// Computes with odd rounding, waits with the result on the register stack.
fn float(flag: &AtomicBool) -> Float {
    let mut float = Float { control: 0x0b7f, status: 0, mxcsr: 0x5fc0, stack: [[0; 10]; 3] };
    let normal = 0x1f80_u32;
    // SAFETY: `float` has room for what is stored; the state of the FPU is put
    // back to what the ABI wants.
    unsafe {
        asm!(
            "fninit",
            "fldcw word ptr [rsi]",
            "ldmxcsr dword ptr [rsi + 4]",
            "fldpi",
            "fldl2e",
            "fld1",
            "2:",
            "pause",
            "cmp byte ptr [rdi], 0",
            "je 2b",
            "fnstcw word ptr [rsi]",
            "fnstsw word ptr [rsi + 2]",
            "stmxcsr dword ptr [rsi + 4]",
            "fstp tbyte ptr [rsi + 8]",
            "fstp tbyte ptr [rsi + 18]",
            "fstp tbyte ptr [rsi + 28]",
            "fninit",
            "ldmxcsr dword ptr [rdx]",
            in("rdi") flag.as_ptr(), in("rsi") &raw mut float, in("rdx") &raw const normal,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    float
}

/// x87 and SSE state.
pub(crate) fn registers_float() -> Result<Scenario> {
    let wait = |float_state: &mut Float| Ok(*float_state = while_open(|flag| Ok(float(flag)))?);
    let check = |moved: &mut Float| {
        let here = float(&AtomicBool::new(true));
        ensure!(*moved == here, "{moved:x?} instead of {here:x?}");
        Ok(())
    };
    Scenario::waiting(Float::default(), wait, check, |float| Ok(float.stack[1][3] ^= 1))
}

const ARCH_SET_GS: usize = 0x1001;
const ARCH_GET_FS: usize = 0x1003;

/// The bases of FS, where thread-local storage is, and GS.
pub(crate) fn registers_segments() -> Result<Scenario> {
    let memory = Mapping::anonymous(PAGE)?;
    memory.fill(33);
    call(libc::SYS_arch_prctl, [ARCH_SET_GS, memory.addr, 0, 0, 0, 0])?;
    let check = |(memory, fs): &mut (Mapping, usize)| {
        let through: u64;
        // SAFETY: GS points to a page of ours, or the scenario fails with a fault.
        unsafe { asm!("mov {}, gs:[24]", out(reg) through) };
        let word = memory.bytes()[24..32].iter().rev();
        let word = word.fold(0, |word, byte| {
            word << 8 | u64::from(byte.load(std::sync::atomic::Ordering::SeqCst))
        });
        ensure!(through == word, "gs:[24] is {through:x}, not {word:x}");
        ensure!(*fs == fs_base()?, "FS was {fs:x} and is {:x}", fs_base()?);
        Ok(())
    };
    let spoil = |(memory, _): &mut (Mapping, usize)| {
        Ok(call(libc::SYS_arch_prctl, [ARCH_SET_GS, memory.addr + 8, 0, 0, 0, 0]).map(drop)?)
    };
    Scenario::new((memory, fs_base()?), check, spoil)
}

fn fs_base() -> Result<usize> {
    let mut base = 0_usize;
    call(libc::SYS_arch_prctl, [ARCH_GET_FS, &raw mut base as usize, 0, 0, 0, 0])?;
    Ok(base)
}
