//! TCP and UDP sockets.

use std::{
    io::{Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use rustix::net::{AddressFamily, RecvFlags, SocketType, recv, sockopt};

use super::*;
use crate::TcpPolicy;

fn loopback_up() {
    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
}

pub(super) fn inet() {
    loopback_up();
    let listener = TcpListener::bind("127.0.0.1:7001").unwrap();
    listener.set_nonblocking(true).unwrap();
    sockopt::set_socket_keepalive(&listener, true).unwrap();
    sockopt::set_socket_linger(&listener, Some(Duration::from_secs(3))).unwrap();
    sockopt::set_tcp_nodelay(&listener, true).unwrap();
    sockopt::set_socket_recv_buffer_size(&listener, 30_000).unwrap();
    put(listener, 100);
    put(TcpListener::bind("[::]:7002").unwrap(), 101);
    let udp = UdpSocket::bind("127.0.0.1:7003").unwrap();
    udp.set_broadcast(true).unwrap();
    udp.set_read_timeout(Some(Duration::from_millis(1500))).unwrap();
    put(udp, 102);
    let connected = UdpSocket::bind((Ipv6Addr::LOCALHOST, 7004)).unwrap();
    connected.connect((Ipv6Addr::LOCALHOST, 7005)).unwrap();
    put(connected, 103);
    put(rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap(), 104);
    // Two on one port.
    for number in [105, 106] {
        let fd = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        sockopt::set_socket_reuseport(&fd, true).unwrap();
        rustix::net::bind(&fd, &"127.0.0.1:7006".parse::<std::net::SocketAddr>().unwrap()).unwrap();
        rustix::net::listen(&fd, 5).unwrap();
        put(fd, number);
    }
}

#[test]
fn sockets_listen_again() {
    let Some(mut holder) = Holder::start("inet") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same(100..=106);
    let owned = |number| restored.fd(number).try_clone_to_owned().unwrap();

    let listener = TcpListener::from(owned(100));
    assert_eq!(listener.local_addr().unwrap(), "127.0.0.1:7001".parse().unwrap());
    assert!(sockopt::socket_keepalive(&listener).unwrap());
    assert_eq!(sockopt::socket_linger(&listener).unwrap(), Some(Duration::from_secs(3)));
    assert!(sockopt::tcp_nodelay(&listener).unwrap());
    assert_eq!(sockopt::socket_recv_buffer_size(&listener).unwrap(), 60_000);
    assert!(sockopt::socket_reuseaddr(&listener).unwrap());
    listener.set_nonblocking(false).unwrap();
    let client =
        super::super::in_netns(restored.netns.as_fd(), || TcpStream::connect("127.0.0.1:7001"));
    client.unwrap().write_all(b"hi").unwrap();
    let mut text = String::new();
    listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hi");

    assert_eq!(TcpListener::from(owned(101)).local_addr().unwrap(), "[::]:7002".parse().unwrap());
    let udp = UdpSocket::from(owned(102));
    assert_eq!(udp.local_addr().unwrap(), "127.0.0.1:7003".parse().unwrap());
    assert!(udp.broadcast().unwrap() && !sockopt::socket_reuseaddr(&udp).unwrap());
    assert_eq!(udp.read_timeout().unwrap(), Some(Duration::from_millis(1500)));
    let connected = UdpSocket::from(owned(103));
    assert_eq!(connected.peer_addr().unwrap(), "[::1]:7005".parse().unwrap());
    assert_eq!(connected.local_addr().unwrap(), "[::1]:7004".parse().unwrap());
    assert!(sockopt::socket_reuseport(restored.fd(105)).unwrap());
}

pub(super) fn established() {
    loopback_up();
    let listener = TcpListener::bind("127.0.0.1:7001").unwrap();
    let client = TcpStream::connect("127.0.0.1:7001").unwrap();
    let (server, _) = listener.accept().unwrap();
    put(listener, 100);
    put(client, 101);
    put(server, 102);
}

#[test]
fn established_connections_are_refused_or_closed() {
    let Some(mut holder) = Holder::start("established") else { return };
    let findings = holder.inspect(&Options::default());
    let refused = refusals(&findings);
    assert_eq!(refused.len(), 2, "{findings:?}");
    assert!(refused.iter().all(|f| f.reason == "is an established TCP connection"));

    let close = Options { tcp: TcpPolicy::Close, ..Options::default() };
    assert_eq!(holder.inspect(&close), []);
    let restored = holder.migrate_with(&close);
    for number in [101, 102] {
        let mut buf = [0; 1];
        let got = recv(restored.fd(number), &mut buf, RecvFlags::empty());
        assert_eq!(got.unwrap_err(), rustix::io::Errno::NOTCONN);
    }
}

pub(super) fn odd() {
    loopback_up();
    let udp = UdpSocket::bind("0.0.0.0:7010").unwrap();
    let group = std::net::Ipv4Addr::new(239, 1, 2, 3);
    udp.join_multicast_v4(&group, &std::net::Ipv4Addr::LOCALHOST).unwrap();
    put(udp, 100);
    let udp = UdpSocket::bind("[::]:7011").unwrap();
    udp.join_multicast_v6(&"ff12::77".parse().unwrap(), 1).unwrap();
    put(udp, 101);
    put(UdpSocket::bind("0.0.0.0:7012").unwrap(), 102);
    let raw = |family, kind, protocol| rustix::net::socket(family, kind, Some(protocol)).unwrap();
    let icmp = raw(AddressFamily::INET, SocketType::RAW, rustix::net::ipproto::ICMP);
    crate::sys::sockopt::set_int(icmp.as_fd(), 255, 1, 0x55).unwrap();
    // Accepts the first 40 bytes of every packet.
    let program = [[0x06, 0, 0, 0, 40, 0, 0, 0]];
    crate::sys::sockopt::attach_filter(icmp.as_fd(), &program).unwrap();
    put(icmp, 103);
    put(raw(AddressFamily::INET6, SocketType::RAW, rustix::net::ipproto::EGP), 104);
}

#[test]
fn groups_filters_and_raw_sockets_come_back() {
    let Some(mut holder) = Holder::start("odd_sockets") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same(100..=104);
    // Nobody else is in that network namespace.
    let groups = super::super::in_netns(restored.netns.as_fd(), || {
        Command::new("ip").args(["maddress", "show", "dev", "lo"]).output()
    });
    let groups = String::from_utf8(groups.unwrap().stdout).unwrap();
    assert!(groups.contains("239.1.2.3") && groups.contains("ff12::77"), "{groups}");
    let filter = crate::sys::sockopt::get_int(restored.fd(103), 255, 1).unwrap();
    assert_eq!(filter, 0x55);
    let mut bytes = [0; 8];
    crate::sys::sockopt::get(restored.fd(103), libc::SOL_SOCKET, libc::SO_GET_FILTER, &mut bytes)
        .unwrap();
    assert_eq!(bytes, [0x06, 0, 0, 0, 40, 0, 0, 0]);
}
