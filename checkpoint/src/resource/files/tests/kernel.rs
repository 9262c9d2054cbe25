//! Windows into the kernel: inotify, pidfds, netlink, terminals.

use rustix::{
    fs::inotify as kernel_inotify,
    net::{
        AddressFamily, SocketType, bind, getsockname, netlink as protocol,
        netlink::SocketAddrNetlink,
    },
    process::{PidfdFlags, pidfd_open},
};

use super::*;

pub(super) fn inotify() {
    use kernel_inotify::WatchFlags;
    let inotify = kernel_inotify::init(kernel_inotify::CreateFlags::NONBLOCK).unwrap();
    fs::create_dir(format!("{}/in here", dir())).unwrap();
    fs::write(format!("{}/file", dir()), "").unwrap();
    let watch = |name: &str, flags| {
        kernel_inotify::add_watch(&inotify, format!("{}/{name}", dir()), flags).unwrap()
    };
    let gone = watch("in here", WatchFlags::MODIFY);
    kernel_inotify::remove_watch(&inotify, gone).unwrap();
    let mut buf = [0; 64];
    rustix::io::read(&inotify, &mut buf).unwrap(); // IN_IGNORED
    assert_eq!(watch("in here", WatchFlags::CREATE | WatchFlags::DELETE), 2);
    assert_eq!(watch("file", WatchFlags::CLOSE_WRITE | WatchFlags::ONESHOT), 3);
    put(inotify, 100);
}

#[test]
fn watches_keep_their_numbers() {
    let Some(mut holder) = Holder::start("inotify") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same([100]);
    let lines = |info: &FdInfo| {
        let mut lines: Vec<_> = info.rest.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(lines(&restored.info(100)), lines(&restored.infos[&100]));
    fs::write(holder.dir.path().join("in here/new"), "").unwrap();
    let mut buf = [0; 64];
    let len = rustix::io::read(restored.fd(100), &mut buf).unwrap();
    assert_eq!(i32::from_ne_bytes(*buf[..len].first_chunk().unwrap()), 2);
    assert!(buf[..len].windows(3).any(|name| name == b"new"));
}

pub(super) fn pidfd() {
    let me = rustix::process::getpid();
    put(pidfd_open(me, PidfdFlags::NONBLOCK).unwrap(), 100);
}

#[test]
fn a_pidfd_means_the_same_process() {
    let Some(mut holder) = Holder::start("pidfd") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same([100]);
    // The test answers for every pid of the container.
    let pid = restored.info(100).field("Pid").unwrap().to_owned();
    assert_eq!(pid, Pid::this().to_string());
}

#[test]
fn a_pidfd_of_a_stranger_is_refused() {
    let Some(holder) = Holder::start("pidfd") else { return };
    let options = Options::default();
    let ctx = Context { options: &options, init: holder.pid(), tasks: &[] };
    let findings = inspect(&holder.tables(), &ctx).unwrap();
    let [refused] = refusals(&findings)[..] else { panic!("{findings:?}") };
    assert!(refused.reason.contains("outside the tree"), "{refused:?}");
}

pub(super) fn netlink() {
    let socket = || rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None).unwrap();
    let bound = socket();
    bind(&bound, &SocketAddrNetlink::new(4711, 1 | 1 << 4)).unwrap();
    crate::sys::sockopt::set_int(bound.as_fd(), 270, 11, 1).unwrap(); // NETLINK_EXT_ACK
    put(bound, 100);
    put(socket(), 101);
    let events = rustix::net::socket(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        Some(protocol::KOBJECT_UEVENT),
    );
    put(events.unwrap(), 102);
}

#[test]
fn netlink_sockets_listen_to_their_groups() {
    let Some(mut holder) = Holder::start("netlink") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same(100..=102);
    let address =
        |number| SocketAddrNetlink::try_from(getsockname(restored.fd(number)).unwrap()).unwrap();
    assert_eq!(address(100), SocketAddrNetlink::new(4711, 1 | 1 << 4));
    assert_eq!(address(101), SocketAddrNetlink::new(0, 0));
    let acks = crate::sys::sockopt::get_int(restored.fd(100), 270, 11).unwrap();
    assert_eq!(acks, 1);
    // A new link is told to the group.
    Holder::within(&restored.netns, "ip link add dunlin type bridge");
    let mut buf = [0; 4096];
    let (_, len) =
        rustix::net::recv(restored.fd(100), &mut buf[..], rustix::net::RecvFlags::empty()).unwrap();
    assert!(buf[..len].windows(6).any(|name| name == b"dunlin"));
}

pub(super) fn terminals() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    // One below, so that numbers have to be met.
    let below = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    rustix::process::setsid().ok();
    let slave = rustix::fs::open(&*name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    let mut settings = rustix::termios::tcgetattr(&slave).unwrap();
    settings.make_raw();
    rustix::termios::tcsetattr(&slave, rustix::termios::OptionalActions::Now, &settings).unwrap();
    let size = rustix::termios::Winsize { ws_row: 7, ws_col: 77, ws_xpixel: 1, ws_ypixel: 2 };
    rustix::termios::tcsetwinsize(&slave, size).unwrap();
    rustix::fs::fchmod(&slave, Mode::from_raw_mode(0o622)).unwrap();
    drop(below);
    put(rustix::fs::open(&*name, OFlags::RDONLY | OFlags::NOCTTY, Mode::empty()).unwrap(), 102);
    put(master, 100);
    put(slave, 101);
}

#[test]
fn terminals_come_back_under_their_number() {
    let Some(mut holder) = Holder::start("terminals") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same(100..=102);
    let settings = |number| rustix::termios::tcgetattr(restored.fd(number)).unwrap();
    assert!(!settings(101).local_modes.contains(rustix::termios::LocalModes::ICANON));
    let size = rustix::termios::tcgetwinsize(restored.fd(101)).unwrap();
    assert_eq!((size.ws_row, size.ws_col, size.ws_ypixel), (7, 77, 2));
    let index = |info: &FdInfo| info.field("tty-index").unwrap().to_owned();
    assert_eq!(index(&restored.info(100)), index(&restored.infos[&100]));
    assert_eq!(rustix::fs::fstat(restored.fd(101)).unwrap().st_mode & 0o777, 0o622);
    let mut buf = [0; 9];
    rustix::io::write(restored.fd(100), b"typed").unwrap();
    assert_eq!(rustix::io::read(restored.fd(102), &mut buf).unwrap(), 5);
    rustix::io::write(restored.fd(101), b"shown").unwrap();
    assert_eq!(rustix::io::read(restored.fd(100), &mut buf).unwrap(), 5);
}
