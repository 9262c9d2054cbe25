//! Multicast groups a socket has joined.
//!
//! A socket does not list them, but it answers whether it is in a given one;
//! which ones there are at all, `/proc/net/igmp` and `igmp6` say.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::BorrowedFd,
};

use nix::{net::if_::if_nametoindex, unistd::Pid};
use serde::{Deserialize, Serialize};

use super::{Failure, Making, Source};
use crate::sys::sockopt;

const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_MSFILTER: i32 = 48;
/// `struct group_req`: interface, group.
const REQUEST: usize = 136;
/// `struct group_filter` without sources: that, mode, number of sources.
const FILTER: usize = 144;
/// `struct sockaddr_storage`.
const ADDRESS: usize = 128;
/// Most sources a membership may name.
const SOURCES: usize = 1024;

/// One membership.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Membership {
    group: IpAddr,
    device: String,
    /// 0: all sources except these; 1: only these.
    mode: u32,
    sources: Vec<IpAddr>,
}

/// Groups that someone in the network namespace of `init` is in.
pub(super) fn groups(init: Pid) -> io::Result<BTreeSet<(u32, IpAddr)>> {
    let mut groups = BTreeSet::new();
    let mut index = 0;
    for line in fs::read_to_string(format!("/proc/{init}/net/igmp"))?.lines().skip(1) {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if line.starts_with('\t') {
            if let Ok(group) = u32::from_str_radix(first, 16) {
                groups.insert((index, Ipv4Addr::from(group.to_ne_bytes()).into()));
            }
        } else if let Ok(number) = first.parse() {
            index = number;
        }
    }
    // A kernel without IPv6 has no such file.
    let v6 = fs::read_to_string(format!("/proc/{init}/net/igmp6")).unwrap_or_default();
    for line in v6.lines() {
        let mut words = line.split_whitespace();
        let index = words.next().and_then(|word| word.parse().ok());
        let group = words.nth(1).and_then(|word| u128::from_str_radix(word, 16).ok());
        if let (Some(index), Some(group)) = (index, group) {
            groups.insert((index, Ipv6Addr::from(group).into()));
        }
    }
    Ok(groups)
}

/// Those of them that the socket is in.
pub(super) fn dump(socket: BorrowedFd<'_>, v6: bool, source: &Source<'_>) -> Vec<Membership> {
    let own = source.sockets.groups.iter().filter(|(_, group)| group.is_ipv6() <= v6);
    own.filter_map(|(index, group)| {
        let (mode, sources) = ask(socket, *index, *group)?;
        let device = source.sockets.devices.get(index)?.clone();
        Some(Membership { group: *group, device, mode, sources })
    })
    .collect()
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

/// The membership's mode and sources; `None` if the socket is not in the group.
fn ask(socket: BorrowedFd<'_>, index: u32, group: IpAddr) -> Option<(u32, Vec<IpAddr>)> {
    let mut filter = request(index, group);
    filter.resize(FILTER + SOURCES * ADDRESS, 0);
    filter[140..FILTER].copy_from_slice(&u32::try_from(SOURCES).ok()?.to_ne_bytes());
    sockopt::get(socket, level(group), MCAST_MSFILTER, &mut filter).ok()?;
    let word = |at: usize| Some(u32::from_ne_bytes(*filter.get(at..)?.first_chunk()?));
    let count = (word(140)? as usize).min(SOURCES);
    let sources = filter[FILTER..].chunks_exact(ADDRESS).take(count).filter_map(decode).collect();
    Some((word(136)?, sources))
}

fn request(index: u32, group: IpAddr) -> Vec<u8> {
    let mut request = index.to_ne_bytes().to_vec();
    request.extend([0; 4]);
    request.extend(encode(group));
    request
}

/// A `sockaddr_storage` with this address.
fn encode(address: IpAddr) -> [u8; ADDRESS] {
    let mut raw = [0; ADDRESS];
    match address {
        IpAddr::V4(ip) => {
            raw[0] = 2; // AF_INET
            raw[4..8].copy_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            raw[0] = 10; // AF_INET6
            raw[8..24].copy_from_slice(&ip.octets());
        }
    }
    raw
}

fn decode(raw: &[u8]) -> Option<IpAddr> {
    match raw.first()? {
        2 => Some(Ipv4Addr::from(*raw.get(4..)?.first_chunk::<4>()?).into()),
        10 => Some(Ipv6Addr::from(*raw.get(8..)?.first_chunk::<16>()?).into()),
        _ => None,
    }
}

/// Joins again.
pub(super) fn restore(all: &[Membership], socket: BorrowedFd<'_>) -> Result<(), Failure> {
    for Membership { group, device, mode, sources } in all {
        let index = if_nametoindex(device.as_str()).map_err(|err| Failure::Missing {
            object: format!("network device {device}"),
            reason: err.to_string(),
        })?;
        let mut join = request(index, *group);
        join.truncate(REQUEST);
        sockopt::set(socket, level(*group), MCAST_JOIN_GROUP, &join)
            .making(&format!("join the group {group}"))?;
        if *mode == 0 && sources.is_empty() {
            continue;
        }
        let count = u32::try_from(sources.len()).unwrap_or(u32::MAX);
        join.extend([*mode, count].map(u32::to_ne_bytes).concat());
        join.extend(sources.iter().flat_map(|source| encode(*source)));
        sockopt::set(socket, level(*group), MCAST_MSFILTER, &join)
            .making(&format!("choose the sources of the group {group}"))?;
    }
    Ok(())
}
