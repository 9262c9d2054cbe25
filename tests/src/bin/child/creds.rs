//! Who a process is and what it may do.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, getgroups, getresgid, getresuid, setgroups, setresgid, setresuid};

use crate::sys::{self, Capabilities, call, prctl};
use crate::world::Scenario;

/// A scenario that reads something twice and wants the same.
fn unchanged<T: PartialEq + std::fmt::Debug + 'static>(
    read: fn() -> Result<T>,
    spoil: fn() -> Result<()>,
) -> Result<Scenario> {
    type State<T> = (fn() -> Result<T>, fn() -> Result<()>, T);
    let check = |(read, _, before): &mut State<T>| {
        let after = read()?;
        ensure!(*before == after, "{before:?} became {after:?}");
        Ok(())
    };
    Scenario::new((read, spoil, read()?), check, |(_, spoil, _): &mut State<T>| spoil())
}

/// Real, effective, saved and file system ids, and groups.
pub(crate) fn creds_ids() -> Result<Scenario> {
    let [g1, g2, g3] = [11, 12, 13].map(Gid::from_raw);
    let [u1, u2, u3] = [1001, 1002, 1003].map(Uid::from_raw);
    setgroups(&[700, 5, 6].map(Gid::from_raw))?;
    setresgid(g1, g2, g3)?;
    call(libc::SYS_setfsgid, [14, 0, 0, 0, 0, 0])?;
    setresuid(u1, u2, u3)?;
    call(libc::SYS_setfsuid, [1001, 0, 0, 0, 0, 0])?;
    let read = || {
        let (user, group) = (getresuid()?, getresgid()?);
        let [uid, gid] = [libc::SYS_setfsuid, libc::SYS_setfsgid];
        // An impossible id changes nothing and gives the present one.
        let [uid, gid] = [uid, gid].map(|number| call(number, [0xffff_fffe, 0, 0, 0, 0, 0]));
        Ok((user, group, getgroups()?, uid?, gid?))
    };
    unchanged(read, || {
        let uid = Uid::from_raw(1003);
        Ok(setresuid(uid, uid, uid)?)
    })
}

fn capabilities() -> Result<(Capabilities, Vec<usize>, Vec<usize>, usize)> {
    let bounding = (0..41).map(|cap| prctl(libc::PR_CAPBSET_READ, [cap, 0, 0]));
    let ambient = (0..41).map(|cap| {
        prctl(libc::PR_CAP_AMBIENT, [usize::try_from(libc::PR_CAP_AMBIENT_IS_SET)?, cap, 0])
    });
    let secure = prctl(libc::PR_GET_SECUREBITS, [0; 3])?;
    Ok((
        Capabilities::get()?,
        bounding.collect::<Result<_>>()?,
        ambient.collect::<Result<_>>()?,
        secure,
    ))
}

/// All five sets of capabilities, and the secure bits.
pub(crate) fn creds_capabilities() -> Result<Scenario> {
    const KILL: u64 = 1 << 5;
    const NET_BIND_SERVICE: u64 = 1 << 10;
    const SYS_RAWIO: u64 = 1 << 17;
    const SYS_TIME: u64 = 1 << 25;
    for dropped in [16, 22] {
        prctl(libc::PR_CAPBSET_DROP, [dropped, 0, 0])?;
    }
    let all = Capabilities::get()?;
    Capabilities {
        effective: all.effective & !(SYS_RAWIO | SYS_TIME),
        permitted: all.permitted & !SYS_RAWIO,
        inheritable: KILL | NET_BIND_SERVICE,
    }
    .set()?;
    prctl(libc::PR_CAP_AMBIENT, [usize::try_from(libc::PR_CAP_AMBIENT_RAISE)?, 10, 0])?;
    // SECBIT_NO_SETUID_FIXUP and SECBIT_KEEP_CAPS.
    prctl(libc::PR_SET_SECUREBITS, [0b1_0100, 0, 0])?;
    unchanged(capabilities, || {
        let held = Capabilities::get()?;
        Capabilities { inheritable: KILL, ..held }.set()
    })
}

/// What `prctl` sets and gets again.
const SWITCHES: [(i32, i32, usize); 7] = [
    (libc::PR_SET_NO_NEW_PRIVS, libc::PR_GET_NO_NEW_PRIVS, 1),
    (libc::PR_SET_DUMPABLE, libc::PR_GET_DUMPABLE, 0),
    (libc::PR_SET_KEEPCAPS, libc::PR_GET_KEEPCAPS, 1),
    (libc::PR_SET_TIMERSLACK, libc::PR_GET_TIMERSLACK, 123_456),
    (libc::PR_SET_THP_DISABLE, libc::PR_GET_THP_DISABLE, 1),
    (libc::PR_SET_CHILD_SUBREAPER, libc::PR_GET_CHILD_SUBREAPER, 1),
    (libc::PR_SET_PDEATHSIG, libc::PR_GET_PDEATHSIG, 10),
];

