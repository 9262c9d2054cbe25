//! Unix sockets (`unix(7)`): what they are and whom they are connected to.
//!
//! Not carried: the credentials that `SO_PEERCRED` and queued messages show,
//! which are the engine's afterwards, and a byte sent out of band.

mod make;
mod queue;

use std::os::{
    fd::{AsFd, AsRawFd},
    linux::net::SocketAddrExt,
    unix::{
        ffi::OsStrExt,
        net::{SocketAddr, UnixDatagram},
    },
};

use serde::{Deserialize, Serialize};

pub(super) use self::{
    make::{Placed, open},
    queue::{Message, collect},
};
use super::{
    Collector, Doing, File, Kind, Refusal, Source, sockdiag::UnixSocket, sockopt, table::Held,
};
use crate::sys;

/// Shutdown bits as the kernel counts them.
const NO_RECEIVE: u8 = 1;
const NO_SEND: u8 = 2;

/// A unix socket.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    kind: i32,
    /// User and group.
    owner: (u32, u32),
    options: sockopt::Image,
    /// What it is bound to.
    name: Option<Name>,
    /// Backlog of a listener.
    backlog: Option<u32>,
    peer: Peer,
    /// 1: receives no more; 2: sends no more.
    shutdown: u8,
    /// Messages received and not read; of a stream, stretches of bytes.
    queue: Vec<Message>,
}

/// A socket's name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Name {
    /// A path as it was given to `bind`, or a zero byte and an abstract name.
    bytes: Vec<u8>,
    /// Its file, if it is a path.
    file: Option<NameFile>,
}

/// The file behind a name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct NameFile {
    /// Directory it was bound in, from the container's root.
    directory: Vec<u8>,
    /// Whether the file still has the name.
    linked: bool,
    mode: u32,
    owner: (u32, u32),
}

/// What a socket is connected to. The order is the format: append only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Peer {
    /// Nothing.
    None,
    /// A socket that is closed.
    Gone,
    /// The socket with this index, which is connected to this one.
    Mutual(u32),
    /// Sends to the socket with this index, which is not connected to it.
    Towards(u32),
    /// Connected to this listener, which has not accepted it.
    Pending(u32),
    /// Sends to a name that belongs to someone outside the tree.
    Outside(Vec<u8>),
}

impl Image {
    /// Whether its peers are there and of its kind.
    pub(super) fn is_sound(&self, id: usize, files: &[File]) -> bool {
        let unix = |id: u32| match files.get(id as usize).map(|file| &file.kind) {
            Some(Kind::Unix(other)) if other.kind == self.kind => Some(other),
            _ => None,
        };
        let peer = match self.peer {
            Peer::None | Peer::Gone | Peer::Outside(_) => true,
            Peer::Towards(peer) => unix(peer).is_some(),
            Peer::Pending(peer) => unix(peer).is_some_and(|other| other.backlog.is_some()),
            Peer::Mutual(peer) => unix(peer).is_some_and(|other| {
                matches!(other.peer, Peer::Mutual(back) if back as usize == id)
                    && peer as usize != id
            }),
        };
        let mut sent = self.queue.iter().flat_map(|message| &message.files);
        peer && sent.all(|file| (*file as usize) < files.len())
    }
}

fn diag<'a>(held: &Held, source: &'a Source<'_>) -> Option<&'a UnixSocket> {
    source.sockets.unix.get(&inode(held))
}

fn inode(held: &Held) -> u32 {
    u32::try_from(held.stat.st_ino).unwrap_or(0)
}

/// Whether the socket is connected to someone outside the tree.
pub(super) fn leads_out(held: &Held, source: &Source<'_>) -> bool {
    let peer = diag(held, source).and_then(|socket| socket.peer);
    peer.is_some_and(|peer| peer != 0 && source.tables.socket(held, peer).is_none())
}

pub(super) fn dump(
    id: usize,
    held: &Held,
    kind: i32,
    source: &Source<'_>,
    out: &mut Collector<'_>,
) -> Result<Image, Refusal> {
    let Some(socket) = diag(held, source) else {
        return Err(Refusal::unmovable("is a unix socket the kernel does not list"));
    };
    let name = name(held, source)?;
    judge_pending(held, socket, source, out)?;
    let peer = peer(held, kind, socket, source, out)?;
    Ok(Image {
        kind,
        owner: (held.stat.st_uid, held.stat.st_gid),
        options: sockopt::dump(held, libc::AF_UNIX, 0)?,
        name,
        backlog: socket.listening.then_some(socket.backlog),
        peer,
        shutdown: socket.shutdown & (NO_RECEIVE | NO_SEND),
        queue: source.queues.get(&id).cloned().unwrap_or_default(),
    })
}

