//! Unix sockets.

use std::{
    io::{Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
    },
};

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
    SocketFlags, SocketType, recv, send, sendmsg, socketpair, sockopt,
};

use super::*;

pub(super) fn pairs() {
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

pub(super) fn listening() {
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

/// Connections made through a name.
pub(super) fn named() {
    let path = format!("{}/server", dir());
    let listener = UnixListener::bind(&path).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.write_all(b"question").unwrap();
    server.write_all(b"answer").unwrap();
    let mut gone = UnixStream::connect(&path).unwrap();
    gone.write_all(b"farewell").unwrap();
    put(listener.accept().unwrap().0, 103);
    drop(gone);
    put(UnixStream::connect(&path).unwrap(), 104);
    put(listener, 100);
    put(server, 101);
    put(client, 102);

    let name = SocketAddr::from_abstract_name(b"dunlin named").unwrap();
    let listener = UnixListener::bind_addr(&name).unwrap();
    put(UnixStream::connect_addr(&name).unwrap(), 105);
    put(listener.accept().unwrap().0, 106);

    std::env::set_current_dir(dir()).unwrap();
    put(UnixListener::bind("relative").unwrap(), 107);
    put(UnixListener::bind("unlinked").unwrap(), 108);
    fs::remove_file("unlinked").unwrap();
}

#[test]
fn unix_connections_keep_names_and_peers() {
    let Some(mut holder) = Holder::start("unix_named") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let mut restored = holder.migrate();
    restored.assert_same(100..=108);
    assert_eq!(receive(&restored, 101).unwrap(), b"question");
    assert_eq!(receive(&restored, 102).unwrap(), b"answer");
    let stream = |number| UnixStream::from(restored.fd(number).try_clone_to_owned().unwrap());
    let path = holder.dir.path().join("server");
    assert_eq!(stream(101).local_addr().unwrap().as_pathname(), Some(&*path));
    assert_eq!(stream(102).peer_addr().unwrap().as_pathname(), Some(&*path));
    assert_eq!(receive(&restored, 103).unwrap(), b"farewell");
    assert_eq!(receive(&restored, 103).unwrap(), b"");

    // The one that waited waits again; others can come.
    let listener = UnixListener::from(restored.fd(100).try_clone_to_owned().unwrap());
    stream(104).write_all(b"w").unwrap();
    listener.accept().unwrap().0.read_exact(&mut [0]).unwrap();
    UnixStream::connect(&path).unwrap();

    let name = SocketAddr::from_abstract_name(b"dunlin named").unwrap();
    assert_eq!(stream(106).local_addr().unwrap().as_abstract_name(), name.as_abstract_name());
    stream(105).write_all(b"a").unwrap();
    assert_eq!(receive(&restored, 106).unwrap(), b"a");

    let relative = UnixListener::from(restored.fd(107).try_clone_to_owned().unwrap());
    let name = relative.local_addr().unwrap();
    assert_eq!(name.as_pathname().unwrap().to_str(), Some("relative"));
    UnixStream::connect(holder.dir.path().join("relative")).unwrap();
    assert!(!holder.dir.path().join("unlinked").exists());
    let names = || fs::read_dir(holder.dir.path()).unwrap().count();
    assert_eq!(names(), 2);
    restored.opened = empty();
    assert_eq!(names(), 2);
}

fn empty() -> Opened {
    let (root, netns) = (root(), new_netns());
    let stdio = [root.as_fd(); 3];
    let objects = &Created::default();
    let host = &|_| None;
    let target = Target { root: root.as_fd(), netns: netns.as_fd(), stdio, objects, host };
    open(&Image::default(), &target).unwrap()
}

/// Until it is armed, a restore leaves the source's socket files alone.
#[test]
fn a_dropped_restore_leaves_no_trace() {
    let Some(holder) = Holder::start("unix_named") else { return };
    let image = holder.dump();
    let path = holder.dir.path().join("server");
    let before = fs::metadata(&path).unwrap();
    let (root, netns) = (root(), new_netns());
    let stdio = [root.as_fd(); 3];
    let objects = &Created::default();
    let host = &|_| None;
    let target = Target { root: root.as_fd(), netns: netns.as_fd(), stdio, objects, host };
    drop(open(&image, &target).unwrap());
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(&path).unwrap().ino(), before.ino());
    assert_eq!(fs::read_dir(holder.dir.path()).unwrap().count(), 2);
}

pub(super) fn datagrams() {
    let path = |name| format!("{}/{name}", dir());
    let receiver = UnixDatagram::bind(path("receiver")).unwrap();
    let sender = UnixDatagram::bind(path("sender")).unwrap();
    sender.send_to(b"named", path("receiver")).unwrap();
    UnixDatagram::unbound().unwrap().send_to(b"", path("receiver")).unwrap();
    UnixDatagram::unbound().unwrap().send_to(b"nameless", path("receiver")).unwrap();
    sender.connect(path("receiver")).unwrap();
    put(receiver, 100);
    put(sender, 101);
    let other = UnixDatagram::unbound().unwrap();
    other.connect(path("receiver")).unwrap();
    put(other, 102);
}

#[test]
fn many_datagram_senders_reach_one_receiver() {
    let Some(mut holder) = Holder::start("unix_datagrams") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same(100..=102);
    let receiver = UnixDatagram::from(restored.fd(100).try_clone_to_owned().unwrap());
    receiver.set_nonblocking(true).unwrap();
    let receive = || {
        let mut buf = [0; 20];
        let (len, from) = receiver.recv_from(&mut buf).unwrap();
        let name = from.as_pathname().map(|path| path.file_name().unwrap().to_owned());
        (buf[..len].to_vec(), name)
    };
    assert_eq!(receive(), (b"named".to_vec(), Some("sender".into())));
    assert_eq!(receive(), (b"".to_vec(), None));
    assert_eq!(receive(), (b"nameless".to_vec(), None));
    for number in [101, 102] {
        send(restored.fd(number), b"again", SendFlags::empty()).unwrap();
        assert_eq!(receive().0, b"again");
    }
}

pub(super) fn in_flight() {
    let (a, b) = UnixStream::pair().unwrap();
    let (read, write) = rustix::pipe::pipe().unwrap();
    rustix::io::write(&write, b"in the pipe").unwrap();
    let give = |data: &[u8], fds: &[BorrowedFd<'_>]| {
        let mut space = [std::mem::MaybeUninit::uninit(); 64];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        sendmsg(&a, &[io::IoSlice::new(data)], &mut control, SendFlags::empty()).unwrap();
    };
    // A socket in flight that carries another file.
    let (c, d) = UnixStream::pair().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); 64];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let event = rustix::event::eventfd(9, rustix::event::EventfdFlags::empty()).unwrap();
    let inner = [event.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&inner)));
    sendmsg(&c, &[io::IoSlice::new(b"!")], &mut control, SendFlags::empty()).unwrap();
    give(b"before", &[]);
    give(b"with", &[read.as_fd(), d.as_fd()]);
    give(b"after", &[]);
    put(a, 100);
    put(b, 101);
    put(write, 102);
}

