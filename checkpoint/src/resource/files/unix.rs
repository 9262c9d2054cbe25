//! Unix sockets (`unix(7)`).
//!
//! Queued messages are read with `MSG_PEEK` at an offset, which takes nothing
//! out, and sent again by the restored peer.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{ffi::OsStrExt, net::UnixDatagram},
    },
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, recv,
    send, socketpair,
};
use serde::{Deserialize, Serialize};

use super::{
    Collector, Doing, Failure, File, Kind, Making, Refusal, Source, sockdiag::UnixSocket, socket,
    sockopt, table::Held,
};
use crate::sys::sockopt as raw;

/// Shutdown bits as the kernel counts them.
const NO_RECEIVE: u8 = 1;
const NO_SEND: u8 = 2;

/// A unix socket.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub(crate) kind: i32,
    /// User and group.
    pub(crate) owner: (u32, u32),
    /// Socket options.
    pub(crate) options: sockopt::Image,
    /// The name it is bound to: a path, or a zero byte and an abstract name.
    pub(crate) name: Option<Vec<u8>>,
    /// Backlog of a listener.
    pub(crate) backlog: Option<u32>,
    /// What it is connected to.
    pub(crate) peer: Peer,
    /// 1: receives no more; 2: sends no more.
    pub(crate) shutdown: u8,
    /// Messages received and not read; of a stream, stretches of bytes.
    pub(crate) queue: Vec<Vec<u8>>,
}

/// What a socket is connected to. The order is the format: append only.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Peer {
    /// Nothing.
    None,
    /// A socket that is closed.
    Gone,
    /// The socket with this index.
    File(u32),
}

impl Image {
    /// Whether its peer is there, and is its peer.
    pub(super) fn is_sound(&self, id: usize, files: &[File]) -> bool {
        let Peer::File(peer) = self.peer else { return true };
        let Some(Kind::Unix(other)) = files.get(peer as usize).map(|file| &file.kind) else {
            return false;
        };
        let mutual = matches!(other.peer, Peer::File(back) if back as usize == id);
        mutual && peer as usize != id && other.kind == self.kind
    }
}

fn diag<'a>(held: &Held, source: &'a Source<'_>) -> Option<&'a UnixSocket> {
    source.sockets.unix.get(&u32::try_from(held.stat.st_ino).ok()?)
}

fn find(inode: u32, source: &Source<'_>) -> Option<usize> {
    let held = &source.tables.held;
    held.iter().position(|held| held.is_socket() && held.stat.st_ino == u64::from(inode))
}

/// Whether the socket is connected to someone outside the tree.
pub(super) fn leads_out(held: &Held, source: &Source<'_>) -> bool {
    let peer = diag(held, source).and_then(|socket| socket.peer);
    peer.is_some_and(|peer| peer != 0 && find(peer, source).is_none())
}

pub(super) fn dump(
    held: &Held,
    kind: i32,
    source: &Source<'_>,
    out: &mut Collector<'_>,
) -> Result<Image, Refusal> {
    let Some(socket) = diag(held, source) else {
        return Err(Refusal::unmovable("is a unix socket the kernel does not list"));
    };
    let name = name(held)?;
    if !socket.pending.is_empty() {
        return Err(Refusal::new(
            "is a unix socket with connections nobody has accepted yet",
            "try again in a moment",
        ));
    }
    let peer = match socket.peer {
        None => Peer::None,
        Some(0) => Peer::Gone,
        Some(inode) => match find(inode, source) {
            Some(peer) => mutual_peer(held, &name, peer, source)?,
            None if source.ctx.options.external_unix => {
                out.losses.push("finds its unix connection to outside the tree closed".into());
                Peer::Gone
            }
            None => {
                return Err(Refusal::new(
                    "is a unix socket connected to a process outside the tree",
                    "close it first, or accept that it is closed (--ext-unix-sk)",
                ));
            }
        },
    };
    let queued = || rustix::io::ioctl_fionread(&held.fd).doing("read the length of its queue");
    if socket.peer.is_none() && !socket.listening && queued()? > 0 {
        return Err(Refusal::unmovable("is an unconnected unix socket with queued messages"));
    }
    let queue = match peer {
        Peer::None => Vec::new(),
        _ if source.frozen => queue(held, kind, socket).doing("read its queue")?,
        _ => Vec::new(),
    };
    Ok(Image {
        kind,
        owner: (held.stat.st_uid, held.stat.st_gid),
        options: sockopt::dump(held, libc::AF_UNIX, 0)?,
        name,
        backlog: socket.listening.then_some(socket.backlog),
        peer,
        shutdown: socket.shutdown & (NO_RECEIVE | NO_SEND),
        queue,
    })
}

