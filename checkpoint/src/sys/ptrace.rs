//! `ptrace(2)` requests, seized tracees only (`PTRACE_SEIZE`, Linux 3.4).

use std::io;

use libc::{c_long, c_uint, c_void, user_regs_struct};
use nix::unistd::Pid;

use super::memory::ForcedMemory;

const PTRACE_GETSIGMASK: c_uint = 0x420a;
const PTRACE_SETSIGMASK: c_uint = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: c_uint = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: c_uint = 0x420d;
const PTRACE_GET_RSEQ_CONFIGURATION: c_uint = 0x420f;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: c_uint = 0x4211;
const NT_X86_XSTATE: usize = 0x202;
const PEEKSIGINFO_SHARED: u32 = 1;

/// Largest xsave area accepted, in bytes: AVX-512 and AMX need 11,008.
pub(crate) const MAX_XSTATE: usize = 16 << 10;
/// `sizeof(siginfo_t)`.
pub(crate) const SIGINFO_LEN: usize = 128;

/// What the death of the tracer means for the tracee.
#[derive(Clone, Copy)]
pub(crate) enum Seize {
    /// It runs on. Its seccomp filters are suspended while `suspend_seccomp`.
    Source { suspend_seccomp: bool },
    /// It dies too: nothing half-built survives. Its new tasks are born
    /// attached and stopped, whatever flags they are cloned with.
    Destination,
}

/// How a wait for a tracee ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Stopped by a signal that is about to be delivered.
    Signal(i32),
    /// A ptrace event, with the signal number the kernel reports beside it.
    Event { event: i32, signal: i32 },
    /// Gone: exited or killed.
    Gone,
}

fn request(req: c_uint, tid: Pid, addr: usize, data: usize) -> io::Result<c_long> {
    // SAFETY: every request issued through here takes integers, or pointers to
    // memory that the caller's wrapper borrows for the whole call.
    let ret = unsafe { libc::ptrace(req, tid.as_raw(), addr as *mut c_void, data as *mut c_void) };
    if ret == -1 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// Attaches without stopping (`PTRACE_SEIZE`).
pub(crate) fn seize(tid: Pid, how: Seize) -> io::Result<()> {
    let options = match how {
        Seize::Source { suspend_seccomp: true } => libc::PTRACE_O_SUSPEND_SECCOMP,
        Seize::Source { suspend_seccomp: false } => 0,
        Seize::Destination => {
            libc::PTRACE_O_EXITKILL
                | libc::PTRACE_O_SUSPEND_SECCOMP
                | libc::PTRACE_O_TRACECLONE
                | libc::PTRACE_O_TRACEFORK
                | libc::PTRACE_O_TRACEVFORK
        }
    };
    request(libc::PTRACE_SEIZE, tid, 0, usize::try_from(options).expect("small")).map(drop)
}

/// Asks for a stop (`PTRACE_INTERRUPT`); the tracee stops at its next return
/// to user mode, wherever it is blocked.
pub(crate) fn interrupt(tid: Pid) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Resumes a stopped tracee, suppressing the signal it stopped for.
pub(crate) fn cont(tid: Pid) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, 0).map(drop)
}

/// Resumes a stopped tracee and delivers `signal` to it.
pub(crate) fn cont_with(tid: Pid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, usize::try_from(signal).unwrap_or(0)).map(drop)
}

/// Resumes a stopped tracee up to the next entry to, or exit from, a syscall,
/// and delivers `signal` to it. Both are stops with SIGTRAP.
pub(crate) fn to_syscall(tid: Pid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, usize::try_from(signal).unwrap_or(0)).map(drop)
}

/// Detaches a stopped tracee.
pub(crate) fn detach(tid: Pid) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, 0).map(drop)
}

/// Whether a wait for `tid` would return at once.
pub(crate) fn has_status(tid: Pid) -> io::Result<bool> {
    // SAFETY: `siginfo_t` is plain data, for which zeros are valid; the call
    // only writes to it.
    let (ret, info) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let id = libc::id_t::try_from(tid.as_raw()).unwrap_or(0);
        let options = libc::WNOHANG | libc::WNOWAIT | libc::WSTOPPED | libc::WEXITED | libc::__WALL;
        (libc::waitid(libc::P_PID, id, &raw mut info, options), info)
    };
    if ret == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `waitid` fills this field, and leaves zero when nothing is ready.
    Ok(unsafe { info.si_pid() } != 0)
}

