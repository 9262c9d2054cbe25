//! Identity and privileges of a thread: ids, capabilities, securebits,
//! `no_new_privs`, seccomp filters (`credentials(7)`, `capabilities(7)`).
//!
//! Last of all that a thread is given: afterwards it may do no more than the
//! program it becomes.

use std::{fs, io};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::{
    proc::{self, Status},
    stub::{Batch, Buf, Call, Results, args},
    sys::ptrace,
};

/// One seccomp filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Filter {
    /// BPF program, 8 bytes an instruction.
    program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    flags: u64,
}

/// The credentials of one thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// Real, effective, saved, file system.
    uids: [u32; 4],
    gids: [u32; 4],
    groups: Vec<u32>,
    inheritable: u64,
    permitted: u64,
    effective: u64,
    bounding: u64,
    ambient: u64,
    securebits: u64,
    no_new_privs: bool,
    /// Strict mode: read, write, exit and sigreturn only.
    seccomp_strict: bool,
    /// Oldest first.
    seccomp: Vec<Filter>,
    /// Signal at the parent's death.
    parent_death_signal: i32,
}

/// Questions asked by [`ask`].
pub(crate) struct Asked {
    securebits: Call,
    parent_death_signal: Buf,
}

/// Asks a thread for what `/proc` does not tell.
pub(crate) fn ask(batch: &mut Batch) -> Asked {
    let securebits = batch.call(libc::SYS_prctl, args![libc::PR_GET_SECUREBITS]);
    let parent_death_signal = batch.space(4);
    batch.call(libc::SYS_prctl, args![libc::PR_GET_PDEATHSIG, parent_death_signal]);
    Asked { securebits, parent_death_signal }
}

/// Puts the credentials of the seized thread `tid` together.
pub(crate) fn answer(
    asked: &Asked,
    results: &Results<'_>,
    tid: Pid,
    status: &Status,
    ids: &IdMaps,
) -> io::Result<Image> {
    let mut seccomp = Vec::new();
    if status.seccomp == SECCOMP_MODE_FILTER {
        while let Some((program, flags)) = ptrace::seccomp_filter(tid, seccomp.len())? {
            seccomp.push(Filter { program, flags });
        }
    }
    let IdMaps { uids, gids } = ids;
    Ok(Image {
        uids: uids.inside_all(status.uids)?,
        gids: gids.inside_all(status.gids)?,
        groups: status.groups.iter().map(|&gid| gids.inside(gid)).collect::<io::Result<_>>()?,
        inheritable: status.cap_inheritable,
        permitted: status.cap_permitted,
        effective: status.cap_effective,
        bounding: status.cap_bounding,
        ambient: status.cap_ambient,
        securebits: results.get(asked.securebits)?,
        no_new_privs: status.no_new_privs,
        seccomp_strict: status.seccomp == SECCOMP_MODE_STRICT,
        seccomp,
        parent_death_signal: results.u32(asked.parent_death_signal, 0).cast_signed(),
    })
}

/// How ids that we see are called inside the tree's user namespace
/// (`user_namespaces(7)`).
pub(crate) struct IdMaps {
    uids: IdMap,
    gids: IdMap,
}

impl IdMaps {
    /// Those of the namespace of `pid`, which is the whole tree's.
    pub(crate) fn of(pid: Pid) -> io::Result<Self> {
        // In a namespace that we share, ids are what they are to us; the files
        // would show their names one level further out.
        if fs::read_link(format!("/proc/{pid}/ns/user"))? == fs::read_link("/proc/self/ns/user")? {
            let same = || IdMap(vec![[0, 0, u32::MAX]]);
            return Ok(Self { uids: same(), gids: same() });
        }
        let map = |file: &str| proc::text(&format!("{pid}/{file}")).map(|text| IdMap::parse(&text));
        Ok(Self { uids: map("uid_map")?, gids: map("gid_map")? })
    }
}

impl IdMaps {
    /// What a user and a group that we see are called inside.
    pub(crate) fn inside(&self, uid: u32, gid: u32) -> io::Result<(u32, u32)> {
        Ok((self.uids.inside(uid)?, self.gids.inside(gid)?))
    }

    /// What a user and a group from inside are to us.
    pub(crate) fn outside(&self, uid: u32, gid: u32) -> io::Result<(u32, u32)> {
        Ok((self.uids.outside(uid)?, self.gids.outside(gid)?))
    }
}

/// Lines of a map: first id inside, first outside, how many.
struct IdMap(Vec<[u32; 3]>);

impl IdMap {
    fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let mut words = line.split_whitespace().map_while(|word| word.parse().ok());
            Some([words.next()?, words.next()?, words.next()?])
        };
        Self(text.lines().filter_map(line).collect())
    }

    fn inside(&self, id: u32) -> io::Result<u32> {
        self.0
            .iter()
            .find(|[_, outside, count]| id.checked_sub(*outside).is_some_and(|at| at < *count))
            .map(|[inside, outside, _]| inside + (id - outside))
            .ok_or_else(|| io::Error::other(format!("id {id} has no name in its user namespace")))
    }

    fn outside(&self, id: u32) -> io::Result<u32> {
        self.0
            .iter()
            .find(|[inside, _, count]| id.checked_sub(*inside).is_some_and(|at| at < *count))
            .map(|[inside, outside, _]| outside + (id - inside))
            .ok_or_else(|| io::Error::other(format!("id {id} is not in the user namespace")))
    }

    fn inside_all(&self, ids: [u32; 4]) -> io::Result<[u32; 4]> {
        let [real, effective, saved, file] = ids;
        Ok([self.inside(real)?, self.inside(effective)?, self.inside(saved)?, self.inside(file)?])
    }
}