fn name(held: &Held) -> Result<Option<Vec<u8>>, Refusal> {
    let socket = UnixDatagram::from(held.fd.try_clone().doing("duplicate it")?);
    let address = socket.local_addr().doing("read its name")?;
    if let Some(name) = address.as_abstract_name() {
        return Ok(Some([&[0], name].concat()));
    }
    match address.as_pathname() {
        None => Ok(None),
        Some(path) if path.is_absolute() => Ok(Some(path.as_os_str().as_bytes().to_vec())),
        Some(_) => Err(Refusal::unmovable("is a unix socket bound to a relative path")),
    }
}

/// The peer, if the two are a pair that stands alone.
fn mutual_peer(
    held: &Held,
    name: &Option<Vec<u8>>,
    peer: usize,
    source: &Source<'_>,
) -> Result<Peer, Refusal> {
    let other = &source.tables.held[peer];
    let back = diag(other, source).and_then(|socket| socket.peer);
    if back.map(u64::from) != Some(held.stat.st_ino) {
        return Err(Refusal::unmovable("is a unix socket whose peer is not connected back"));
    }
    if name.is_some() || self::name(other)?.is_some() {
        return Err(Refusal::unmovable("is a unix connection made through a name"));
    }
    Ok(Peer::File(u32::try_from(peer).unwrap_or(u32::MAX)))
}

/// Everything in the receive queue, read without taking it out.
fn queue(held: &Held, kind: i32, socket: &UnixSocket) -> io::Result<Vec<Vec<u8>>> {
    let fd = held.fd.as_fd();
    let before = raw::get_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    raw::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
    let queue = peek_all(held, kind, socket);
    raw::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, before)?;
    queue
}

fn peek_all(held: &Held, kind: i32, socket: &UnixSocket) -> io::Result<Vec<Vec<u8>>> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::TRUNC;
    let mut messages = Vec::new();
    // One message is never longer than the sender's buffer.
    let mut buf = vec![0; 1 << 20];
    loop {
        match recv(&held.fd, &mut buf[..], flags) {
            Err(rustix::io::Errno::AGAIN) => return Ok(messages),
            Err(err) => return Err(err.into()),
            // The end of a stream, or of a connection whose peer has gone.
            Ok((_, 0)) if kind == libc::SOCK_STREAM => return Ok(messages),
            Ok((_, 0)) if socket.shutdown & NO_RECEIVE != 0 => return Ok(messages),
            Ok((_, len)) => messages.push(
                buf.get(..len).ok_or_else(|| io::Error::other("a message beyond 1 MiB"))?.to_vec(),
            ),
        }
    }
}

/// Makes every unix socket. Runs in the container's network namespace and
/// root directory.
pub(super) fn open(files: &[File]) -> Result<Vec<(usize, OwnedFd)>, (usize, Failure)> {
    let mut made = Vec::new();
    for (id, file) in files.iter().enumerate() {
        let Kind::Unix(image) = &file.kind else { continue };
        let done = match image.peer {
            Peer::None => open_single(image).map(|fd| made.push((id, fd))),
            Peer::Gone => open_pair(image, None).map(|(fd, _gone)| made.push((id, fd))),
            Peer::File(peer) if (peer as usize) < id => Ok(()), // made with its peer
            Peer::File(peer) => {
                let Kind::Unix(other) = &files[peer as usize].kind else { continue };
                open_pair(image, Some(other)).map(|(fd, other)| {
                    made.push((id, fd));
                    made.push((peer as usize, other));
                })
            }
        };
        done.map_err(|err| (id, err))?;
    }
    for (id, fd) in &made {
        super::set_flags(fd, files[*id].flags).map_err(|err| (*id, err))?;
    }
    Ok(made)
}