/// Waits until `tid` stops or ends.
pub(crate) fn wait(tid: Pid) -> io::Result<Stop> {
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call, which only writes to it.
        let ret = unsafe { libc::waitpid(tid.as_raw(), &raw mut status, libc::__WALL) };
        if ret == -1 {
            let err = io::Error::last_os_error();
            if err.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(err);
        }
        if !libc::WIFSTOPPED(status) {
            return Ok(Stop::Gone);
        }
        let signal = libc::WSTOPSIG(status);
        return Ok(match status >> 16 {
            0 => Stop::Signal(signal),
            event => Stop::Event { event, signal },
        });
    }
}

/// Waits until all of these killed tasks have ended.
///
/// In no order of ours: the last thread of a pid namespace's init ends only
/// when the tracer has seen the end of all others, and any may be the last.
pub(crate) fn reap(mut tids: Vec<Pid>) {
    while !tids.is_empty() {
        let left = tids.len();
        tids.retain(|tid| !has_ended(*tid));
        if tids.len() == left {
            std::thread::yield_now();
        }
    }
}

/// Collects `tid` if it has ended; a stop it reports on the way is passed over.
pub(crate) fn has_ended(tid: Pid) -> bool {
    loop {
        let mut status = 0;
        let options = libc::__WALL | libc::WNOHANG;
        // SAFETY: `status` outlives the call, which only writes to it.
        match unsafe { libc::waitpid(tid.as_raw(), &raw mut status, options) } {
            0 => return false,
            // No task of ours any more.
            -1 => return true,
            _ if libc::WIFSTOPPED(status) => {}
            _ => return true,
        }
    }
}

/// The new task that a fork or clone event announces.
pub(crate) fn event_pid(tid: Pid) -> io::Result<Pid> {
    let mut message: libc::c_ulong = 0;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize)?;
    i32::try_from(message).map(Pid::from_raw).map_err(io::Error::other)
}

/// Reads the general registers.
pub(crate) fn registers(tid: Pid) -> io::Result<user_regs_struct> {
    // SAFETY: `user_regs_struct` is plain integers, for which zeros are valid.
    let mut regs: user_regs_struct = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, tid, 0, &raw mut regs as usize)?;
    Ok(regs)
}

/// Writes the general registers.
pub(crate) fn set_registers(tid: Pid, regs: &user_regs_struct) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, tid, 0, std::ptr::from_ref(regs) as usize).map(drop)
}

/// Reads the extended state in xsave format (`NT_X86_XSTATE`).
pub(crate) fn xstate(tid: Pid) -> io::Result<Vec<u8>> {
    let mut buf = vec![0_u8; MAX_XSTATE];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize)?;
    buf.truncate(iov.iov_len);
    Ok(buf)
}

/// Writes the extended state.
pub(crate) fn set_xstate(tid: Pid, state: &[u8]) -> io::Result<()> {
    let mut iov = libc::iovec { iov_base: state.as_ptr().cast_mut().cast(), iov_len: state.len() };
    request(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize).map(drop)
}

