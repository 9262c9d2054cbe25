//! Messages a unix socket has received and nobody has read.
//!
//! They are read with `MSG_PEEK` at an offset, which takes nothing out. Files
//! in them are duplicated into the engine by that, like those of fd tables.

use std::{
    collections::HashMap,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketAddrAny, recvmsg,
};
use serde::{Deserialize, Serialize};

use super::{
    super::{sockdiag::UnixSocket, table::Tables},
    NO_RECEIVE,
};
use crate::sys::{self, sockopt};

/// Most files one message can hold (`SCM_MAX_FD`).
const MOST_FILES: usize = 253;
/// A message is never longer than its sender's buffer, whose limit is far
/// lower unless root has raised it.
const LONGEST: usize = 4 << 20;

/// One message.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Message {
    pub(super) data: Vec<u8>,
    /// Files in it, by index.
    pub(super) files: Vec<u32>,
    /// The name of a datagram's sender.
    pub(super) from: Option<Vec<u8>>,
}

/// Reads the queue of every unix socket; the files found in them join
/// `tables`, and so do those in their queues.
pub(in super::super) fn collect(
    tables: &mut Tables,
    sockets: &HashMap<u32, UnixSocket>,
) -> io::Result<HashMap<usize, Vec<Message>>> {
    let mut queues = HashMap::new();
    let mut id = 0;
    while id < tables.held.len() {
        let held = &tables.held[id];
        let inode = u32::try_from(held.stat.st_ino).unwrap_or(0);
        let socket = held.is_socket().then(|| sockets.get(&inode)).flatten();
        if let Some(socket) = socket.filter(|socket| !socket.listening) {
            let peeked = queue(&held.fd, socket)?;
            let name = held.name();
            let mut messages = Vec::with_capacity(peeked.len());
            for (mut message, files) in peeked {
                for file in files {
                    message.files.push(tables.adopt(file, &name)?);
                }
                messages.push(message);
            }
            queues.insert(id, messages);
        }
        id += 1;
    }
    Ok(queues)
}

type Peeked = (Message, Vec<OwnedFd>);

fn queue(fd: &OwnedFd, socket: &UnixSocket) -> io::Result<Vec<Peeked>> {
    let option = |name| sockopt::get_int(fd.as_fd(), libc::SOL_SOCKET, name);
    let is_stream = option(libc::SO_TYPE)? == libc::SOCK_STREAM;
    let before = option(libc::SO_PEEK_OFF)?;
    let messages = peek_all(fd, is_stream, socket);
    peek_at(fd, before)?;
    messages
}

fn peek_at(fd: &OwnedFd, offset: i32) -> io::Result<()> {
    sockopt::set_int(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
}

fn peek_all(fd: &OwnedFd, is_stream: bool, socket: &UnixSocket) -> io::Result<Vec<Peeked>> {
    let mut messages = Vec::new();
    let mut buf = vec![0; LONGEST];
    let mut offset = 0;
    peek_at(fd, 0)?;
    while let Some((mut message, files)) = peek(fd, &mut buf)? {
        let len = message.data.len();
        if is_stream {
            message.from = None;
        }
        // The end of a stream, or of a connection whose peer has gone.
        if len == 0 && (is_stream || socket.shutdown & NO_RECEIVE != 0) {
            break;
        }
        if is_stream && !files.is_empty() {
            // The look ended with the part that has the files. What was sent
            // before must stay readable without them.
            peek_at(fd, offset)?;
            let before = sys::unix::peek_whole_parts(fd.as_fd(), len - 1)?;
            let data = message.data.split_off(before);
            if before > 0 {
                messages.push((message, Vec::new()));
            }
            message = Message { data, ..Message::default() };
        }
        messages.push((message, files));
        if is_stream {
            offset += i32::try_from(len).map_err(io::Error::other)?;
            peek_at(fd, offset)?;
        }
    }
    Ok(messages)
}

fn peek(fd: &OwnedFd, buf: &mut [u8]) -> io::Result<Option<Peeked>> {
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::TRUNC | RecvFlags::CMSG_CLOEXEC;
    let room = buf.len();
    let got = match recvmsg(fd, &mut [IoSliceMut::new(buf)], &mut control, flags) {
        Err(rustix::io::Errno::AGAIN) => return Ok(None),
        got => got?,
    };
    if got.bytes > room || got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("a message too long to be moved"));
    }
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            files.extend(fds);
        }
    }
    let from = got.address.as_ref().and_then(sender);
    Ok(Some((Message { data: buf[..got.bytes].to_vec(), files: Vec::new(), from }, files)))
}

/// The sender's name; one without a name has none to show.
fn sender(address: &SocketAddrAny) -> Option<Vec<u8>> {
    if usize::try_from(address.addr_len()).ok()? <= size_of::<libc::sa_family_t>() {
        return None;
    }
    let unix = rustix::net::SocketAddrUnix::try_from(address.clone()).ok()?;
    match (unix.path_bytes(), unix.abstract_name()) {
        (Some(path), _) => Some(path.to_vec()),
        (_, Some(name)) => Some([&[0], name].concat()),
        _ => None,
    }
}