fn open_single(image: &Image) -> Result<OwnedFd, Failure> {
    let Image { kind, owner, options, name, backlog, peer: _, shutdown, queue: _ } = image;
    let fd = socket::create(libc::AF_UNIX, *kind, 0, *owner)?;
    sockopt::restore(options, fd.as_fd())?;
    if let Some(name) = name {
        bind(&fd, name)?;
    }
    if let Some(backlog) = backlog {
        let backlog = i32::try_from(*backlog).unwrap_or(i32::MAX);
        rustix::net::listen(&fd, backlog).making("listen")?;
    }
    shut(&fd, *shutdown)?;
    Ok(fd)
}

/// Binds to a name; a socket file left there by the source makes room.
fn bind(fd: &OwnedFd, name: &[u8]) -> Result<(), Failure> {
    let what = format!("bind {}", String::from_utf8_lossy(name));
    let address = match name {
        [0, name @ ..] => SocketAddrUnix::new_abstract_name(name),
        path => {
            let is_socket = |stat: rustix::fs::Stat| stat.st_mode & libc::S_IFMT == libc::S_IFSOCK;
            if rustix::fs::lstat(path).is_ok_and(is_socket) {
                rustix::fs::unlink(path).making("remove a stale unix socket")?;
            }
            SocketAddrUnix::new(path)
        }
    };
    let address = address.map_err(|_| Failure::Damaged("a socket name that is too long"))?;
    rustix::net::bind(fd, &address).making(&what)
}

/// Makes two sockets connected to each other, each with its queue filled.
fn open_pair(image: &Image, other: Option<&Image>) -> Result<(OwnedFd, OwnedFd), Failure> {
    let kind = SocketType::from_raw(image.kind.cast_unsigned());
    let (a, b) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .making("make a pair of sockets")?;
    fill(&b, &image.queue)?;
    if let Some(other) = other {
        fill(&a, &other.queue)?;
    }
    for (fd, image) in [(&a, Some(image)), (&b, other)] {
        let Some(Image {
            kind: _,
            owner,
            options,
            name: _,
            backlog: _,
            peer: _,
            shutdown,
            queue: _,
        }) = image
        else {
            continue;
        };
        socket::chown(fd.as_fd(), *owner)?;
        sockopt::restore(options, fd.as_fd())?;
        shut(fd, *shutdown)?;
    }
    Ok((a, b))
}

/// Sends what the peer had received, with room for all of it.
fn fill(from: &OwnedFd, queue: &[Vec<u8>]) -> Result<(), Failure> {
    if queue.is_empty() {
        return Ok(());
    }
    let room: usize = queue.iter().map(|message| 2 * message.len() + 4096).sum();
    let room = i32::try_from(room).unwrap_or(i32::MAX / 2);
    raw::set_int(from.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, room)
        .making("make room for a queue")?;
    for message in queue {
        let sent = send(from, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            .making("fill a queue")?;
        if sent != message.len() {
            return Err(Failure::Damaged("a queue longer than a socket takes"));
        }
    }
    Ok(())
}

fn shut(fd: &OwnedFd, shutdown: u8) -> Result<(), Failure> {
    let how = match (shutdown & NO_RECEIVE != 0, shutdown & NO_SEND != 0) {
        (false, false) => return Ok(()),
        (true, false) => Shutdown::Read,
        (false, true) => Shutdown::Write,
        (true, true) => Shutdown::Both,
    };
    match rustix::net::shutdown(fd, how) {
        // One that was never connected has nothing to shut down.
        Err(rustix::io::Errno::NOTCONN) => Ok(()),
        done => done.making("shut down a socket"),
    }
}
