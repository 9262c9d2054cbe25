//! Unix sockets made again: named, connected, filled.
//!
//! A connection is made as it once was, through a listener of that name, but
//! inside a directory nobody else sees, so that no stranger can answer.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
        SocketAddrUnix, SocketFlags, SocketType, sendmsg, sendmsg_addr, socketpair,
    },
};

use super::{
    super::{Failure, File, Kind, Making, Target, socket, sockopt},
    Image, Message, NO_RECEIVE, NO_SEND, Name, NameFile, Peer,
};
use crate::sys::sockopt as raw;

type Fault = (usize, Failure);

/// A socket's file that waits under another name until the source's, which may
/// lie in the same directory, is no longer needed. Dropped before that, it goes.
#[derive(Debug)]
pub(in super::super) struct Placed {
    directory: OwnedFd,
    waiting: Option<Vec<u8>>,
    name: Vec<u8>,
}

impl Placed {
    /// Takes the name over.
    pub(in super::super) fn arm(&mut self) -> io::Result<()> {
        if let Some(waiting) = self.waiting.take() {
            rustix::fs::renameat(&self.directory, &waiting[..], &self.directory, &self.name[..])?;
        }
        Ok(())
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            // Whoever removed it first is as good.
            let _gone = rustix::fs::unlinkat(&self.directory, &waiting[..], AtFlags::empty());
        }
    }
}

/// Makes every unix socket into `made`. Runs in the container's network
/// namespace, on a thread whose root directory is its own.
pub(in super::super) fn open(
    files: &[File],
    target: &Target<'_>,
    made: &mut [Option<OwnedFd>],
) -> Result<Vec<Placed>, Fault> {
    let mut all = Vec::new();
    for (id, file) in files.iter().enumerate() {
        if let Kind::Unix(image) = &file.kind {
            all.push((id, image));
        }
    }
    let Some(&(first, _)) = all.first() else { return Ok(Vec::new()) };
    let mut maker = Maker { files, all, made, spare: HashMap::new(), renamed: Vec::new() };
    maker.connections().map_err(|fault| fault.at(first))?;
    enter(target.root).making("enter the container").map_err(|err| (first, err))?;
    maker.singles()?;
    maker.fill()?;
    maker.connect()?;
    maker.finish()?;
    maker.place().making("put the file of a socket in its place").map_err(|err| (first, err))
}

/// A fault whose socket may not be known yet.
struct Early(Option<usize>, Failure);

impl Early {
    fn at(self, first: usize) -> Fault {
        (self.0.unwrap_or(first), self.1)
    }
}

/// A path that is ours only until all sockets are made.
struct Renamed {
    directory: Vec<u8>,
    path: Vec<u8>,
    /// Where the file that had the path before is.
    old: Option<Vec<u8>>,
    /// Where ours is to wait; one that is unlinked goes.
    new: Option<Vec<u8>>,
}

struct Maker<'a> {
    files: &'a [File],
    all: Vec<(usize, &'a Image)>,
    made: &'a mut [Option<OwnedFd>],
    /// Peers that are gone, kept until the queue is filled.
    spare: HashMap<usize, OwnedFd>,
    renamed: Vec<Renamed>,
}

