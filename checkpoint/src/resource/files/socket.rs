//! What all sockets have in common: where they belong, who makes them.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File as StdFile,
    io,
    net::IpAddr,
    num::NonZero,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{sched::CloneFlags, unistd::Pid};
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, socket_with};

use super::{
    Collector, Doing, Failure, File, Kind, Making, Refusal, Target, in_netns, inet, multicast,
    netlink,
    sockdiag::{self, UnixSocket},
    table::Held,
    unix,
};
use crate::{hold, sys::sockopt};

const SO_NETNS_COOKIE: i32 = 71;
const SO_MEMINFO: i32 = 55;

/// What is known about the sockets of the source's network namespace.
#[derive(Default)]
pub(super) struct Source {
    netns_cookie: u64,
    /// Whether it is that of the host, whose address stays.
    pub(super) of_host: bool,
    pub(super) unix: HashMap<u32, UnixSocket>,
    /// Names of the network devices by index.
    pub(super) devices: HashMap<u32, String>,
    /// Multicast groups by index of the device.
    pub(super) groups: BTreeSet<(u32, IpAddr)>,
}

impl Source {
    pub(super) fn of(init: Pid, any: bool) -> io::Result<Self> {
        if !any {
            return Ok(Self::default());
        }
        let netns = StdFile::open(format!("/proc/{init}/ns/net"))?;
        let of_host = hold::is_own(init)?;
        in_netns(netns.as_fd(), || {
            let probe =
                socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
            let devices = nix::net::if_::if_nameindex()?
                .iter()
                .map(|device| (device.index(), device.name().to_string_lossy().into_owned()))
                .collect();
            Ok(Self {
                netns_cookie: netns_cookie(probe.as_fd())?,
                of_host,
                unix: sockdiag::unix_sockets()?,
                groups: multicast::groups(init)?,
                devices,
            })
        })
    }
}

fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = [0; 8];
    sockopt::get(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE, &mut cookie)?;
    Ok(u64::from_ne_bytes(cookie))
}

/// Bytes of memory that received and unread data takes.
pub(super) fn received(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = [0; 36];
    sockopt::get(socket, libc::SOL_SOCKET, SO_MEMINFO, &mut info)?;
    let [a, b, c, d, ..] = info;
    Ok(u32::from_ne_bytes([a, b, c, d]))
}

pub(super) fn dump(
    id: usize,
    held: &Held,
    source: &super::Source<'_>,
    out: &mut Collector<'_>,
) -> Result<Kind, Refusal> {
    let socket = held.fd.as_fd();
    let option = |name| sockopt::get_int(socket, libc::SOL_SOCKET, name).doing("read its options");
    let (family, kind, protocol) =
        (option(libc::SO_DOMAIN)?, option(libc::SO_TYPE)?, option(libc::SO_PROTOCOL)?);
    if netns_cookie(socket).doing("tell its network namespace")? != source.sockets.netns_cookie {
        return Err(Refusal::unmovable(
            "is a socket of another network namespace than the container's",
        ));
    }
    match (family, kind, protocol) {
        (libc::AF_NETLINK, ..) => netlink::dump(held, kind, protocol).map(Kind::Netlink),
        (libc::AF_UNIX, ..) => unix::dump(id, held, kind, source, out).map(Kind::Unix),
        (libc::AF_INET | libc::AF_INET6, ..) if inet::is_known(kind, protocol) => {
            inet::dump(held, (family, kind, protocol), source, out).map(Kind::Inet)
        }
        _ => Err(Refusal::unmovable(format!("is {}", in_words(family, kind, protocol)))),
    }
}

fn in_words(family: i32, kind: i32, protocol: i32) -> String {
    match (family, kind, protocol) {
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_MPTCP) => "an MPTCP socket",
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_SCTP) => "an SCTP socket",
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_UDPLITE) => "a UDP-Lite socket",
        (libc::AF_PACKET, ..) => "a packet socket",
        (libc::AF_VSOCK, ..) => "a vsock",
        (libc::AF_ALG, ..) => "a kernel crypto socket",
        (libc::AF_XDP, ..) => "an XDP socket",
        _ => return format!("a socket of family {family}, type {kind}, protocol {protocol}"),
    }
    .to_owned()
}

/// Makes every socket into `made`. Runs on a thread of its own, which enters
/// the container's network namespace and root directory.
pub(super) fn open(
    files: &[File],
    target: &Target<'_>,
    made: &mut [Option<OwnedFd>],
) -> Result<Vec<unix::Placed>, (usize, Failure)> {
    let is_socket =
        |file: &File| matches!(file.kind, Kind::Inet(_) | Kind::Unix(_) | Kind::Netlink(_));
    let Some(first) = files.iter().position(is_socket) else { return Ok(Vec::new()) };
    enter(target).making("enter the container").map_err(|err| (first, err))?;
    for (id, file) in files.iter().enumerate() {
        if let Kind::Netlink(image) = &file.kind {
            made[id] = Some(netlink::open(image, file.flags).map_err(|err| (id, err))?);
        }
    }
    for (id, fd) in inet::open(files)? {
        made[id] = Some(fd);
    }
    unix::open(files, target, made)
}

fn enter(target: &Target<'_>) -> io::Result<()> {
    nix::sched::setns(target.netns, CloneFlags::CLONE_NEWNET)?;
    Ok(nix::sched::unshare(CloneFlags::CLONE_FS)?)
}

/// Makes a socket and gives it to its owner.
pub(super) fn create(
    family: i32,
    kind: i32,
    protocol: i32,
    (uid, gid): (u32, u32),
) -> Result<OwnedFd, Failure> {
    let raw = |n: i32| u16::try_from(n).map_err(|_| Failure::Damaged("an unknown socket family"));
    let fd = socket_with(
        AddressFamily::from_raw(raw(family)?),
        SocketType::from_raw(kind.cast_unsigned()),
        SocketFlags::CLOEXEC,
        NonZero::new(protocol.cast_unsigned()).map(Protocol::from_raw),
    )
    .making("make a socket")?;
    chown(fd.as_fd(), (uid, gid))?;
    Ok(fd)
}

/// A socket's owner decides who may share its port.
pub(super) fn chown(socket: BorrowedFd<'_>, (uid, gid): (u32, u32)) -> Result<(), Failure> {
    if (uid, gid) == (0, 0) {
        return Ok(());
    }
    nix::unistd::fchown(
        std::os::fd::AsRawFd::as_raw_fd(&socket),
        Some(uid.into()),
        Some(gid.into()),
    )
    .making("set the owner of a socket")
}