/// The mask of blocked signals, bit `n - 1` for signal `n`.
pub(crate) fn signal_mask(tid: Pid) -> io::Result<u64> {
    let mut mask: u64 = 0;
    request(PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// Replaces the mask of blocked signals.
pub(crate) fn set_signal_mask(tid: Pid, mask: u64) -> io::Result<()> {
    request(PTRACE_SETSIGMASK, tid, 8, &raw const mask as usize).map(drop)
}

/// The `si_code` of the signal the tracee stopped for.
pub(crate) fn stop_code(tid: Pid) -> io::Result<i32> {
    let mut raw = [0_i32; SIGINFO_LEN / 4];
    request(libc::PTRACE_GETSIGINFO, tid, 0, raw.as_mut_ptr() as usize)?;
    Ok(raw[2])
}

/// Copies the queued signals (`PTRACE_PEEKSIGINFO`) of the process (`shared`)
/// or of the thread alone, in order, each a raw `siginfo_t`.
pub(crate) fn queued_signals(tid: Pid, shared: bool) -> io::Result<Vec<[u8; SIGINFO_LEN]>> {
    #[repr(C)]
    struct Args {
        off: u64,
        flags: u32,
        nr: i32,
    }
    const BATCH: usize = 32;
    let mut all = Vec::new();
    loop {
        let flags = if shared { PEEKSIGINFO_SHARED } else { 0 };
        let args = Args { off: all.len() as u64, flags, nr: 32 };
        let mut buf = [[0_u8; SIGINFO_LEN]; BATCH];
        let at = &raw const args as usize;
        let n = request(libc::PTRACE_PEEKSIGINFO, tid, at, buf.as_mut_ptr() as usize)?;
        let n = usize::try_from(n).unwrap_or(0).min(BATCH);
        all.extend_from_slice(&buf[..n]);
        if n < BATCH {
            return Ok(all);
        }
    }
}

/// Registration of restartable sequences (`rseq(2)`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Rseq {
    /// Address of the registered area, 0 when there is none.
    pub(crate) area: u64,
    /// Its size in bytes.
    pub(crate) size: u32,
    /// Signature in front of abort handlers.
    pub(crate) signature: u32,
    /// Flags of the registration.
    pub(crate) flags: u32,
    pad: u32,
}
const _: () = assert!(size_of::<Rseq>() == 24);

/// Reads the rseq registration (Linux 5.13).
pub(crate) fn rseq(tid: Pid) -> io::Result<Rseq> {
    let mut conf = Rseq::default();
    request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size_of::<Rseq>(), &raw mut conf as usize)?;
    Ok(conf)
}

/// Whether syscall user dispatch (`prctl(2)`) is on. The request is known from
/// Linux 6.4 on.
pub(crate) fn has_user_dispatch(tid: Pid) -> io::Result<bool> {
    let mut conf = [0_u64; 4];
    let at = conf.as_mut_ptr() as usize;
    request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size_of_val(&conf), at)?;
    Ok(conf[0] != 0)
}

/// Reads seccomp filter `index`, oldest first (`ptrace(2)` has it the other
/// way round): its BPF program, 8 bytes an instruction, and its flags. `None`
/// past the last one.
pub(crate) fn seccomp_filter(tid: Pid, index: usize) -> io::Result<Option<(Vec<u8>, u64)>> {
    let n = match request(PTRACE_SECCOMP_GET_FILTER, tid, index, 0) {
        Ok(n) => usize::try_from(n).unwrap_or(0),
        Err(err) if err.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        Err(err) => return Err(err),
    };
    let mut program = vec![0_u8; n * 8];
    request(PTRACE_SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr() as usize)?;
    let mut meta = [index as u64, 0_u64];
    request(PTRACE_SECCOMP_GET_METADATA, tid, 16, meta.as_mut_ptr() as usize)?;
    Ok(Some((program, meta[1])))
}

/// Writes `bytes` at `addr` whatever the page's protection; a private page is
/// copied first. Whole words: `bytes` is padded with zeros.
pub(crate) fn poke(tid: Pid, addr: u64, bytes: &[u8]) -> io::Result<()> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    // One call in place of one a word (`PTRACE_POKEDATA`), unless the kernel was
    // told not to (`proc_mem.force_override=never`, Linux 6.12).
    if ForcedMemory::open(tid).and_then(|memory| memory.write(&bytes, addr)).is_ok() {
        return Ok(());
    }
    for (i, chunk) in bytes.chunks(8).enumerate() {
        let word = u64::from_le_bytes(chunk.try_into().expect("whole words"));
        let (addr, word) = (usize::try_from(addr), usize::try_from(word));
        let (addr, word) = (addr.expect("x86-64") + i * 8, word.expect("x86-64"));
        request(libc::PTRACE_POKEDATA, tid, addr, word)?;
    }
    Ok(())
}
