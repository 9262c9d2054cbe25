//! TCP, UDP and unix sockets.

use std::{
    io::{Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
    },
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send, socketpair,
    sockopt,
};

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

pub(super) fn unix_pairs() {
    let pair = |kind| socketpair(AddressFamily::UNIX, kind, SocketFlags::empty(), None).unwrap();
    let (a, b) = pair(SocketType::STREAM);
    send(&a, b"to b", SendFlags::empty()).unwrap();
    send(&b, &[9; 50_000], SendFlags::empty()).unwrap();
    sockopt::set_socket_passcred(&a, true).unwrap();
    put(a, 100);
    put(b, 101);
    for (number, kind) in [(102, SocketType::DGRAM), (104, SocketType::SEQPACKET)] {
        let (a, b) = pair(kind);
        for message in ["one", "two", "three"] {
            send(&a, message.as_bytes(), SendFlags::empty()).unwrap();
        }
        put(a, number);
        put(b, number + 1);
    }
    let (a, b) = pair(SocketType::STREAM);
    send(&b, b"bye", SendFlags::empty()).unwrap();
    drop(b);
    put(a, 106);
    let (a, b) = pair(SocketType::STREAM);
    rustix::net::shutdown(&a, Shutdown::Write).unwrap();
    put(a, 107);
    put(b, 108);
}

fn receive(restored: &Restored, number: RawFd) -> rustix::io::Result<Vec<u8>> {
    let mut buf = vec![0; 1 << 17];
    let (_, len) = recv(restored.fd(number), &mut buf[..], RecvFlags::DONTWAIT)?;
    buf.truncate(len);
    Ok(buf)
}

#[test]
fn unix_pairs_keep_their_queues() {
    let Some(mut holder) = Holder::start("unix_pairs") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    assert_eq!(holder.dump(), holder.dump());
    let restored = holder.migrate();
    restored.assert_same(100..=108);
    let nothing = Err(rustix::io::Errno::AGAIN);
    assert!(sockopt::socket_passcred(restored.fd(100)).unwrap());
    assert_eq!(receive(&restored, 101).unwrap(), b"to b");
    assert_eq!(receive(&restored, 100).unwrap(), vec![9; 50_000]);
    assert_eq!(receive(&restored, 100), nothing);
    for number in [103, 105] {
        for message in ["one", "two", "three"] {
            assert_eq!(receive(&restored, number).unwrap(), message.as_bytes());
        }
        assert_eq!(receive(&restored, number), nothing);
    }
    assert_eq!(receive(&restored, 106).unwrap(), b"bye");
    assert_eq!(receive(&restored, 106).unwrap(), b"");
    assert_eq!(receive(&restored, 108).unwrap(), b"");
    send(restored.fd(108), b"x", SendFlags::empty()).unwrap();
    assert_eq!(receive(&restored, 107).unwrap(), b"x");
    let closed = send(restored.fd(107), b"x", SendFlags::NOSIGNAL);
    assert_eq!(closed, Err(rustix::io::Errno::PIPE));
}

pub(super) fn unix_listening() {
    put(UnixListener::bind(format!("{}/socket", dir())).unwrap(), 100);
    let name = SocketAddr::from_abstract_name(b"dunlin\0test").unwrap();
    put(UnixListener::bind_addr(&name).unwrap(), 101);
    put(UnixDatagram::bind(format!("{}/datagrams", dir())).unwrap(), 102);
    put(UnixDatagram::unbound().unwrap(), 103);
}

#[test]
fn unix_sockets_are_bound_again() {
    let Some(mut holder) = Holder::start("unix_listening") else { return };
    let restored = holder.migrate();
    restored.assert_same(100..=103);
    let listener = UnixListener::from(restored.fd(100).try_clone_to_owned().unwrap());
    let path = holder.dir.path().join("socket");
    assert_eq!(listener.local_addr().unwrap().as_pathname().unwrap(), path);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"x").unwrap();
    listener.accept().unwrap().0.read_exact(&mut [0]).unwrap();

    let listener = UnixListener::from(restored.fd(101).try_clone_to_owned().unwrap());
    let name = listener.local_addr().unwrap();
    assert_eq!(name.as_abstract_name().unwrap(), b"dunlin\0test");
    super::super::in_netns(restored.netns.as_fd(), || UnixStream::connect_addr(&name)).unwrap();

    let sender = UnixDatagram::unbound().unwrap();
    sender.send_to(b"to you", holder.dir.path().join("datagrams")).unwrap();
    assert_eq!(receive(&restored, 102).unwrap(), b"to you");
}
