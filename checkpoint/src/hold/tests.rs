//! Two namespaces joined by a wire; one of them is held.

use std::{
    io::{BufRead, BufReader, Read},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::net::{SocketFlags, connect, socket_with, sockopt::socket_error};

use super::*;

/// The held end; nobody listens there.
const THERE: &str = "10.78.0.2:9";
const PATIENCE: Duration = Duration::from_secs(60);

struct Space(Child);

impl Space {
    fn new(set_up: &str) -> Self {
        let script = format!("ip link set lo up && {set_up} && echo ready && exec cat");
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{set_up}");
        Self(child)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id().try_into().unwrap())
    }

    fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let netns = File::open(format!("/proc/{}/ns/net", self.pid())).unwrap();
        in_netns(netns.as_fd(), || Ok(work())).unwrap()
    }

    /// Names of the tables that are there.
    fn tables(&self) -> String {
        let list = || Command::new("nft").args(["list", "tables"]).output().unwrap();
        String::from_utf8(self.within(list).stdout).unwrap()
    }

    /// Frames that came to and left its end of the wire.
    fn frames(&self) -> [u64; 2] {
        self.within(|| {
            ["rx", "tx"].map(|way| {
                let text = Command::new("ip").args(["-s", "-j", "link", "show", "w"]).output();
                let text = String::from_utf8(text.unwrap().stdout).unwrap();
                let (_, rest) = text.split_once(&format!("\"{way}\":")).unwrap();
                let (_, rest) = rest.split_once("\"packets\":").unwrap();
                rest.split(',').next().unwrap().parse::<u64>().unwrap()
            })
        })
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The end from which packets come, and the one that is held.
fn wire() -> Option<(Space, Space)> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP hold: needs root");
        return None;
    }
    let there = Space::new("true");
    let here = Space::new(&format!(
        "ip link add w address 02:00:00:00:78:01 type veth \
             peer name w address 02:00:00:00:78:02 netns {} && \
         ip address add 10.78.0.1/24 dev w && ip link set w up && \
         ip neighbour add 10.78.0.2 lladdr 02:00:00:00:78:02 dev w",
        there.pid()
    ));
    there.within(|| {
        for line in [
            "link set w up",
            "address add 10.78.0.2/24 dev w",
            "neighbour add 10.78.0.1 lladdr 02:00:00:00:78:01 dev w",
        ] {
            assert!(Command::new("ip").args(line.split(' ')).status().unwrap().success());
        }
    });
    Some((here, there))
}

fn departing(space: &Space) -> Hold {
    let mut hold = Hold::of(space.pid()).unwrap().unwrap();
    hold.depart().unwrap();
    hold
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn begin_to_connect(space: &Space) -> OwnedFd {
    space.within(|| {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        let to: SocketAddr = THERE.parse().unwrap();
        assert_eq!(connect(&fd, &to), Err(rustix::io::Errno::INPROGRESS));
        fd
    })
}

fn is_refused(fd: &OwnedFd) -> bool {
    socket_error(fd).unwrap() == Err(rustix::io::Errno::CONNREFUSED)
}

#[test]
fn nothing_is_answered_until_it_is_lifted() {
    let Some((here, there)) = wire() else { return };
    let open = begin_to_connect(&here);
    until("a port without a listener is refused", || is_refused(&open));

    let mut hold = departing(&there);
    let [came, left] = there.frames();
    let held = begin_to_connect(&here);
    until("the SYN arrives", || came < there.frames()[0]);
    assert_eq!(there.frames()[1], left, "something answered");
    assert!(!is_refused(&held));
    hold.lift().unwrap();
    until("it is answered when it is sent again", || is_refused(&held));
    assert_eq!(there.tables(), "");
}

#[test]
fn it_ends_with_its_maker_unless_it_is_kept() {
    let Some((_, there)) = wire() else { return };
    let close = |hold: Hold| {
        nix::unistd::close(hold.socket.as_raw_fd()).unwrap();
        std::mem::forget(hold);
    };
    let hold = departing(&there);
    assert_eq!(there.tables(), "table inet dunlin-hold\ntable arp dunlin-hold\n");
    close(hold);
    until("the tables are gone", || there.tables().is_empty());

    let mut hold = departing(&there);
    hold.keep().unwrap();
    close(hold);
    let kept = "table inet dunlin-held\ntable arp dunlin-held\n";
    until("only what was kept is there", || there.tables() == kept);
    Hold::release(there.pid()).unwrap();
    assert_eq!(there.tables(), "");
    // What is not there needs no release.
    Hold::release(there.pid()).unwrap();
    assert!(Hold::of(Pid::this()).unwrap().is_none(), "never our own");
}

#[test]
fn what_arrives_takes_over_what_was_left_and_speaks_inside() {
    let Some((here, there)) = wire() else { return };
    let mut left = departing(&there);
    left.keep().unwrap();
    drop(left);
    let mut arriving = Hold::of(there.pid()).unwrap().unwrap();
    arriving.arrive().unwrap();
    until("the rest is gone", || !there.tables().contains("dunlin-hold"));
    assert_eq!(there.tables(), "table inet dunlin-arrival\ntable arp dunlin-arrival\n");
    drop(arriving);
    let [came, sent] = there.frames();
    let held = begin_to_connect(&here);
    until("the SYN arrives", || came < there.frames()[0]);
    assert_eq!(there.frames()[1], sent, "something answered");
    there.within(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut own = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        drop(listener.accept().unwrap());
        assert_eq!(own.read(&mut [0]).unwrap(), 0);
    });
    Hold::release(there.pid()).unwrap();
    until("it is answered when it is sent again", || is_refused(&held));
}
