//! Socket options.
//!
//! Carried as the kernel's own bytes, one table for all families: what can be
//! read is read, and what differs from the new socket's value is set.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use serde::{Deserialize, Serialize};

use super::{Failure, Making, Refusal, table::Held};
use crate::sys::sockopt;

/// Options of one socket.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    values: Vec<Value>,
    /// Instructions of its packet filter.
    filter: Vec<[u8; 8]>,
}

/// One option.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Value {
    level: i32,
    name: i32,
    bytes: Vec<u8>,
}

const SO_GET_FILTER: i32 = libc::SO_GET_FILTER;
const SO_BUF_LOCK: i32 = 72;
/// Longest value of any option in the tables.
const LONGEST: usize = 16;

/// Options that are not set back by giving the bytes that were read.
const BUFFERS: [(i32, i32); 2] =
    [(libc::SO_SNDBUF, libc::SO_SNDBUFFORCE), (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE)];

/// `int`s of every socket: debug, reuse, routing, broadcast, keepalive, …
const SOCKET: [i32; 36] = [
    libc::SO_DEBUG,
    libc::SO_REUSEADDR,
    libc::SO_DONTROUTE,
    libc::SO_BROADCAST,
    libc::SO_KEEPALIVE,
    libc::SO_OOBINLINE,
    libc::SO_NO_CHECK,
    libc::SO_PRIORITY,
    libc::SO_REUSEPORT,
    libc::SO_PASSCRED,
    libc::SO_RCVLOWAT,
    libc::SO_TIMESTAMP,
    libc::SO_PASSSEC,
    libc::SO_TIMESTAMPNS,
    libc::SO_MARK,
    libc::SO_TIMESTAMPING,
    libc::SO_RXQ_OVFL,
    libc::SO_WIFI_STATUS,
    libc::SO_PEEK_OFF,
    libc::SO_NOFCS,
    libc::SO_SELECT_ERR_QUEUE,
    libc::SO_BUSY_POLL,
    libc::SO_ZEROCOPY,
    63, // SO_TIMESTAMP_NEW
    64, // SO_TIMESTAMPNS_NEW
    65, // SO_TIMESTAMPING_NEW
    libc::SO_PREFER_BUSY_POLL,
    libc::SO_BUSY_POLL_BUDGET,
    73, // SO_RESERVE_MEM
    74, // SO_TXREHASH
    75, // SO_RCVMARK
    76, // SO_PASSPIDFD
    82, // SO_RCVPRIORITY
    83, // SO_PASSRIGHTS
    libc::SO_LOCK_FILTER,
    SO_BUF_LOCK,
];

/// Of every socket, with their sizes.
const SOCKET_WIDE: [(i32, usize); 6] = [
    (libc::SO_LINGER, 8),
    (libc::SO_RCVTIMEO, 16),
    (libc::SO_SNDTIMEO, 16),
    (libc::SO_BINDTODEVICE, LONGEST),
    (libc::SO_MAX_PACING_RATE, 8),
    (61, 8), // SO_TXTIME
];

/// `int`s of IPv4.
const IP: [i32; 25] = [
    libc::IP_TOS,
    libc::IP_TTL,
    libc::IP_HDRINCL,
    libc::IP_RECVOPTS,
    libc::IP_RETOPTS,
    libc::IP_PKTINFO,
    libc::IP_MTU_DISCOVER,
    libc::IP_RECVERR,
    libc::IP_RECVTTL,
    libc::IP_RECVTOS,
    libc::IP_FREEBIND,
    libc::IP_PASSSEC,
    libc::IP_TRANSPARENT,
    libc::IP_RECVORIGDSTADDR,
    libc::IP_MINTTL,
    libc::IP_NODEFRAG,
    libc::IP_CHECKSUM,
    libc::IP_BIND_ADDRESS_NO_PORT,
    libc::IP_RECVFRAGSIZE,
    26, // IP_RECVERR_RFC4884
    libc::IP_MULTICAST_TTL,
    libc::IP_MULTICAST_LOOP,
    libc::IP_MULTICAST_ALL,
    libc::IP_UNICAST_IF,
    51, // IP_LOCAL_PORT_RANGE
];

