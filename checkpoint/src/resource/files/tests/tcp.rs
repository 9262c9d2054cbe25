//! Established TCP connections, moved from the holder's network namespace to
//! another one with the same address. Both hang on a bridge with the test's
//! own; the address answers in one of them at a time.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use rustix::net::sockopt;

use super::*;
use crate::TcpPolicy;

const SERVER: &str = "10.77.0.1:7001";
const SERVER_V6: &str = "[fd77::1]:7001";
const MAC: &str = "02:00:00:00:77:01";

fn run(line: &str) {
    let mut words = line.split(' ');
    let status = Command::new(words.next().unwrap()).args(words).status().unwrap();
    assert!(status.success(), "{line}");
}

/// Three hosts: the client in its own network namespace, which also has the
/// bridge, the source (the holder's) and the destination.
struct Hosts {
    client: OwnedFd,
    destination: OwnedFd,
}

impl Hosts {
    /// Runs `f` on a thread in a namespace.
    fn within<T: Send>(netns: &OwnedFd, f: impl FnOnce() -> T + Send) -> T {
        super::super::in_netns(netns.as_fd(), || Ok(f())).unwrap()
    }

    /// Links the namespace of `pid` to the bridge and gives it the address.
    fn attach(client: &OwnedFd, netns: &OwnedFd, port: &str) {
        let path = format!("/proc/{}/fd/{}", std::process::id(), netns.as_raw_fd());
        Self::within(client, || {
            run(&format!("ip link add name {port} type veth peer name eth0 netns {path}"));
            run(&format!("ip link set {port} master br0 up"));
        });
        Self::within(netns, || {
            run(&format!("ip link set eth0 address {MAC}"));
            run("ip address add 10.77.0.1/24 dev eth0");
            run("ip -6 address add fd77::1/64 dev eth0 nodad");
            run("ip link set eth0 up");
        });
    }

    fn new(source: &OwnedFd) -> Self {
        let (client, destination) = (new_netns(), new_netns());
        Self::within(&client, || {
            run("ip link add br0 type bridge");
            run("ip address add 10.77.0.9/24 dev br0");
            run("ip -6 address add fd77::9/64 dev br0 nodad");
            run("ip link set br0 up");
        });
        Self::attach(&client, source, "source");
        Self::attach(&client, &destination, "target");
        let hosts = Self { client, destination };
        hosts.port("source", true);
        hosts.port("target", false);
        hosts
    }

    fn port(&self, port: &str, up: bool) {
        Self::within(&self.client, || {
            run(&format!("bridge link set dev {port} state {}", if up { 3 } else { 0 }));
        });
    }