impl<'a> Maker<'a> {
    fn image(&self, id: u32) -> &'a Image {
        match &self.files[id as usize].kind {
            Kind::Unix(image) => image,
            _ => unreachable!("the image was checked"),
        }
    }

    /// Pairs and connections, before anything else has their names.
    fn connections(&mut self) -> Result<(), Early> {
        let mut inside = false;
        for (id, image) in self.all.clone() {
            let other = match image.peer {
                Peer::Mutual(peer) if (peer as usize) > id => Some(self.image(peer)),
                Peer::Gone => None,
                _ => continue,
            };
            let named = image.name.is_some() || other.is_some_and(|other| other.name.is_some());
            if named && image.kind == libc::SOCK_DGRAM {
                continue; // has a name to connect to
            }
            if named && !inside {
                hide().making("make a private directory").map_err(|err| Early(None, err))?;
                inside = true;
            }
            let pair = match (&image.name, other.and_then(|other| other.name.as_ref())) {
                (None, None) => pair(image.kind),
                // The side with a name is the one that was accepted.
                (Some(server), client) => connection(image.kind, server, client),
                (None, Some(server)) => {
                    connection(image.kind, server, None).map(|(server, client)| (client, server))
                }
            };
            let (ours, theirs) = pair.map_err(|err| Early(Some(id), err))?;
            self.made[id] = Some(ours);
            match image.peer {
                Peer::Mutual(peer) => self.made[peer as usize] = Some(theirs),
                _ => drop(self.spare.insert(id, theirs)),
            }
        }
        Ok(())
    }

    /// All others, bound to their names; listeners listen.
    fn singles(&mut self) -> Result<(), Fault> {
        for (id, image) in self.all.clone() {
            if self.made[id].is_none() {
                let fd = self.single(image).map_err(|err| (id, err))?;
                self.made[id] = Some(fd);
            }
        }
        for (id, image) in &self.all {
            let (Some(fd), Peer::Pending(listener)) = (&self.made[*id], &image.peer) else {
                continue;
            };
            let listener = self.image(*listener).name.as_ref();
            let done = listener
                .ok_or(Failure::Damaged("a listener without a name"))
                .and_then(|name| connect(fd, name));
            done.map_err(|err| (*id, err))?;
        }
        Ok(())
    }

    fn single(&mut self, image: &Image) -> Result<OwnedFd, Failure> {
        let fd = create(image.kind)?;
        if let Some(name) = &image.name {
            self.bind(&fd, name)?;
        }
        if let Some(backlog) = image.backlog {
            let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
            rustix::net::listen(&fd, backlog).making("listen")?;
        }
        Ok(fd)
    }

    /// Binds to a name; whatever has the path steps aside until all is done.
    fn bind(&mut self, fd: &OwnedFd, name: &Name) -> Result<(), Failure> {
        let Name { bytes, file } = name;
        let Some(NameFile { directory, linked, mode, owner: (uid, gid) }) = file else {
            return bind(fd, name);
        };
        rustix::process::chdir(&directory[..]).making("enter a socket's directory")?;
        let beside = |what: &str| [bytes, what.as_bytes()].concat();
        let aside = beside(".dunlin-old");
        let exists = rustix::fs::lstat(&bytes[..]).is_ok();
        if exists {
            rustix::fs::rename(&bytes[..], &aside[..]).making("put a stale socket aside")?;
        }
        bind(fd, name)?;
        if *linked {
            let (uid, gid) = (rustix::fs::Uid::from_raw(*uid), rustix::fs::Gid::from_raw(*gid));
            rustix::fs::chown(&bytes[..], Some(uid), Some(gid)).making("own a socket's file")?;
            rustix::fs::chmod(&bytes[..], Mode::from_raw_mode(*mode))
                .making("set the mode of a socket's file")?;
        }
        if !linked || exists {
            self.renamed.push(Renamed {
                directory: directory.clone(),
                path: bytes.clone(),
                old: exists.then_some(aside),
                new: linked.then(|| beside(".dunlin-new")),
            });
        }
        Ok(())
    }

    /// Sends what was received, each message by whom it came from.
    fn fill(&mut self) -> Result<(), Fault> {
        for (id, image) in &self.all {
            for message in &image.queue {
                self.send(*id, image, message).map_err(|err| (*id, err))?;
            }
        }
        self.spare.clear();
        Ok(())
    }

    fn send(&self, id: usize, image: &Image, message: &Message) -> Result<(), Failure> {
        let Message { data, files, from } = message;
        let files: Option<Vec<BorrowedFd<'_>>> =
            files.iter().map(|file| self.made[*file as usize].as_ref().map(AsFd::as_fd)).collect();
        let files = files.ok_or(Failure::Damaged("a message with a file that is not made"))?;
        let connected = match image.peer {
            Peer::Mutual(peer) if !is_by_name(image, self.image(peer)) => {
                self.made[peer as usize].as_ref()
            }
            _ => self.spare.get(&id),
        };
        if let Some(peer) = connected {
            return send(peer, None, data, &files);
        }
        let Some(name) = &image.name else {
            return Err(Failure::Damaged("a message to a socket nobody can reach"));
        };
        let known = from.as_ref().and_then(|from| {
            let (id, _) = self.all.iter().find(|(_, other)| {
                other.kind == image.kind
                    && other.name.as_ref().is_some_and(|name| name.bytes == *from)
            })?;
            self.made[*id].as_ref()
        });
        match known {
            Some(sender) => send(sender, Some(name), data, &files),
            // Whoever sent it has closed; its name is lost.
            None => send(&create(image.kind)?, Some(name), data, &files),
        }
    }

    /// Connects the datagram sockets, which then hear nobody else.
    fn connect(&self) -> Result<(), Fault> {
        for (id, image) in &self.all {
            let Some(fd) = &self.made[*id] else { continue };
            let done = match &image.peer {
                Peer::Mutual(peer) if is_by_name(image, self.image(*peer)) => {
                    self.connect_to(fd, *peer)
                }
                Peer::Towards(peer) => self.connect_to(fd, *peer),
                Peer::Outside(name) => {
                    let name = Name { bytes: name.clone(), file: None };
                    connect(fd, &name)
                }
                _ => Ok(()),
            };
            done.map_err(|err| (*id, err))?;
        }
        Ok(())
    }

    fn connect_to(&self, fd: &OwnedFd, peer: u32) -> Result<(), Failure> {
        let name = self.image(peer).name.as_ref();
        connect(fd, name.ok_or(Failure::Damaged("a peer without a name"))?)
    }

    fn finish(&self) -> Result<(), Fault> {
        for (id, image) in &self.all {
            let Some(fd) = &self.made[*id] else { continue };
            let done = socket::chown(fd.as_fd(), image.owner)
                .and_then(|()| sockopt::restore(&image.options, fd.as_fd()))
                .and_then(|()| shut(fd, image.shutdown))
                .and_then(|()| super::super::set_flags(fd, self.files[*id].flags));
            done.map_err(|err| (*id, err))?;
        }
        Ok(())
    }

    /// Gives paths back to whom they belonged before; ours wait beside them.
    fn place(self) -> io::Result<Vec<Placed>> {
        let mut placed = Vec::new();
        for Renamed { directory, path, old, new } in self.renamed {
            rustix::process::chdir(&directory[..])?;
            if let Some(new) = new {
                rustix::fs::rename(&path[..], &new[..])?;
                let (parent, name) = split(&path);
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                placed.push(Placed {
                    directory: rustix::fs::open(parent, flags, Mode::empty())?,
                    waiting: Some(split(&new).1.to_vec()),
                    name: name.to_vec(),
                });
            } else {
                rustix::fs::unlink(&path[..])?;
            }
            if let Some(old) = old {
                rustix::fs::rename(&old[..], &path[..])?;
            }
        }
        Ok(placed)
    }
}