fn switches() -> Result<Vec<usize>> {
    let read = |(_, get, _)| match get {
        // These two write an int instead of returning it.
        libc::PR_GET_CHILD_SUBREAPER | libc::PR_GET_PDEATHSIG => {
            let mut value = 0_i32;
            prctl(get, [&raw mut value as usize, 0, 0])?;
            Ok(usize::try_from(value)?)
        }
        _ => prctl(get, [0; 3]),
    };
    SWITCHES.into_iter().map(read).collect()
}

/// The switches of `prctl`.
pub(crate) fn creds_switches() -> Result<Scenario> {
    for (set, _, value) in SWITCHES {
        prctl(set, [value, 0, 0])?;
    }
    ensure!(switches()?.into_iter().eq(SWITCHES.map(|(_, _, value)| value)), "{:?}", switches());
    unchanged(switches, || prctl(libc::PR_SET_TIMERSLACK, [50_000, 0, 0]).map(drop))
}

/// Which of some calls are refused, and how.
fn refusals() -> Result<Vec<Option<i32>>> {
    let calls = [libc::SYS_getpriority, libc::SYS_userfaultfd, libc::SYS_socket, libc::SYS_getppid];
    Ok(calls.map(|number| call(number, [0; 6]).err().and_then(|err| err.raw_os_error())).into())
}

/// Two filters, one upon the other, that also refuse what a move may want to do.
pub(crate) fn creds_seccomp() -> Result<Scenario> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, [1, 0, 0])?;
    let inner = [libc::SYS_getpriority, libc::SYS_userfaultfd, libc::SYS_socket];
    sys::refuse(&inner, 77, libc::SECCOMP_FILTER_FLAG_LOG)?;
    let outer =
        [libc::SYS_getpriority, libc::SYS_prctl, libc::SYS_memfd_create, libc::SYS_arch_prctl];
    sys::refuse(&outer, 78, 0)?;
    let expected = vec![Some(78), Some(77), Some(77), None];
    ensure!(refusals()? == expected, "{:?}", refusals());
    unchanged(refusals, || sys::refuse(&[libc::SYS_getppid], 79, 0))
}

const LIMITS: [(Resource, u64, u64); 8] = [
    (Resource::RLIMIT_NOFILE, 512, 1024),
    (Resource::RLIMIT_CORE, 0, 4096),
    (Resource::RLIMIT_STACK, 1 << 20, 1 << 30),
    (Resource::RLIMIT_AS, 1 << 31, 1 << 40),
    (Resource::RLIMIT_MEMLOCK, 4096, 4096),
    (Resource::RLIMIT_FSIZE, 1 << 20, 1 << 21),
    (Resource::RLIMIT_SIGPENDING, 17, 170),
    (Resource::RLIMIT_CPU, 10_000, 20_000),
];

fn limits() -> Result<Vec<(u64, u64)>> {
    LIMITS.iter().map(|(resource, ..)| Ok(getrlimit(*resource)?)).collect()
}

/// Resource limits.
pub(crate) fn creds_limits() -> Result<Scenario> {
    for (resource, soft, hard) in LIMITS {
        setrlimit(resource, soft, hard).with_context(|| format!("{resource:?}"))?;
    }
    unchanged(limits, || Ok(setrlimit(Resource::RLIMIT_CORE, 1, 4096)?))
}

type Schedule = (usize, i32, Vec<usize>, usize, [String; 3]);

fn schedule() -> Result<Schedule> {
    let policy = call(libc::SYS_sched_getscheduler, [0; 6])?;
    let nice = rustix::process::getpriority_process(None)?;
    let set = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0))?;
    let cpus = (0..nix::sched::CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false));
    // 1: IOPRIO_WHO_PROCESS
    let io = call(libc::SYS_ioprio_get, [1, 0, 0, 0, 0, 0])?;
    let files = ["oom_score_adj", "personality", "coredump_filter"];
    let [oom, personality, core] =
        files.map(|file| fs::read_to_string(format!("/proc/self/{file}")));
    Ok((policy, nice, cpus.collect(), io, [oom?, personality?, core?]))
}

/// Scheduling, memory pressure, personality.
pub(crate) fn creds_scheduling() -> Result<Scenario> {
    use nix::sys::personality::{self, Persona};
    let parameter = 0_i32;
    let batch = usize::try_from(libc::SCHED_BATCH)?;
    call(libc::SYS_sched_setscheduler, [0, batch, &raw const parameter as usize, 0, 0, 0])?;
    rustix::process::setpriority_process(None, 7)?;
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(0)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)?;
    // Best effort, level 6.
    call(libc::SYS_ioprio_set, [1, 0, 2 << 13 | 6, 0, 0, 0])?;
    fs::write("/proc/self/oom_score_adj", "333")?;
    fs::write("/proc/self/coredump_filter", "0x7f")?;
    personality::set(Persona::ADDR_NO_RANDOMIZE | Persona::UNAME26)?;
    unchanged(schedule, || Ok(fs::write("/proc/self/oom_score_adj", "444")?))
}
