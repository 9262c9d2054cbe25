//! System calls that only the self-checking programs make.
#![allow(unsafe_code, reason = "the programs set up worlds that no safe wrapper offers")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

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

    /// The same as 32-bit words.
    pub(crate) fn words(self) -> &'static [AtomicU32] {
        // SAFETY: as above; a mapping's pages are aligned.
        unsafe { std::slice::from_raw_parts(self.addr as *const AtomicU32, self.len / 4) }
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

/// Gives this thread a signal stack.
pub(crate) fn set_altstack(memory: Mapping) -> Result<()> {
    let stack = libc::stack_t { ss_sp: memory.addr as *mut _, ss_flags: 0, ss_size: memory.len };
    // SAFETY: the mapping stays.
    checked(unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) })?;
    Ok(())
}

/// What came with a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Info {
    pub(crate) signal: i32,
    pub(crate) code: i32,
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    pub(crate) value: i32,
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: all-zero is the empty set; `sigaddset` only writes to it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        set
    }
}

/// Blocks signals, real-time ones too, in this thread.
pub(crate) fn block(signals: &[i32]) -> Result<()> {
    let set = set_of(signals);
    // SAFETY: only reads `set`.
    let failed =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    ensure!(failed == 0, "cannot block {signals:?}");
    Ok(())
}

/// Takes `signal` from the pending ones, if it is there.
pub(crate) fn take(signal: i32) -> Result<Info> {
    wait_signal(signal, Some(0))
}

/// Waits for a blocked signal, so many seconds or for ever.
pub(crate) fn wait_signal(signal: i32, seconds: Option<i64>) -> Result<Info> {
    let set = set_of(&[signal]);
    let timeout = [seconds.unwrap_or_default(), 0];
    let timeout = seconds.map_or(0, |_| timeout.as_ptr() as usize);
    // SAFETY: all-zero is a valid `siginfo_t`, which the call overwrites.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // Not glibc's: that disguises SI_TKILL.
    let (set, out) = (&raw const set as usize, &raw mut info as usize);
    call(libc::SYS_rt_sigtimedwait, [set, out, timeout, 8, 0, 0])?;
    // SAFETY: for the signals we send these fields lie where the accessors look.
    let (pid, uid, value) = unsafe { (info.si_pid(), info.si_uid(), info.si_value()) };
    let value = match info.si_code {
        libc::SI_USER | libc::SI_TKILL => 0,
        // SAFETY: as above.
        libc::CLD_EXITED => unsafe { info.si_status() },
        _ => i32::try_from(value.sival_ptr as usize & 0xffff)?,
    };
    Ok(Info { signal: info.si_signo, code: info.si_code, pid, uid, value })
}

/// Queues `signal` with `value` to this process.
pub(crate) fn queue(signal: i32, value: usize) -> Result<()> {
    let value = libc::sigval { sival_ptr: value as *mut _ };
    // SAFETY: no memory is passed, only a number of its size.
    checked(unsafe { libc::sigqueue(libc::getpid(), signal, value) })?;
    Ok(())
}

/// Sends `signal` to this thread alone.
pub(crate) fn tgkill(signal: i32) -> Result<()> {
    let (pid, tid) = (nix::unistd::getpid(), nix::unistd::gettid());
    interrupt(pid.as_raw(), tid.as_raw(), signal)
}

/// Sends `signal` to one thread.
pub(crate) fn interrupt(pid: i32, tid: i32, signal: i32) -> Result<()> {
    let [pid, tid, signal] = [pid, tid, signal].map(usize::try_from);
    call(libc::SYS_tgkill, [pid?, tid?, signal?, 0, 0, 0])?;
    Ok(())
}

/// Ignores `signal`.
pub(crate) fn ignore(signal: Signal) -> Result<()> {
    let ignore = nix::sys::signal::SigHandler::SigIgn;
    // SAFETY: no handler of ours is involved.
    unsafe { nix::sys::signal::signal(signal, ignore) }?;
    Ok(())
}

/// Handler, flags, restorer and mask of every signal, as the kernel keeps them.
pub(crate) fn actions() -> Result<Vec<[usize; 4]>> {
    let read = |signal| {
        let mut action = [0_usize; 4];
        call(libc::SYS_rt_sigaction, [signal, 0, action.as_mut_ptr() as usize, 8, 0, 0])?;
        Ok(action)
    };
    (1..=64).map(read).collect()
}

/// Interval and value of a timer: seconds, and micro- or nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TimerSpec {
    pub(crate) interval: (i64, i64),
    pub(crate) value: (i64, i64),
}

/// Sets an interval timer of the process.
pub(crate) fn setitimer(which: i32, TimerSpec { interval, value }: TimerSpec) -> Result<()> {
    let spec = [interval.0, interval.1, value.0, value.1];
    call(libc::SYS_setitimer, [usize::try_from(which)?, spec.as_ptr() as usize, 0, 0, 0, 0])?;
    Ok(())
}

/// What is left of an interval timer.
pub(crate) fn getitimer(which: i32) -> Result<TimerSpec> {
    let mut spec = [0; 4];
    call(libc::SYS_getitimer, [usize::try_from(which)?, spec.as_mut_ptr() as usize, 0, 0, 0, 0])?;
    let [a, b, c, d] = spec;
    Ok(TimerSpec { interval: (a, b), value: (c, d) })
}

