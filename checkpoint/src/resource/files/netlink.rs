//! Netlink sockets with nothing under way (`netlink(7)`).

use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{bind, getsockname, netlink::SocketAddrNetlink};
use serde::{Deserialize, Serialize};

use super::{Doing, Failure, Making, Refusal, set_flags, socket, sockopt, table::Held};
use crate::sys::sockopt as raw;

const SOL_NETLINK: i32 = 270;
const NETLINK_ADD_MEMBERSHIP: i32 = 1;
const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
/// Most multicast groups a protocol may have here.
const GROUPS: usize = 1024;

/// A netlink socket.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    kind: i32,
    protocol: i32,
    owner: (u32, u32),
    options: sockopt::Image,
    /// Its port, once it is bound.
    port: u32,
    /// Multicast groups, from 1 on.
    groups: Vec<u32>,
}

pub(super) fn dump(held: &Held, kind: i32, protocol: i32) -> Result<Image, Refusal> {
    let socket = held.fd.as_fd();
    if socket::received(socket).doing("read the length of its queue")? > 0 {
        return Err(Refusal::new(
            "is a netlink socket with unread messages",
            "try again in a moment",
        ));
    }
    let address = getsockname(socket).doing("read its address")?;
    let address = SocketAddrNetlink::try_from(address).doing("read its address")?;
    let mut bits = [0; GROUPS / 8];
    let len = raw::get(socket, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, &mut bits)
        .doing("read its groups")?;
    let is_member =
        |group: usize| bits.get(group / 8).is_some_and(|byte| byte >> (group % 8) & 1 != 0);
    let groups = (0..len.min(bits.len()) * 8).filter(|group| is_member(*group));
    Ok(Image {
        kind,
        protocol,
        owner: (held.stat.st_uid, held.stat.st_gid),
        options: sockopt::dump(held, libc::AF_NETLINK, protocol)?,
        port: address.pid(),
        groups: groups.filter_map(|group| u32::try_from(group + 1).ok()).collect(),
    })
}

/// Runs in the container's network namespace.
pub(super) fn open(image: &Image, flags: u32) -> Result<OwnedFd, Failure> {
    let Image { kind, protocol, owner, options, port, groups } = image;
    let fd = socket::create(libc::AF_NETLINK, *kind, *protocol, *owner)?;
    sockopt::restore(options, fd.as_fd())?;
    if *port != 0 {
        bind(&fd, &SocketAddrNetlink::new(*port, 0)).making("bind a netlink socket")?;
    }
    for group in groups {
        raw::set_int(fd.as_fd(), SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group.cast_signed())
            .making("join a netlink group")?;
    }
    set_flags(&fd, flags)?;
    Ok(fd)
}
