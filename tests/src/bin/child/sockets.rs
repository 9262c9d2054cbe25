//! Sockets that can move by themselves: pairs, and ones that listen.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, ipproto, listen, recv,
    send, socket_with, socketpair,
};

use crate::fork::{Fork, fork, on_question};
use crate::world::{Scenario, dir};

type Pair = (OwnedFd, OwnedFd);

fn pair(kind: SocketType) -> Result<Pair> {
    Ok(socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?)
}

fn put(socket: &OwnedFd, bytes: &[u8]) -> Result<()> {
    ensure!(send(socket, bytes, SendFlags::NOSIGNAL)? == bytes.len(), "sent less");
    Ok(())
}

fn take(socket: &OwnedFd) -> Result<Vec<u8>> {
    let mut buffer = [0; 4096];
    let (_, n) = recv(socket, &mut buffer, RecvFlags::empty())?;
    Ok(buffer[..n.min(4096)].to_vec())
}

/// Pairs with data queued both ways, half closed, and with options.
pub(crate) fn sockets_pairs() -> Result<Scenario> {
    let kinds = [SocketType::STREAM, SocketType::DGRAM, SocketType::SEQPACKET];
    let pairs = [pair(kinds[0])?, pair(kinds[1])?, pair(kinds[2])?];
    for (here, there) in &pairs {
        put(here, b"one ")?;
        put(here, b"two")?;
        put(there, b"back")?;
    }
    sockopt::set_socket_passcred(&pairs[1].0, true)?;
    sockopt::set_socket_send_buffer_size(&pairs[0].1, 50_000)?;
    let closed = pair(SocketType::STREAM)?;
    put(&closed.0, b"last")?;
    rustix::net::shutdown(&closed.0, rustix::net::Shutdown::Write)?;
    let state = (pairs, closed);
    let check = |(pairs, closed): &mut ([Pair; 3], Pair)| {
        ensure!(take(&pairs[0].1)? == b"one two", "content of the stream");
        for (_, there) in &pairs[1..] {
            ensure!(take(there)? == b"one " && take(there)? == b"two", "messages");
        }
        for (here, there) in pairs.iter() {
            ensure!(take(here)? == b"back", "what came back");
            put(here, b"more")?;
            ensure!(take(there)? == b"more", "what is sent now");
        }
        ensure!(sockopt::socket_passcred(&pairs[1].0)?, "SO_PASSCRED was lost");
        ensure!(!sockopt::socket_passcred(&pairs[2].0)?, "SO_PASSCRED came from nowhere");
        let size = sockopt::socket_send_buffer_size(&pairs[0].1)?;
        ensure!(size == 100_000, "SO_SNDBUF is {size}");
        ensure!(take(&closed.1)? == b"last" && take(&closed.1)?.is_empty(), "the half-closed pair");
        put(&closed.1, b"still")?;
        ensure!(take(&closed.0)? == b"still", "the open half");
        ensure!(put(&closed.0, b"x").is_err(), "the closed half is open");
        Ok(())
    };
    let spoil = |(pairs, _): &mut ([Pair; 3], Pair)| take(&pairs[2].0).map(drop);
    Scenario::new(state, check, spoil)
}

/// A pair between parent and child.
pub(crate) fn sockets_family() -> Result<Scenario> {
    let (mut here, mut there) = UnixStream::pair()?;
    here.write_all(b"early")?;
    let copy = here.try_clone()?;
    let child = fork(move || {
        drop(copy);
        on_question(|| {
            let mut text = [0; 9];
            there.read_exact(&mut text)?;
            ensure!(text == *b"earlylate", "the child read {text:?}");
            Ok(there.write_all(b"answer")?)
        })
    })?;
    let check = |(here, child): &mut (UnixStream, Fork)| {
        here.write_all(b"late")?;
        child.ask()?;
        let mut text = [0; 6];
        here.read_exact(&mut text)?;
        ensure!(text == *b"answer", "the parent read {text:?}");
        Ok(())
    };
    let spoil = |(here, _): &mut (UnixStream, Fork)| Ok(here.write_all(b"wrong")?);
    Scenario::new((here, child), check, spoil)
}

struct Listening {
    v4: TcpListener,
    v6: Option<TcpListener>,
    udp: UdpSocket,
    unix: UnixListener,
    hidden: UnixListener,
    datagrams: UnixDatagram,
}

/// Sockets that wait for peers: TCP, UDP, unix by path and by abstract name.
pub(crate) fn sockets_listening() -> Result<Scenario> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::SocketAddr;
    let v4 = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&v4, true)?;
    sockopt::set_socket_keepalive(&v4, true)?;
    sockopt::set_tcp_nodelay(&v4, true)?;
    bind(&v4, &std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    listen(&v4, 17)?;
    let v6 = socket_with(
        AddressFamily::INET6,
        SocketType::STREAM,
        SocketFlags::empty(),
        Some(ipproto::TCP),
    );
    let v6 = match v6 {
        Ok(v6) => {
            sockopt::set_ipv6_v6only(&v6, true)?;
            bind(&v6, &std::net::SocketAddr::from((Ipv6Addr::LOCALHOST, 0)))?;
            listen(&v6, 5)?;
            Some(v6.into())
        }
        // A host without IPv6 has nothing to carry.
        Err(_) => None,
    };
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    sockopt::set_socket_broadcast(&udp, true)?;
    let unix = UnixListener::bind(dir().join("socket"))?;
    let name = dir().display().to_string();
    let hidden = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    let datagrams = UnixDatagram::bind(dir().join("datagrams"))?;
    let check = |world: &mut Listening| {
        ensure!(sockopt::socket_reuseaddr(&world.v4)?, "SO_REUSEADDR was lost");
        ensure!(sockopt::socket_keepalive(&world.v4)?, "SO_KEEPALIVE was lost");
        ensure!(sockopt::tcp_nodelay(&world.v4)?, "TCP_NODELAY was lost");
        ensure!(sockopt::socket_broadcast(&world.udp)?, "SO_BROADCAST was lost");
        for listener in [Some(&world.v4), world.v6.as_ref()].into_iter().flatten() {
            let mut peer = TcpStream::connect(listener.local_addr()?).context("connecting")?;
            peer.write_all(b"hi")?;
            converse(&mut listener.accept()?.0)?;
        }
        let peer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        peer.send_to(b"hi", world.udp.local_addr()?)?;
        ensure!(world.udp.recv(&mut [0; 9])? == 2, "UDP");
        UnixStream::connect(dir().join("socket"))?.write_all(b"hi")?;
        converse(&mut world.unix.accept()?.0)?;
        let name = SocketAddr::from_abstract_name(dir().display().to_string())?;
        UnixStream::connect_addr(&name)?.write_all(b"hi")?;
        converse(&mut world.hidden.accept()?.0)?;
        UnixDatagram::unbound()?.send_to(b"hi", dir().join("datagrams"))?;
        ensure!(world.datagrams.recv(&mut [0; 9])? == 2, "unix datagram");
        Ok(())
    };
    let spoil = |world: &mut Listening| Ok(sockopt::set_socket_reuseaddr(world.v4.as_fd(), false)?);
    let world = Listening { v4: v4.into(), v6, udp, unix, hidden, datagrams };
    Scenario::new(world, check, spoil)
}

fn converse(stream: &mut impl Read) -> Result<()> {
    let mut text = [0; 2];
    stream.read_exact(&mut text)?;
    ensure!(text == *b"hi", "heard {text:?}");
    Ok(())
}