    fn connect(&self, to: &str) -> TcpStream {
        let stream = Self::within(&self.client, || TcpStream::connect(to)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    /// Moves the holder's files; packets are held back meanwhile.
    fn migrate(&self, holder: &mut Holder) -> Restored {
        let options = Options { tcp: TcpPolicy::Keep, ..Options::default() };
        assert_eq!(refusals(&holder.inspect(&options)), [] as [&Finding; 0]);
        self.port("source", false);
        let netns = self.destination.try_clone().unwrap();
        holder.migrate_into(&options, netns, || self.port("target", true))
    }
}

/// Accepts four connections once told that its network is up, and takes part
/// in what the test calls them.
pub(super) fn connections() {
    let mut line = String::new();
    println!("waiting");
    io::stdin().read_line(&mut line).unwrap();
    let listeners = [SERVER, SERVER_V6].map(|address| TcpListener::bind(address).unwrap());
    println!("listening");
    let accept = |listener: &TcpListener, number: RawFd| {
        let (mut stream, _) = listener.accept().unwrap();
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello");
        put(stream.try_clone().unwrap(), number);
        stream
    };
    let plain = accept(&listeners[0], 100);
    plain.set_nodelay(true).unwrap();
    sockopt::set_socket_keepalive(&plain, true).unwrap();
    sockopt::set_tcp_keepidle(&plain, Duration::from_secs(77)).unwrap();
    // Fills both queues: the peer does not read.
    let full = accept(&listeners[0], 101);
    full.set_nonblocking(true).unwrap();
    let mut count = 0u64;
    while let Ok(len) = (&full).write(&pattern(count, 10_000)) {
        count += len as u64;
    }
    fs::write(format!("{}/count", dir()), count.to_string()).unwrap();
    // Half-closed by us, and by the peer.
    let closed = accept(&listeners[0], 102);
    closed.shutdown(std::net::Shutdown::Write).unwrap();
    accept(&listeners[0], 103);
    accept(&listeners[1], 104);
    let [v4, v6] = listeners;
    put(v4, 105);
    put(v6, 106);
}

/// Bytes that tell where in the stream they are.
fn pattern(from: u64, len: u64) -> Vec<u8> {
    (from..from + len).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect()
}

#[test]
fn connections_survive_the_move() {
    let Some(mut holder) = Holder::start_silent("connections") else { return };
    let netns = fs::File::open(format!("/proc/{}/ns/net", holder.pid())).unwrap();
    let hosts = Hosts::new(&netns.into());
    holder.say("listening");
    let client = |to: &str| {
        let mut stream = hosts.connect(to);
        stream.write_all(b"hello").unwrap();
        stream
    };
    let mut plain = client(SERVER);
    plain.write_all(b"unread").unwrap();
    let mut full = client(SERVER);
    full.write_all(&pattern(0, 100_000)).unwrap();
    let mut half = client(SERVER);
    let mut done = client(SERVER);
    done.write_all(b"goodbye").unwrap();
    done.shutdown(std::net::Shutdown::Write).unwrap();
    let mut v6 = client(SERVER_V6);
    holder.wait_for("ready");
    assert_eq!(half.read(&mut [0; 9]).unwrap(), 0, "the source has closed its side");

    let restored = hosts.migrate(&mut holder);
    let server = |number: RawFd| {
        let stream = TcpStream::from(restored.fd(number).try_clone_to_owned().unwrap());
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    };
    let talk = |mut from: &TcpStream, mut to: &TcpStream, data: &[u8]| {
        from.write_all(data).unwrap();
        let mut buf = vec![0; data.len()];
        to.read_exact(&mut buf).unwrap();
        assert_eq!(buf, data);
    };
    let mut unread = [0; 6];
    server(100).read_exact(&mut unread).unwrap();
    assert_eq!(&unread, b"unread");
    talk(&plain, &server(100), b"to the new place");
    talk(&server(100), &plain, b"and back");
    assert!(sockopt::tcp_nodelay(restored.fd(100)).unwrap());
    assert_eq!(sockopt::tcp_keepidle(restored.fd(100)).unwrap(), Duration::from_secs(77));
    assert_eq!(server(100).peer_addr().unwrap(), plain.local_addr().unwrap());

    let count: u64 = fs::read_to_string(holder.dir.path().join("count")).unwrap().parse().unwrap();
    let mut sent = vec![0; usize::try_from(count).unwrap()];
    full.read_exact(&mut sent).unwrap();
    assert!(sent == pattern(0, count), "{count} bytes arrive once and in order");
    let mut received = vec![0; 100_000];
    server(101).read_exact(&mut received).unwrap();
    assert!(received == pattern(0, 100_000));
    talk(&server(101), &full, b"more");

    talk(&half, &server(102), b"still heard");
    assert_eq!(server(102).write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);

    let mut last = String::new();
    server(103).read_to_string(&mut last).unwrap();
    assert_eq!(last, "goodbye");
    talk(&server(103), &done, b"answer");

    talk(&v6, &server(104), b"six");
    talk(&server(104), &v6, b"six");
    // The listeners came along.
    let mut new = client(SERVER);
    let mut accepted =
        TcpListener::from(restored.fd(105).try_clone_to_owned().unwrap()).accept().unwrap().0;
    accepted.write_all(b"!").unwrap();
    new.read_exact(&mut [0]).unwrap();
    v6.flush().unwrap();
    plain.flush().unwrap();
    half.flush().unwrap();
}
