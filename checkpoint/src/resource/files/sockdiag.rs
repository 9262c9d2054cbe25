//! What `sock_diag(7)` tells about unix sockets: who is whose peer.

use std::{collections::HashMap, io};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
    netlink::{self, SocketAddrNetlink},
    recv, sendto, socket_with,
};

const AF_UNIX: u8 = 1;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST_DUMP: u16 = 1 | 0x300;
/// Names, files, peers, pending connections, queue lengths.
const SHOW: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10;
const HEADER: usize = 16;
const MESSAGE: usize = 16;
const TCP_LISTEN: u8 = 10;

/// One unix socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct UnixSocket {
    pub(super) listening: bool,
    /// Inode of the peer; 0 once it is gone.
    pub(super) peer: Option<u32>,
    /// Inodes of connections nobody has accepted yet.
    pub(super) pending: Vec<u32>,
    /// Longest queue of connections to accept.
    pub(super) backlog: u32,
    /// 1: receives no more; 2: sends no more.
    pub(super) shutdown: u8,
}

/// Every unix socket of the caller's network namespace, by inode.
pub(super) fn unix_sockets() -> io::Result<HashMap<u32, UnixSocket>> {
    let netlink = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?;
    let mut request = Vec::with_capacity(HEADER + 24);
    request.extend(40u32.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(REQUEST_DUMP.to_ne_bytes());
    request.extend([0; 8]); // sequence number, port
    request.extend([AF_UNIX, 0, 0, 0]);
    request.extend(u32::MAX.to_ne_bytes()); // in every state
    request.extend([0; 4]); // of any inode
    request.extend(SHOW.to_ne_bytes());
    request.extend([0xff; 8]); // with any cookie
    sendto(&netlink, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;

    let mut sockets = HashMap::new();
    let mut buf = vec![0; 64 << 10];
    loop {
        let (_, len) = recv(&netlink, &mut buf[..], RecvFlags::empty())?;
        let mut rest = &buf[..len.min(buf.len())];
        while let Some((kind, body, next)) = message(rest) {
            match kind {
                NLMSG_DONE => return Ok(sockets),
                NLMSG_ERROR => {
                    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return Err(io::Error::from_raw_os_error(-code));
                }
                _ => sockets.extend(socket(body)),
            }
            rest = next;
        }
    }
}

/// Splits off one netlink message: type, body, what follows.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER..len)?;
    Some((kind, body, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// Splits off one attribute the same way.
fn attribute(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
    let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
    let body = bytes.get(4..len)?;
    Some((kind, body, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

fn socket(body: &[u8]) -> Option<(u32, UnixSocket)> {
    let word = |bytes: &[u8]| bytes.first_chunk().map(|word| u32::from_ne_bytes(*word));
    let mut socket = UnixSocket { listening: *body.get(2)? == TCP_LISTEN, ..UnixSocket::default() };
    let inode = word(body.get(4..)?)?;
    let mut rest = body.get(MESSAGE..)?;
    while let Some((kind, value, next)) = attribute(rest) {
        match kind {
            2 => socket.peer = word(value),
            3 => socket.pending = value.chunks_exact(4).filter_map(word).collect(),
            // Of a listener the second word is its backlog.
            4 => socket.backlog = word(value.get(4..)?)?,
            6 => socket.shutdown = *value.first()?,
            _ => (),
        }
        rest = next;
    }
    Some((inode, socket))
}
