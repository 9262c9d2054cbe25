//! System calls that only the self-checking programs make.
#![allow(unsafe_code, reason = "the programs set up worlds that no safe wrapper offers")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::Signal;
use nix::unistd::ForkResult;

use crate::world::Random;

/// A page.
pub(crate) const PAGE: usize = 4096;

/// Turns the C convention for failure into an error.
pub(crate) fn checked<T: Copy + PartialEq + From<i8>>(value: T) -> io::Result<T> {
    if value == T::from(-1) { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Any system call whose arguments are plain numbers.
pub(crate) fn call(number: i64, args: [usize; 6]) -> io::Result<usize> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the caller passes numbers, or addresses of memory that it owns
    // and that is as large as the call wants.
    let value = checked(unsafe { libc::syscall(number, a, b, c, d, e, f) })?;
    usize::try_from(value).map_err(io::Error::other)
}

/// `fork(2)`.
pub(crate) fn fork() -> Result<ForkResult> {
    // SAFETY: the scenarios that fork have one thread.
    Ok(unsafe { nix::unistd::fork() }?)
}

/// `_exit(2)`: nothing of the parent's is run.
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: it does not return.
    unsafe { libc::_exit(code) }
}

/// Has `handler` called on `signal`, with further `SA_` flags.
pub(crate) fn handle(signal: Signal, handler: extern "C" fn(i32), flags: i32) -> Result<()> {
    // SAFETY: all-zero is a valid `sigaction` (no flags, empty mask).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = flags;
    // SAFETY: our handlers only touch atomics and make async-signal-safe calls.
    checked(unsafe { libc::sigaction(signal as i32, &raw const action, std::ptr::null_mut()) })?;
    Ok(())
}

/// Memory of ours that is never unmapped as a whole.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mapping {
    /// Where it begins.
    pub(crate) addr: usize,
    /// Its bytes.
    pub(crate) len: usize,
}

impl Mapping {
    /// Maps `len` bytes of `file`, or of anonymous memory.
    pub(crate) fn new(
        len: usize,
        prot: ProtFlags,
        flags: MapFlags,
        file: Option<(BorrowedFd<'_>, i64)>,
    ) -> Result<Self> {
        let (fd, offset) = file.map_or((-1, 0), |(fd, offset)| (fd.as_raw_fd(), offset));
        let flags =
            flags | if file.is_none() { MapFlags::MAP_ANONYMOUS } else { MapFlags::empty() };
        // SAFETY: without an address the kernel takes a free place.
        let addr =
            unsafe { libc::mmap(std::ptr::null_mut(), len, prot.bits(), flags.bits(), fd, offset) };
        ensure!(addr != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        Ok(Self { addr: addr as usize, len })
    }

    /// Private anonymous memory that can be written.
    pub(crate) fn anonymous(len: usize) -> Result<Self> {
        Self::new(len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE, None)
    }

    /// Anonymous memory that children share.
    pub(crate) fn shared(len: usize) -> Result<Self> {
        Self::new(len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, None)
    }

    /// A part of it.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len);
        Self { addr: self.addr + range.start, len: range.end - range.start }
    }

    /// A page of it.
    pub(crate) fn page(self, n: usize) -> Self {
        self.part(n * PAGE..(n + 1) * PAGE)
    }

    /// Its content, which must be accessible.
    pub(crate) fn bytes(self) -> &'static [AtomicU8] {
        // SAFETY: mapped for good; atomics may be shared with anyone.
        unsafe { std::slice::from_raw_parts(self.addr as *const AtomicU8, self.len) }
    }

    /// Writes the pattern of `seed`.
    pub(crate) fn fill(self, seed: u64) {
        let mut random = Random(seed);
        for byte in self.bytes() {
            byte.store(random.byte(), Ordering::Relaxed);
        }
    }

    /// Wants the pattern of `seed`.
    pub(crate) fn verify(self, seed: u64) -> Result<()> {
        let mut random = Random(seed);
        let wrong =
            self.bytes().iter().position(|byte| byte.load(Ordering::Relaxed) != random.byte());
        ensure!(
            wrong.is_none(),
            "memory at {:x} differs from pattern {seed} at byte {wrong:?}",
            self.addr
        );
        Ok(())
    }

    /// Wants nothing but zeros.
    pub(crate) fn verify_zero(self) -> Result<()> {
        let wrong = self.bytes().iter().position(|byte| byte.load(Ordering::Relaxed) != 0);
        ensure!(wrong.is_none(), "memory at {:x} is not zero at byte {wrong:?}", self.addr);
        Ok(())
    }

    /// `mprotect(2)`.
    pub(crate) fn protect(self, prot: ProtFlags) -> Result<()> {
        // SAFETY: the caller touches it as `prot` allows.
        checked(unsafe { libc::mprotect(self.addr as *mut _, self.len, prot.bits()) })
            .context("mprotect")?;
        Ok(())
    }

    /// `madvise(2)`.
    pub(crate) fn advise(self, advice: i32) -> io::Result<()> {
        // SAFETY: what it drops is read as zeros.
        checked(unsafe { libc::madvise(self.addr as *mut _, self.len, advice) }).map(drop)
    }

    /// Calls the machine code in it, a function without arguments.
    pub(crate) fn execute(self) -> u64 {
        // SAFETY: the caller put a whole function there.
        let function: extern "sysv64" fn() -> u64 = unsafe { std::mem::transmute(self.addr) };
        function()
    }
}

/// A signal stack: address, flags, size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AltStack(pub(crate) usize, pub(crate) i32, pub(crate) usize);

/// The signal stack of this thread.
pub(crate) fn altstack() -> Result<AltStack> {
    // SAFETY: all-zero is a valid `stack_t`.
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: only reads the current one, into `stack`.
    checked(unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) })?;
    Ok(AltStack(stack.ss_sp as usize, stack.ss_flags, stack.ss_size))
}

/// Where this thread's list of robust futexes begins.
pub(crate) fn robust_list() -> Result<usize> {
    let (mut head, mut len) = (0_usize, 0_usize);
    call(libc::SYS_get_robust_list, [0, &raw mut head as usize, &raw mut len as usize, 0, 0, 0])?;
    Ok(head)
}

/// Puts a robust mutex for several processes at the start of `memory`.
pub(crate) fn robust_mutex(memory: Mapping) -> Result<()> {
    // SAFETY: all-zero is what `init` overwrites; the mapping is large enough
    // for a mutex and stays.
    let failed = unsafe {
        let mut attr: libc::pthread_mutexattr_t = std::mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut attr)
            | libc::pthread_mutexattr_setpshared(&raw mut attr, libc::PTHREAD_PROCESS_SHARED)
            | libc::pthread_mutexattr_setrobust(&raw mut attr, libc::PTHREAD_MUTEX_ROBUST)
            | libc::pthread_mutex_init(memory.addr as *mut _, &raw const attr)
    };
    ensure!(failed == 0, "no robust mutex");
    Ok(())
}

/// Locks it if it is free: 0 or an `errno`.
pub(crate) fn robust_lock(memory: Mapping) -> i32 {
    // SAFETY: `robust_mutex` put one there.
    unsafe { libc::pthread_mutex_trylock(memory.addr as *mut _) }
}