/// `int`s of IPv6.
const IPV6: [i32; 29] = [
    libc::IPV6_V6ONLY,
    libc::IPV6_UNICAST_HOPS,
    libc::IPV6_MULTICAST_IF,
    libc::IPV6_MULTICAST_HOPS,
    libc::IPV6_MULTICAST_LOOP,
    libc::IPV6_MTU_DISCOVER,
    libc::IPV6_RECVERR,
    29, // IPV6_MULTICAST_ALL
    30, // IPV6_ROUTER_ALERT_ISOLATE
    31, // IPV6_RECVERR_RFC4884
    33, // IPV6_FLOWINFO_SEND
    libc::IPV6_RECVPKTINFO,
    libc::IPV6_RECVHOPLIMIT,
    libc::IPV6_RECVHOPOPTS,
    libc::IPV6_RECVRTHDR,
    libc::IPV6_RECVDSTOPTS,
    libc::IPV6_RECVPATHMTU,
    libc::IPV6_DONTFRAG,
    libc::IPV6_RECVTCLASS,
    libc::IPV6_TCLASS,
    libc::IPV6_AUTOFLOWLABEL,
    libc::IPV6_ADDR_PREFERENCES,
    libc::IPV6_MINHOPCOUNT,
    libc::IPV6_RECVORIGDSTADDR,
    libc::IPV6_TRANSPARENT,
    libc::IPV6_UNICAST_IF,
    libc::IPV6_RECVFRAGSIZE,
    libc::IPV6_FREEBIND,
    libc::IPV6_HDRINCL,
];

/// `int`s of TCP.
const TCP: [i32; 20] = [
    libc::TCP_NODELAY,
    libc::TCP_MAXSEG,
    libc::TCP_CORK,
    libc::TCP_KEEPIDLE,
    libc::TCP_KEEPINTVL,
    libc::TCP_KEEPCNT,
    libc::TCP_SYNCNT,
    libc::TCP_LINGER2,
    libc::TCP_DEFER_ACCEPT,
    libc::TCP_WINDOW_CLAMP,
    libc::TCP_THIN_LINEAR_TIMEOUTS,
    libc::TCP_USER_TIMEOUT,
    libc::TCP_FASTOPEN,
    libc::TCP_NOTSENT_LOWAT,
    libc::TCP_SAVE_SYN,
    libc::TCP_FASTOPEN_CONNECT,
    34, // TCP_FASTOPEN_NO_COOKIE
    libc::TCP_INQ,
    37, // TCP_TX_DELAY
    44, // TCP_RTO_MAX_MS
];

/// `int`s of UDP.
const UDP: [i32; 6] = [
    1,   // UDP_CORK
    100, // UDP_ENCAP
    101, // UDP_NO_CHECK6_TX
    102, // UDP_NO_CHECK6_RX
    103, // UDP_SEGMENT
    104, // UDP_GRO
];

/// `int`s of netlink.
const NETLINK: [i32; 6] = [
    3,  // NETLINK_PKTINFO
    4,  // NETLINK_BROADCAST_ERROR
    5,  // NETLINK_NO_ENOBUFS
    8,  // NETLINK_LISTEN_ALL_NSID
    10, // NETLINK_CAP_ACK
    11, // NETLINK_EXT_ACK
];

/// Level of netlink's options.
const SOL_NETLINK: i32 = 270;

/// Of raw sockets: which messages they get.
const ICMP_FILTER: (i32, i32, usize) = (255, 1, 4);
/// The same of version 6.
const ICMPV6_FILTER: (i32, i32, usize) = (libc::IPPROTO_ICMPV6, 1, 32);

/// Every option with its size.
fn known() -> impl Iterator<Item = (i32, i32, usize)> {
    let ints = |level: i32, names: &'static [i32]| names.iter().map(move |name| (level, *name, 4));
    SOCKET_WIDE
        .iter()
        .map(|(name, size)| (libc::SOL_SOCKET, *name, *size))
        .chain(BUFFERS.iter().map(|(name, _)| (libc::SOL_SOCKET, *name, 4)))
        .chain(ints(libc::SOL_SOCKET, &SOCKET))
        .chain(ints(libc::IPPROTO_IPV6, &IPV6))
        .chain(ints(libc::IPPROTO_IP, &IP))
        .chain(ints(libc::IPPROTO_TCP, &TCP))
        .chain(ints(libc::IPPROTO_UDP, &UDP))
        .chain(ints(SOL_NETLINK, &NETLINK))
        .chain([(libc::IPPROTO_TCP, libc::TCP_CONGESTION, LONGEST), ICMP_FILTER, ICMPV6_FILTER])
}

