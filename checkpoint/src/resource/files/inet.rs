//! TCP, UDP, ICMP and raw sockets, v4 and v6.
//!
//! What is not connected is made anew: options, address, backlog. All sockets
//! are bound before the first listens, with `SO_REUSEADDR` set for the moment,
//! so that several on one port find their place in any order; and with
//! `IP_FREEBIND`, so that the address need not be up yet.

use std::{
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::net::if_::if_nametoindex;
use rustix::{
    fs::OFlags,
    net::{SocketAddrAny, getpeername, getsockname},
};
use serde::{Deserialize, Serialize};

use super::{
    Collector, Doing, Failure, File, Kind, Making, Refusal, Source, multicast, socket, sockopt,
    table::Held, tcp,
};
use crate::{Options, TcpPolicy, sys::sockopt as raw};

const TCP_SYN_SENT: u8 = 2;
const TCP_CLOSE: u8 = 7;
const TCP_LISTEN: u8 = 10;

/// A socket of the internet families.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// Whether it is of `AF_INET6`.
    pub(crate) v6: bool,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_RAW`.
    kind: i32,
    protocol: i32,
    /// User and group.
    pub(crate) owner: (u32, u32),
    /// Socket options.
    pub(crate) options: sockopt::Image,
    /// Its own address, once it has one.
    pub(crate) bound: Option<Address>,
    /// What it does with it.
    pub(crate) state: State,
    /// Multicast groups it is in.
    groups: Vec<multicast::Membership>,
}

/// What a socket is doing. The order is the format: append only.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum State {
    /// Nothing.
    Idle,
    /// Listens, with this backlog.
    Listening(u32),
    /// UDP with a fixed peer.
    Connected(Address),
    /// Was a TCP connection, which has been given up.
    Closed,
    /// A TCP connection.
    Established(Address, Box<tcp::Image>),
    /// A TCP connection that the peer has not answered.
    Connecting(Address),
}

/// An address that means the same on another host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Address {
    /// Address and port; no scope.
    pub(crate) address: SocketAddr,
    /// Device name behind a link-local address.
    pub(crate) device: Option<String>,
}

/// Whether sockets of this kind can be moved: TCP, UDP, ICMP, raw.
pub(super) fn is_known(kind: i32, protocol: i32) -> bool {
    match kind {
        libc::SOCK_STREAM => protocol == libc::IPPROTO_TCP,
        libc::SOCK_DGRAM => {
            [libc::IPPROTO_UDP, libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6].contains(&protocol)
        }
        kind => kind == libc::SOCK_RAW,
    }
}

pub(super) fn dump(
    held: &Held,
    (family, kind, protocol): (i32, i32, i32),
    source: &Source<'_>,
    out: &mut Collector<'_>,
) -> Result<Image, Refusal> {
    let socket = held.fd.as_fd();
    let tcp = kind == libc::SOCK_STREAM;
    let mut bound = address(&getsockname(socket).doing("read its address")?, source);
    let state = if tcp { tcp_state(held, source, out)? } else { udp_state(held, source, out)? };
    let mut options = sockopt::dump(held, family, protocol)?;
    if !matches!(state, State::Idle | State::Listening(_)) {
        options = options.without_connection();
    }
    if state == State::Closed {
        bound = None;
    }
    Ok(Image {
        v6: family == libc::AF_INET6,
        kind,
        protocol,
        owner: (held.stat.st_uid, held.stat.st_gid),
        options,
        bound,
        state,
        groups: if tcp {
            Vec::new()
        } else {
            multicast::dump(socket, family == libc::AF_INET6, source)
        },
    })
}

fn drops_waiting(options: &Options) -> bool {
    options.skip_in_flight || options.tcp == TcpPolicy::Close
}

fn tcp_state(held: &Held, source: &Source<'_>, out: &mut Collector<'_>) -> Result<State, Refusal> {
    let socket = held.fd.as_fd();
    let mut ulp = [0; 16];
    if raw::get(socket, libc::IPPROTO_TCP, libc::TCP_ULP, &mut ulp).is_ok_and(|n| n > 0) {
        return Err(Refusal::unmovable("is a TCP socket with kernel TLS"));
    }
    let mut info = [0; 104];
    raw::get(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info).doing("read its state")?;
    // Of a listener `tcpi_unacked` counts connections to accept, `tcpi_sacked`
    // is the backlog.
    let word = |at: usize| info[at..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word));
    let (waiting, backlog) = (word(24), word(28));
    match info[0] {
        TCP_CLOSE => Ok(State::Idle),
        TCP_LISTEN if waiting == 0 => Ok(State::Listening(backlog)),
        // They have no fd by which they could be read.
        TCP_LISTEN if drops_waiting(source.ctx.options) => {
            out.losses.push(format!("drops {waiting} connections nobody has accepted yet"));
            Ok(State::Listening(backlog))
        }
        TCP_LISTEN => Err(Refusal::new(
            format!("is a listening socket with {waiting} connections nobody has accepted yet"),
            "try again in a moment, or drop them (--tcp-skip-in-flight)",
        )),
        state => match source.ctx.options.tcp {
            TcpPolicy::Close => Ok(State::Closed),
            TcpPolicy::Refuse => Err(Refusal::new(
                "is an established TCP connection",
                "keep connections (--tcp-established) or close them (--tcp-close)",
            )),
            TcpPolicy::Keep if source.sockets.of_host => Err(Refusal::new(
                "is a TCP connection in the host's network namespace, whose address stays",
                "close connections, or give the container a network namespace of its own",
            )),
            TcpPolicy::Keep if !source.frozen => Ok(State::Closed),
            TcpPolicy::Keep => {
                let peer = getpeername(socket).doing("read its peer")?;
                let peer = peer.and_then(|peer| address(&peer, source));
                let Some(peer) = peer else { return Ok(State::Closed) };
                if state == TCP_SYN_SENT {
                    return Ok(State::Connecting(peer));
                }
                let image = tcp::dump(socket, &info)?;
                let kept = held.fd.try_clone().doing("duplicate it")?;
                out.connections.0.push(kept);
                Ok(State::Established(peer, Box::new(image)))
            }
        },
    }
}

fn udp_state(held: &Held, source: &Source<'_>, out: &mut Collector<'_>) -> Result<State, Refusal> {
    if socket::received(held.fd.as_fd()).doing("read the length of its queue")? > 0 {
        out.losses.push("drops datagrams nobody has read yet".to_owned());
    }
    match getpeername(held.fd.as_fd()) {
        Ok(peer) => {
            let peer = peer.and_then(|peer| address(&peer, source));
            Ok(peer.map_or(State::Idle, State::Connected))
        }
        Err(rustix::io::Errno::NOTCONN) => Ok(State::Idle),
        Err(err) => Err(err).doing("read its peer"),
    }
}

/// An address once there is one; a socket without has no port either.
fn address(any: &SocketAddrAny, source: &Source<'_>) -> Option<Address> {
    let mut address = SocketAddr::try_from(any.clone()).ok()?;
    if address.port() == 0 && address.ip().is_unspecified() {
        return None;
    }
    let mut device = None;
    if let SocketAddr::V6(v6) = &mut address {
        device = source.sockets.devices.get(&v6.scope_id()).cloned();
        v6.set_scope_id(0);
    }
    Some(Address { address, device })
}

impl Address {
    /// Finds the device again, which may have another number here.
    fn resolve(&self) -> Result<SocketAddr, Failure> {
        let Self { mut address, device } = self.clone();
        if let (SocketAddr::V6(v6), Some(device)) = (&mut address, device) {
            let index = if_nametoindex(device.as_str()).map_err(|err| Failure::Missing {
                object: format!("network device {device}"),
                reason: err.to_string(),
            })?;
            v6.set_scope_id(index);
        }
        Ok(address)
    }
}

/// Makes every TCP and UDP socket. Runs in the container's network namespace.
pub(super) fn open(files: &[File]) -> Result<Vec<(usize, OwnedFd)>, (usize, Failure)> {
    let mut made = Vec::new();
    let sockets = files.iter().enumerate().filter_map(|(id, file)| match &file.kind {
        Kind::Inet(image) => Some((id, file, image)),
        _ => None,
    });
    let sockets: Vec<_> = sockets.collect();
    for (id, _, image) in &sockets {
        made.push((*id, create(image).map_err(|err| (*id, err))?));
    }
    for ((id, file, image), (_, fd)) in sockets.iter().zip(&made) {
        let done = activate(image, fd).and_then(|()| super::set_flags(fd, file.flags));
        done.map_err(|err| (*id, err))?;
    }
    Ok(made)
}

/// Makes a socket and binds it.
fn create(image: &Image) -> Result<OwnedFd, Failure> {
    let Image { v6, kind, protocol, owner, options, bound, state, groups } = image;
    let family = if *v6 { libc::AF_INET6 } else { libc::AF_INET };
    if !is_known(*kind, *protocol) {
        return Err(Failure::Damaged("a socket of unknown kind"));
    }
    let fd = socket::create(family, *kind, *protocol, *owner)?;
    sockopt::restore(options, fd.as_fd())?;
    multicast::restore(groups, fd.as_fd())?;
    if let Some(bound) = bound {
        let address = bound.resolve()?;
        lenient(fd.as_fd(), *v6).making("prepare a socket")?;
        if let State::Established(_, connection) = state {
            tcp::begin(connection, fd.as_fd())?;
        }
        rustix::net::bind(&fd, &address).making(&format!("bind {address}"))?;
    }
    Ok(fd)
}

/// Lets `bind` succeed beside other sockets on the port and before the
/// address is up.
fn lenient(fd: BorrowedFd<'_>, v6: bool) -> std::io::Result<()> {
    raw::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    if v6 {
        raw::set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_FREEBIND, 1)
    } else {
        raw::set_int(fd, libc::IPPROTO_IP, libc::IP_FREEBIND, 1)
    }
}

/// Listens or connects once every socket is bound.
fn activate(image: &Image, fd: &OwnedFd) -> Result<(), Failure> {
    let Image { options, bound, state, .. } = image;
    match state {
        // One that connects does so when it may speak.
        State::Idle | State::Closed | State::Connecting(_) => (),
        State::Listening(backlog) => {
            let backlog = i32::try_from(*backlog).unwrap_or(i32::MAX);
            rustix::net::listen(fd, backlog).making("listen")?;
        }
        State::Connected(peer) => {
            let peer = peer.resolve()?;
            rustix::net::connect(fd, &peer).making(&format!("connect to {peer}"))?;
        }
        State::Established(peer, connection) => {
            let bound =
                bound.as_ref().ok_or(Failure::Damaged("a connection without an address"))?;
            tcp::connect(connection, fd.as_fd(), bound.resolve()?, peer.resolve()?)?;
        }
    }
    // Takes back what was lent for `bind`.
    sockopt::restore(options, fd.as_fd())
}

/// What a connection still lacks when all else is ready.
#[derive(Debug)]
pub(super) struct Pending {
    file: usize,
    step: Step,
    options: sockopt::Image,
}

#[derive(Debug)]
enum Step {
    Speak(tcp::Ending),
    Connect(SocketAddr),
}

impl Pending {
    /// Lets the connections of an image speak, or be made.
    pub(super) fn all(files: &[File]) -> Result<Vec<Self>, (usize, Failure)> {
        let mut all = Vec::new();
        for (file, image) in files.iter().enumerate() {
            let Kind::Inet(image) = &image.kind else { continue };
            let step = match &image.state {
                State::Established(_, connection) => Step::Speak(connection.ending()),
                State::Connecting(peer) => {
                    Step::Connect(peer.resolve().map_err(|err| (file, err))?)
                }
                _ => continue,
            };
            all.push(Self { file, step, options: image.options.clone() });
        }
        Ok(all)
    }

    pub(super) fn file(&self) -> usize {
        self.file
    }

    pub(super) fn arm(&self, fd: &OwnedFd) -> Result<(), Failure> {
        match &self.step {
            Step::Speak(ending) => tcp::arm(ending, fd.as_fd()).making("let it speak")?,
            Step::Connect(peer) => {
                let flags = rustix::fs::fcntl_getfl(fd).making("read the flags")?;
                rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK).making("set the flags")?;
                match rustix::net::connect(fd, peer) {
                    Ok(()) | Err(rustix::io::Errno::INPROGRESS) => (),
                    Err(err) => return Err(err).making(&format!("connect to {peer}")),
                }
                rustix::fs::fcntl_setfl(fd, flags).making("set the flags")?;
            }
        }
        // Repair had its own idea of who may share the port.
        sockopt::restore(&self.options, fd.as_fd())
    }
}