/// The directory of a path, and the name in it.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..=at], &path[at + 1..]),
        None => (b".", path),
    }
}

/// Whether two datagram sockets found each other by name, unlike a pair.
fn is_by_name(a: &Image, b: &Image) -> bool {
    a.kind == libc::SOCK_DGRAM && (a.name.is_some() || b.name.is_some())
}

fn enter(root: BorrowedFd<'_>) -> io::Result<()> {
    rustix::process::fchdir(root)?;
    Ok(rustix::process::chroot(".")?)
}

/// Makes an empty file system that has no place in any tree, and enters it.
fn hide() -> io::Result<()> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(fs.as_fd())?;
    let mount = fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    enter(mount.as_fd())
}

fn create(kind: i32) -> Result<OwnedFd, Failure> {
    socket::create(libc::AF_UNIX, kind, 0, (0, 0))
}

fn pair(kind: i32) -> Result<(OwnedFd, OwnedFd), Failure> {
    let kind = SocketType::from_raw(kind.cast_unsigned());
    socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .making("make a pair of sockets")
}

/// Connects a client to a listener of the server's name; returns the accepted
/// side and the client's.
fn connection(
    kind: i32,
    server: &Name,
    client_name: Option<&Name>,
) -> Result<(OwnedFd, OwnedFd), Failure> {
    let listener = create(kind)?;
    prepare(server).and_then(|()| bind(&listener, server))?;
    rustix::net::listen(&listener, 1).making("listen")?;
    let client = create(kind)?;
    if let Some(name) = client_name {
        prepare(name).and_then(|()| bind(&client, name))?;
    }
    connect(&client, server)?;
    let accepted = rustix::net::accept_with(&listener, SocketFlags::CLOEXEC).making("accept")?;
    for name in [Some(server), client_name].into_iter().flatten() {
        if name.bytes[0] != 0 {
            rustix::fs::unlink(&name.bytes[..]).making("remove a private name")?;
        }
    }
    Ok((accepted, client))
}