/// Makes a POSIX timer; `thread` is told if `notify` says so.
pub(crate) fn timer_create(
    clock: i32,
    notify: i32,
    signal: i32,
    value: usize,
    thread: i32,
) -> Result<i32> {
    // SAFETY: all-zero is a valid `sigevent`.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = notify;
    event.sigev_signo = signal;
    event.sigev_value.sival_ptr = value as *mut _;
    event.sigev_notify_thread_id = thread;
    let mut id = 0_i32;
    let clock = usize::try_from(clock)?;
    let (event, out) = (&raw const event as usize, &raw mut id as usize);
    call(libc::SYS_timer_create, [clock, event, out, 0, 0, 0])?;
    Ok(id)
}

/// Sets a POSIX timer.
pub(crate) fn timer_settime(id: i32, TimerSpec { interval, value }: TimerSpec) -> Result<()> {
    let spec = [interval.0, interval.1, value.0, value.1];
    call(libc::SYS_timer_settime, [usize::try_from(id)?, 0, spec.as_ptr() as usize, 0, 0, 0])?;
    Ok(())
}

/// What is left of a POSIX timer.
pub(crate) fn timer_gettime(id: i32) -> Result<TimerSpec> {
    let mut spec = [0; 4];
    call(libc::SYS_timer_gettime, [usize::try_from(id)?, spec.as_mut_ptr() as usize, 0, 0, 0, 0])?;
    let [a, b, c, d] = spec;
    Ok(TimerSpec { interval: (a, b), value: (c, d) })
}

/// How often a POSIX timer expired beyond the last signal taken.
pub(crate) fn timer_getoverrun(id: i32) -> Result<usize> {
    Ok(call(libc::SYS_timer_getoverrun, [usize::try_from(id)?, 0, 0, 0, 0, 0])?)
}

/// Ends a POSIX timer.
pub(crate) fn timer_delete(id: i32) -> Result<()> {
    call(libc::SYS_timer_delete, [usize::try_from(id)?, 0, 0, 0, 0, 0])?;
    Ok(())
}

/// Whether `signal` waits to be delivered.
pub(crate) fn is_pending(signal: i32) -> Result<bool> {
    let mut set = set_of(&[]);
    // SAFETY: `sigpending` writes to `set`, `sigismember` reads it.
    let member = unsafe {
        checked(libc::sigpending(&raw mut set))?;
        libc::sigismember(&raw const set, signal)
    };
    Ok(member == 1)
}

/// `prctl(2)`.
pub(crate) fn prctl(option: i32, [a, b, c]: [usize; 3]) -> Result<usize> {
    let number = usize::try_from(option)?;
    call(libc::SYS_prctl, [number, a, b, c, 0, 0]).with_context(|| format!("prctl {option}"))
}

/// The sets of capabilities that `capset(2)` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capabilities {
    pub(crate) effective: u64,
    pub(crate) permitted: u64,
    pub(crate) inheritable: u64,
}

/// `_LINUX_CAPABILITY_VERSION_3`, and 0 for this thread.
const CAPABILITIES_V3: [u32; 2] = [0x2008_0522, 0];

impl Capabilities {
    /// Those of this thread.
    pub(crate) fn get() -> Result<Self> {
        let mut words = [0_u32; 6];
        let header = CAPABILITIES_V3;
        let args = [header.as_ptr() as usize, words.as_mut_ptr() as usize, 0, 0, 0, 0];
        call(libc::SYS_capget, args)?;
        let wide = |n: usize| u64::from(words[n]) | u64::from(words[n + 3]) << 32;
        Ok(Self { effective: wide(0), permitted: wide(1), inheritable: wide(2) })
    }

    /// Gives them to this thread.
    pub(crate) fn set(self) -> Result<()> {
        let wide = [self.effective, self.permitted, self.inheritable];
        let low = wide.map(|word| word & 0xffff_ffff);
        let high = wide.map(|word| word >> 32);
        let words = [low, high].concat().into_iter().map(u32::try_from);
        let words = words.collect::<Result<Vec<_>, _>>()?;
        let header = CAPABILITIES_V3;
        let args = [header.as_ptr() as usize, words.as_ptr() as usize, 0, 0, 0, 0];
        call(libc::SYS_capset, args).context("capset")?;
        Ok(())
    }
}

/// Installs a seccomp filter that answers these calls with `error`.
pub(crate) fn refuse(numbers: &[i64], error: u32, flags: u64) -> Result<()> {
    let instruction = |code: u32, jt: usize, k: u32| -> Result<libc::sock_filter> {
        Ok(libc::sock_filter { code: u16::try_from(code)?, jt: u8::try_from(jt)?, jf: 0, k })
    };
    // The number is the first word of what a filter sees.
    let mut program = vec![instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)?];
    for (n, number) in numbers.iter().enumerate() {
        let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        program.push(instruction(equal, numbers.len() - n, u32::try_from(*number)?)?);
    }
    let answer = libc::BPF_RET | libc::BPF_K;
    program.push(instruction(answer, 0, libc::SECCOMP_RET_ALLOW)?);
    program.push(instruction(answer, 0, libc::SECCOMP_RET_ERRNO | error)?);
    let len = u16::try_from(program.len())?;
    let program = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    let mode = usize::try_from(libc::SECCOMP_SET_MODE_FILTER)?;
    let flags = usize::try_from(flags)?;
    call(libc::SYS_seccomp, [mode, flags, &raw const program as usize, 0, 0, 0])
        .context("seccomp")?;
    Ok(())
}