/// Whether an option means anything to a socket of this protocol.
fn applies(level: i32, name: i32, family: i32, protocol: i32) -> bool {
    let multicast = [
        (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL),
        (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF),
        (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    ];
    if protocol == libc::IPPROTO_TCP && multicast.contains(&(level, name)) {
        return false;
    }
    match level {
        libc::SOL_SOCKET => true,
        SOL_NETLINK => family == libc::AF_NETLINK,
        255 => family == libc::AF_INET && protocol == libc::IPPROTO_ICMP,
        libc::IPPROTO_IPV6 => family == libc::AF_INET6,
        libc::IPPROTO_IP => family == libc::AF_INET || family == libc::AF_INET6,
        _ => protocol == level && (family == libc::AF_INET || family == libc::AF_INET6),
    }
}

fn read(socket: BorrowedFd<'_>, level: i32, name: i32, size: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; size];
    let len = sockopt::get(socket, level, name, &mut bytes).ok()?;
    bytes.truncate(len);
    // The names of a device and a congestion control end at the first zero.
    if size == LONGEST && is_text(level, name) {
        bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    }
    Some(bytes)
}

fn is_text(level: i32, name: i32) -> bool {
    matches!(
        (level, name),
        (libc::SOL_SOCKET, libc::SO_BINDTODEVICE) | (libc::IPPROTO_TCP, libc::TCP_CONGESTION)
    )
}

pub(super) fn dump(held: &Held, family: i32, protocol: i32) -> Result<Image, Refusal> {
    let socket = held.fd.as_fd();
    let filter = filter(socket).map_err(|_| {
        // One that was loaded as eBPF cannot be read.
        Refusal::unmovable("is a socket with a BPF program")
    })?;
    let values = known()
        .filter(|(level, name, _)| applies(*level, *name, family, protocol))
        .filter_map(|(level, name, size)| {
            Some(Value { level, name, bytes: read(socket, level, name, size)? })
        })
        .collect();
    Ok(Image { values, filter })
}

impl Image {
    /// Leaves out what means something else once a connection was made.
    pub(super) fn without_connection(mut self) -> Self {
        let connection = [libc::TCP_MAXSEG, libc::TCP_WINDOW_CLAMP];
        self.values
            .retain(|value| value.level != libc::IPPROTO_TCP || !connection.contains(&value.name));
        self
    }
}

/// The instructions of a socket's packet filter.
fn filter(socket: BorrowedFd<'_>) -> io::Result<Vec<[u8; 8]>> {
    // The length of this option counts instructions, not bytes.
    let len = match sockopt::get(socket, libc::SOL_SOCKET, SO_GET_FILTER, &mut []) {
        Ok(len) => len,
        Err(err) if err.raw_os_error() == Some(libc::EACCES) => return Err(err),
        Err(_) => 0,
    };
    let mut bytes = vec![0; len * 8];
    if len > 0 {
        sockopt::get(socket, libc::SOL_SOCKET, SO_GET_FILTER, &mut bytes)?;
    }
    Ok(bytes.as_chunks().0.to_vec())
}

/// Sets every option that differs. Comes before `bind`, which fixes some.
pub(super) fn restore(image: &Image, socket: BorrowedFd<'_>) -> Result<(), Failure> {
    let Image { values, filter } = image;
    if self::filter(socket).making("read the packet filter")? != *filter {
        sockopt::attach_filter(socket, filter).making("attach the packet filter")?;
    }
    for Value { level, name, bytes } in values {
        let Some((_, _, size)) = known().find(|(l, n, _)| (l, n) == (level, name)) else {
            return Err(Failure::Damaged("an unknown socket option"));
        };
        if bytes.len() > size {
            return Err(Failure::Damaged("a socket option of the wrong size"));
        }
        if read(socket, *level, *name, size).as_deref() != Some(bytes) {
            set(socket, *level, *name, bytes)
                .making(&format!("set socket option {level}:{name}"))?;
        }
    }
    Ok(())
}

fn set(socket: BorrowedFd<'_>, level: i32, name: i32, bytes: &[u8]) -> io::Result<()> {
    if let Some((_, force)) = BUFFERS.iter().find(|(n, _)| level == libc::SOL_SOCKET && *n == name)
    {
        let bytes = bytes.first_chunk().ok_or(io::ErrorKind::InvalidData)?;
        // The kernel doubles what it is given.
        return sockopt::set_int(socket, level, *force, i32::from_ne_bytes(*bytes) / 2);
    }
    sockopt::set(socket, level, name, bytes)
}