/// Connections that wait at a listener come back with their clients.
fn judge_pending(
    held: &Held,
    socket: &UnixSocket,
    source: &Source<'_>,
    out: &mut Collector<'_>,
) -> Result<(), Refusal> {
    let outside = socket
        .pending
        .iter()
        .filter(|client| source.tables.socket(held, **client).is_none())
        .count();
    if outside == 0 {
        return Ok(());
    }
    if source.ctx.options.external_unix {
        out.losses.push(format!("drops {outside} connections from outside the tree"));
        return Ok(());
    }
    Err(Refusal::new(
        format!("has {outside} connections from outside the tree that nobody has accepted yet"),
        "try again in a moment, or accept that they are closed (--ext-unix-sk)",
    ))
}

fn peer(
    held: &Held,
    kind: i32,
    socket: &UnixSocket,
    source: &Source<'_>,
    out: &mut Collector<'_>,
) -> Result<Peer, Refusal> {
    let index = |id: usize| u32::try_from(id).unwrap_or(u32::MAX);
    let inode = match socket.peer {
        None => return Ok(Peer::None),
        // A connection that waits to be accepted has no inode either.
        Some(0) => return pending(held, source).map(|id| id.map_or(Peer::Gone, Peer::Pending)),
        Some(inode) => inode,
    };
    let Some(peer) = source.tables.socket(held, inode) else {
        if !source.ctx.options.external_unix {
            return Err(Refusal::new(
                "is a unix socket connected to a process outside the tree",
                "close it first, or accept that it is closed (--ext-unix-sk)",
            ));
        }
        let their_name = duplicate(held)?.peer_addr().ok().and_then(|name| name_bytes(&name));
        return Ok(match their_name {
            Some(name) if kind == libc::SOCK_DGRAM => {
                out.losses.push("sends to whoever has the name it sent to".to_owned());
                Peer::Outside(name)
            }
            _ => {
                out.losses.push("finds its unix connection to outside the tree closed".into());
                Peer::Gone
            }
        });
    };
    let other = &source.tables.held[peer];
    let back = diag(other, source).and_then(|socket| socket.peer);
    if back.map(u64::from) == Some(held.stat.st_ino) {
        return Ok(Peer::Mutual(index(peer)));
    }
    if kind != libc::SOCK_DGRAM || name(other, source)?.is_none() {
        return Err(Refusal::unmovable("is a unix socket whose peer is connected elsewhere"));
    }
    Ok(Peer::Towards(index(peer)))
}

/// The listener at which this connection waits.
fn pending(held: &Held, source: &Source<'_>) -> Result<Option<u32>, Refusal> {
    let ours = inode(held);
    let listener = source.sockets.unix.iter().find(|(_, other)| other.pending.contains(&ours));
    let Some((listener, _)) = listener else { return Ok(None) };
    let Some(id) = source.tables.socket(held, *listener) else {
        return Err(Refusal::unmovable("waits to be accepted by a process outside the tree"));
    };
    if sent(held)? > 0 {
        return Err(Refusal::new(
            "has sent on a unix connection that nobody has accepted yet",
            "try again in a moment",
        ));
    }
    Ok(Some(u32::try_from(id).unwrap_or(u32::MAX)))
}

/// Bytes the peer has not read.
fn sent(held: &Held) -> Result<i32, Refusal> {
    sys::sockopt::sent(held.fd.as_fd()).doing("read the length of its queue")
}

fn duplicate(held: &Held) -> Result<UnixDatagram, Refusal> {
    Ok(UnixDatagram::from(held.fd.try_clone().doing("duplicate it")?))
}

fn name_bytes(name: &SocketAddr) -> Option<Vec<u8>> {
    match (name.as_pathname(), name.as_abstract_name()) {
        (Some(path), _) => Some(path.as_os_str().as_bytes().to_vec()),
        (_, Some(name)) => Some([&[0], name].concat()),
        _ => None,
    }
}

fn name(held: &Held, source: &Source<'_>) -> Result<Option<Name>, Refusal> {
    let address = duplicate(held)?.local_addr().doing("read its name")?;
    let Some(bytes) = name_bytes(&address) else { return Ok(None) };
    if bytes[0] == 0 {
        return Ok(Some(Name { bytes, file: None }));
    }
    let file = sys::unix::bound_file(held.fd.as_fd()).doing("find its file")?;
    let stat = rustix::fs::fstat(&file).doing("look at its file")?;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let path = source.root.inside(&link.doing("find its file")?);
    let path = path.map(|path| path.into_os_string().into_encoded_bytes()).unwrap_or_default();
    let path = match stat.st_nlink {
        0 => path.strip_suffix(b" (deleted)").unwrap_or(&path),
        _ => &path,
    };
    let directory = match bytes[0] {
        b'/' => Some(&b"/"[..]),
        _ => path.strip_suffix(&bytes[..]),
    };
    let Some(directory) = directory.filter(|directory| directory.ends_with(b"/")) else {
        return Err(Refusal::unmovable("is a unix socket bound to a path we cannot follow"));
    };
    let file = NameFile {
        directory: directory.to_vec(),
        linked: stat.st_nlink > 0,
        mode: stat.st_mode & 0o7777,
        owner: (stat.st_uid, stat.st_gid),
    };
    Ok(Some(Name { bytes, file: Some(file) }))
}