const SECCOMP_MODE_STRICT: u32 = 1;
const SECCOMP_MODE_FILTER: u32 = 2;
/// `SECBIT_NO_SETUID_FIXUP`: changing ids leaves capabilities alone.
const NO_SETUID_FIXUP: u64 = 1 << 2;
/// `_LINUX_CAPABILITY_VERSION_3`.
const CAP_VERSION: u32 = 0x2008_0522;
/// Capabilities up to this bit exist in some kernel.
const CAP_BITS: u32 = 63;

/// Gives a thread its ids and capabilities. The thread may have all of them;
/// `available` is the bounding set it starts with.
pub(crate) fn restore(image: &Image, available: u64, batch: &mut Batch) {
    let prctl = |batch: &mut Batch, option: i32, value: u64| {
        batch.call(libc::SYS_prctl, args![option, value, 0_u64, 0_u64, 0_u64]);
    };
    let groups: Vec<u8> = image.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
    let list = batch.bytes(&groups);
    batch.call(libc::SYS_setgroups, args![image.groups.len() as u64, list]);
    prctl(batch, libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP);
    let three = |ids: [u32; 4]| [ids[0], ids[1], ids[2]].map(u64::from);
    let [real, effective, saved] = three(image.gids);
    batch.call(libc::SYS_setresgid, args![real, effective, saved]);
    batch.try_call(libc::SYS_setfsgid, args![u64::from(image.gids[3])]);
    let [real, effective, saved] = three(image.uids);
    batch.call(libc::SYS_setresuid, args![real, effective, saved]);
    batch.try_call(libc::SYS_setfsuid, args![u64::from(image.uids[3])]);
    // Inheritable first and with everything permitted: ambient capabilities
    // need both, and what is no longer permitted leaves the ambient set.
    capset(batch, available, available, image.inheritable);
    prctl(batch, libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL.cast_unsigned().into());
    for cap in bits(image.ambient) {
        let raise = u64::from(libc::PR_CAP_AMBIENT_RAISE.cast_unsigned());
        batch.call(libc::SYS_prctl, args![libc::PR_CAP_AMBIENT, raise, cap, 0_u64, 0_u64]);
    }
    prctl(batch, libc::PR_SET_SECUREBITS, image.securebits);
    for cap in bits(available & !image.bounding) {
        prctl(batch, libc::PR_CAPBSET_DROP, cap);
    }
    prctl(batch, libc::PR_SET_PDEATHSIG, u64::from(image.parent_death_signal.cast_unsigned()));
    if image.no_new_privs {
        prctl(batch, libc::PR_SET_NO_NEW_PRIVS, 1);
    }
}

/// Gives a thread its last limits: after this it cannot install a filter.
/// Filters are installed while suspended, so the calls that follow still work.
pub(crate) fn restrict(image: &Image, batch: &mut Batch) {
    for filter in &image.seccomp {
        let program = batch.bytes(&filter.program);
        // struct sock_fprog: the length, then the pointer.
        let fprog = batch.space(16);
        let len = u16::try_from(filter.program.len() / 8).unwrap_or(u16::MAX);
        batch.number(fprog, u64::from(len));
        batch.address(fprog.skip(8), program);
        let mode = u64::from(libc::SECCOMP_SET_MODE_FILTER);
        batch.call(libc::SYS_seccomp, args![mode, filter.flags, fprog]);
    }
    if image.seccomp_strict {
        batch.call(libc::SYS_seccomp, args![0_u64, 0_u64, 0_u64]);
    }
    capset(batch, image.permitted, image.effective, image.inheritable);
}

fn capset(batch: &mut Batch, permitted: u64, effective: u64, inheritable: u64) {
    let header = batch.bytes(&[CAP_VERSION.to_le_bytes(), [0; 4]].concat());
    let half = |value: u64, high: bool| {
        let value = if high { value >> 32 } else { value & 0xffff_ffff };
        u32::try_from(value).expect("32 bits").to_le_bytes()
    };
    let data: Vec<u8> = [false, true]
        .into_iter()
        .flat_map(|high| [effective, permitted, inheritable].map(|set| half(set, high)))
        .flatten()
        .collect();
    let data = batch.bytes(&data);
    batch.call(libc::SYS_capset, args![header, data]);
}

fn bits(set: u64) -> impl Iterator<Item = u64> {
    (0..=CAP_BITS).filter(move |n| set & 1 << n != 0).map(u64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_their_inner_names() {
        let map = IdMap(vec![[0, 100_000, 10], [500, 7, 1]]);
        assert_eq!(map.inside(100_009).unwrap(), 9);
        assert_eq!(map.inside(7).unwrap(), 500);
        assert!(map.inside(100_010).is_err());
        assert!(map.inside(0).is_err());
        let ours = IdMaps::of(Pid::this()).unwrap().uids;
        assert_eq!(ours.inside(1000).unwrap(), 1000);
    }
}
