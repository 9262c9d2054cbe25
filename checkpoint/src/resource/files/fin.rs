//! A peer's FIN, delivered once more to a connection that had received it.
//!
//! No socket option says that the peer sends no more; only its segment does.
//! It is made here and never leaves the host: its destination is local.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with,
};

use crate::sys::sockopt;

const TCP: u8 = 6;
const TCP_HEADER: usize = 20;
/// Header of five words; FIN and ACK.
const OFFSET_AND_FLAGS: u16 = 5 << 12 | 0x11;

/// Delivers a FIN from `peer` to `own`, with the peer's sequence number `seq`
/// and acknowledging nothing beyond `ack`.
pub(super) fn deliver(peer: SocketAddr, own: SocketAddr, seq: u32, ack: u32) -> io::Result<()> {
    let mut segment = Vec::with_capacity(TCP_HEADER);
    segment.extend(peer.port().to_be_bytes());
    segment.extend(own.port().to_be_bytes());
    segment.extend(seq.to_be_bytes());
    segment.extend(ack.to_be_bytes());
    segment.extend(OFFSET_AND_FLAGS.to_be_bytes());
    segment.extend([0xff, 0xff, 0, 0, 0, 0]); // window, checksum, urgent
    let to_v4 = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(ip) => ip.to_ipv4_mapped(),
    };
    match (to_v4(peer.ip()), to_v4(own.ip()), peer.ip(), own.ip()) {
        (Some(from), Some(to), ..) => send_v4(from, to, &mut segment),
        (_, _, IpAddr::V6(from), IpAddr::V6(to)) => send_v6(from, to, &mut segment),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn send_v4(from: Ipv4Addr, to: Ipv4Addr, segment: &mut [u8]) -> io::Result<()> {
    let pseudo = [&from.octets()[..], &to.octets(), &[0, TCP, 0, 20]].concat();
    check(segment, &pseudo);
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, TCP, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend_from_slice(segment);
    let raw = raw_socket(AddressFamily::INET)?;
    sendto(&raw, &packet, SendFlags::empty(), &SocketAddrV4::new(to, 0))?;
    Ok(())
}

fn send_v6(from: Ipv6Addr, to: Ipv6Addr, segment: &mut [u8]) -> io::Result<()> {
    let pseudo = [&from.octets()[..], &to.octets(), &[0, 0, 0, 20, 0, 0, 0, TCP]].concat();
    check(segment, &pseudo);
    let mut packet = vec![0x60, 0, 0, 0, 0, 20, TCP, 64];
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend_from_slice(segment);
    let raw = raw_socket(AddressFamily::INET6)?;
    sendto(&raw, &packet, SendFlags::empty(), &SocketAddrV6::new(to, 0, 0, 0))?;
    Ok(())
}

/// A socket that takes whole packets.
fn raw_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let raw = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))?;
    // Whatever an image says about the address, the packet stays here.
    sockopt::set(raw.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo")?;
    Ok(raw)
}

/// Puts the checksum over `pseudo` and the segment into it.
fn check(segment: &mut [u8], pseudo: &[u8]) {
    let words = pseudo.chunks(2).chain(segment.chunks(2));
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [.., a, b] = (!sum).to_be_bytes();
    segment[16..18].copy_from_slice(&[a, b]);
}