fn take(fd: BorrowedFd<'_>, len: usize) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut space = [std::mem::MaybeUninit::uninit(); 64];
    let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let mut buf = vec![0; len];
    let mut parts = [io::IoSliceMut::new(&mut buf)];
    let got = rustix::net::recvmsg(fd, &mut parts, &mut control, RecvFlags::empty()).unwrap();
    let mut fds = Vec::new();
    for message in control.drain() {
        if let rustix::net::RecvAncillaryMessage::ScmRights(files) = message {
            fds.extend(files);
        }
    }
    buf.truncate(got.bytes);
    (buf, fds)
}

#[test]
fn files_in_flight_arrive() {
    let Some(mut holder) = Holder::start("unix_in_flight") else { return };
    let restored = holder.migrate();
    restored.assert_same(100..=102);
    assert_eq!(take(restored.fd(101), 6).0, b"before");
    let (data, fds) = take(restored.fd(101), 20);
    assert_eq!(data, b"with");
    let [pipe, socket] = &fds[..] else { panic!("{fds:?}") };
    let mut buf = [0; 20];
    let len = rustix::io::read(pipe, &mut buf).unwrap();
    assert_eq!(&buf[..len], b"in the pipe");
    rustix::io::write(restored.fd(102), b"more").unwrap();
    assert_eq!(rustix::io::read(pipe, &mut buf).unwrap(), 4);
    let (_, fds) = take(socket.as_fd(), 1);
    let mut count = [0; 8];
    rustix::io::read(&fds[0], &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 9);
    assert_eq!(take(restored.fd(101), 20).0, b"after");
}

/// Connected to a listener of the test process.
pub(super) fn outside() {
    put(
        UnixStream::connect(format!("{}/theirs", env::var("DUNLIN_TEST_OUTSIDE").unwrap()))
            .unwrap(),
        100,
    );
}

#[test]
fn peers_outside_the_tree_are_refused_or_closed() {
    let theirs = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(theirs.path().join("theirs")).unwrap();
    let Some(mut holder) =
        Holder::start_with("unix_outside", &[("DUNLIN_TEST_OUTSIDE", theirs.path())])
    else {
        return;
    };
    let _server = listener.accept().unwrap();
    let findings = holder.inspect(&Options::default());
    let [refused] = refusals(&findings)[..] else { panic!("{findings:?}") };
    assert_eq!(refused.reason, "is a unix socket connected to a process outside the tree");
    let options = Options { external_unix: true, ..Options::default() };
    let [loss] = &holder.inspect(&options)[..] else { panic!() };
    assert_eq!(loss.judgement, Judgement::Loss);
    let restored = holder.migrate_with(&options);
    assert_eq!(receive(&restored, 100).unwrap(), b"");
}