/// Makes the directories that lead to a private name.
fn prepare(name: &Name) -> Result<(), Failure> {
    if name.bytes.first() == Some(&0) {
        return Ok(());
    }
    let slashes = name.bytes.iter().enumerate().skip(1).filter(|(_, byte)| **byte == b'/');
    for (end, _) in slashes {
        match rustix::fs::mkdir(&name.bytes[..end], Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => (),
            Err(err) => return Err(err).making("make a private directory"),
        }
    }
    Ok(())
}

fn address(name: &Name) -> Result<SocketAddrUnix, Failure> {
    match &name.bytes[..] {
        [] => Err(Failure::Damaged("an empty socket name")),
        [0, name @ ..] => SocketAddrUnix::new_abstract_name(name).making("name a socket"),
        path => SocketAddrUnix::new(path).making("name a socket"),
    }
}

fn bind(fd: &OwnedFd, name: &Name) -> Result<(), Failure> {
    rustix::net::bind(fd, &address(name)?)
        .making(&format!("bind {}", String::from_utf8_lossy(&name.bytes)))
}

fn connect(fd: &OwnedFd, name: &Name) -> Result<(), Failure> {
    if let Some(file) = &name.file {
        // Inside a private directory the name alone leads there.
        let _stay = rustix::process::chdir(&file.directory[..]);
    }
    rustix::net::connect(fd, &address(name)?)
        .making(&format!("connect to {}", String::from_utf8_lossy(&name.bytes)))
}

/// Sends one message, with room for it.
fn send(
    from: &OwnedFd,
    to: Option<&Name>,
    data: &[u8],
    files: &[BorrowedFd<'_>],
) -> Result<(), Failure> {
    let room = i32::try_from(data.len()).unwrap_or(i32::MAX).saturating_add(1 << 20);
    let has = raw::get_int(from.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF)
        .making("read the size of a queue")?;
    raw::set_int(
        from.as_fd(),
        libc::SOL_SOCKET,
        libc::SO_SNDBUFFORCE,
        has.saturating_add(room) / 2,
    )
    .making("make room for a queue")?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(Failure::Damaged("too many files in a message"));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let parts = [IoSlice::new(data)];
    let sent = match to {
        None => sendmsg(from, &parts, &mut control, flags),
        Some(name) => sendmsg_addr(from, &address(name)?, &parts, &mut control, flags),
    };
    if sent.making("fill a queue")? != data.len() {
        return Err(Failure::Damaged("a queue longer than a socket takes"));
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
