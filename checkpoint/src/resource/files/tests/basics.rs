//! Files, devices, counters, and who shares what.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
};

use rustix::{
    event::EventfdFlags,
    net::{AddressFamily, SocketType},
    time::{
        ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec,
        clock_gettime, timerfd_create, timerfd_gettime, timerfd_settime,
    },
};

use super::*;

pub(super) fn regular() {
    let dir = dir();
    let path = format!("{dir}/file");
    fs::write(&path, "hello world").unwrap();
    let mut file = File::open(&path).unwrap();
    file.seek(SeekFrom::Start(6)).unwrap();
    put(file, 100);
    put(OpenOptions::new().append(true).open(&path).unwrap(), 101);
    put(
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_SYNC)
            .open(&path)
            .unwrap(),
        102,
    );
    put(File::open(&dir).unwrap(), 103);
    put(OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).unwrap(), 104);
    std::os::unix::fs::symlink("file", format!("{dir}/link")).unwrap();
    let link = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(format!("{dir}/link"));
    put(link.unwrap(), 105);
    put(File::open("/proc/sys/kernel/ostype").unwrap(), 106);
    let odd = std::ffi::OsString::from_vec(b"a \xff\n(deleted)".to_vec());
    put(File::create(std::path::Path::new(&dir).join(odd)).unwrap(), 107);
}

use std::os::unix::ffi::OsStringExt;

#[test]
fn files_are_opened_again() {
    let Some(mut holder) = Holder::start("regular") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same(100..=107);
    let mut rest = String::new();
    File::from(restored.fd(100).try_clone_to_owned().unwrap()).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "world");
    File::from(restored.fd(101).try_clone_to_owned().unwrap()).write_all(b"!").unwrap();
    assert_eq!(fs::read_to_string(holder.dir.path().join("file")).unwrap(), "hello world!");
    for (number, name) in [(103, ""), (104, "file"), (105, "link")] {
        let link = format!("/proc/self/fd/{}", restored.fd(number).as_raw_fd());
        let path = holder.dir.path().join(name);
        assert_eq!(fs::read_link(link).unwrap(), path.components().as_path());
    }
}

#[test]
fn another_file_of_that_name_is_refused() {
    let Some(holder) = Holder::start("regular") else { return };
    let image = holder.dump();
    fs::write(holder.dir.path().join("file"), "longer than before").unwrap();
    let Err(err) = Restored::new(image, BTreeMap::new(), Created::default()) else {
        panic!("was opened")
    };
    let text = err.to_string();
    assert!(text.contains("/file") && text.contains("is 18 bytes long here, was 11"), "{text}");
}

pub(super) fn devices() {
    for (number, path) in
        (100..).zip(["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"])
    {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
        put(file.unwrap(), number);
    }
}

#[test]
fn devices_are_opened_again() {
    let Some(mut holder) = Holder::start("devices") else { return };
    let restored = holder.migrate();
    restored.assert_same(100..=104);
    let mut zeros = [1; 4];
    rustix::io::read(restored.fd(101), &mut zeros).unwrap();
    assert_eq!(zeros, [0; 4]);
    assert_eq!(rustix::io::write(restored.fd(102), b"x"), Err(rustix::io::Errno::NOSPC));
}

pub(super) fn counters() {
    put(rustix::event::eventfd(7, EventfdFlags::NONBLOCK).unwrap(), 100);
    let semaphore = rustix::event::eventfd(3, EventfdFlags::SEMAPHORE).unwrap();
    rustix::io::write(&semaphore, &(u64::MAX - 9).to_ne_bytes()).unwrap();
    put(semaphore, 101);
    put(crate::sys::signalfd::create(1 << 9 | 1 << 40).unwrap(), 102);

    let seconds = |n| Timespec { tv_sec: n, tv_nsec: 0 };
    let timer = |clock, flags, value, interval| {
        let fd = timerfd_create(clock, TimerfdFlags::NONBLOCK).unwrap();
        let spec = Itimerspec { it_interval: interval, it_value: value };
        timerfd_settime(&fd, flags, &spec).unwrap();
        fd
    };
    let relative = TimerfdTimerFlags::empty();
    put(timer(TimerfdClockId::Monotonic, relative, seconds(60), seconds(5)), 103);
    let noon = clock_gettime(ClockId::Realtime).tv_sec + 1000;
    let wall = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    put(timer(TimerfdClockId::Realtime, wall, seconds(noon), seconds(0)), 104);
    // Has expired some thousand times when it is dumped.
    let short = Timespec { tv_sec: 0, tv_nsec: 100_000 };
    let busy = timer(TimerfdClockId::Boottime, relative, short, short);
    rustix::event::poll(
        &mut [rustix::event::PollFd::new(&busy, rustix::event::PollFlags::IN)],
        None,
    )
    .unwrap();
    put(busy, 105);
    put(timer(TimerfdClockId::Monotonic, relative, seconds(0), seconds(0)), 106);
}

fn read_u64(fd: BorrowedFd<'_>) -> rustix::io::Result<u64> {
    let mut word = [0; 8];
    rustix::io::read(fd, &mut word)?;
    Ok(u64::from_ne_bytes(word))
}

#[test]
fn counters_and_timers_go_on() {
    let Some(mut holder) = Holder::start("counters") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same(100..=106);
    let again = |number: RawFd, key| {
        assert_eq!(restored.infos[&number].field(key), restored.info(number).field(key), "{key}");
    };
    again(100, "eventfd-count");
    again(101, "eventfd-count");
    again(101, "eventfd-semaphore");
    again(102, "sigmask");
    for number in 103..=106 {
        again(number, "clockid");
    }
    assert_eq!(read_u64(restored.fd(100)), Ok(7));
    assert_eq!(read_u64(restored.fd(101)), Ok(1));

    let left = |number| timerfd_gettime(restored.fd(number)).unwrap();
    assert!((50..=60).contains(&left(103).it_value.tv_sec));
    assert_eq!(left(103).it_interval.tv_sec, 5);
    assert!((990..=1000).contains(&left(104).it_value.tv_sec));
    again(104, "settime flags");
    assert!(read_u64(restored.fd(105)).unwrap() > 0);
    assert_eq!(left(106).it_value, Timespec { tv_sec: 0, tv_nsec: 0 });
    assert_eq!(read_u64(restored.fd(106)), Err(rustix::io::Errno::AGAIN));
}

pub(super) fn shared() {
    let path = format!("{}/file", dir());
    fs::write(&path, "abc").unwrap();
    let file = File::open(&path).unwrap();
    put(file.try_clone().unwrap(), 100);
    put(file.try_clone().unwrap(), 101);
    put(File::open(&path).unwrap(), 102);
    assert_eq!(rustix::io::fcntl_dupfd_cloexec(file, 103).unwrap().into_raw_fd(), 103);
}

#[test]
fn shared_descriptions_stay_shared() {
    let Some(mut holder) = Holder::start("shared") else { return };
    // A second table: what a child has inherited.
    let mut child = Command::new("nsenter")
        .args(["--target", &holder.pid().to_string(), "--net", "sleep", "1000"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let tables = [holder.pid(), Pid::from_raw(child.id().cast_signed())]
        .map(|pid| TableRef { pid, ns_pid: pid.as_raw() });
    let options = Options::default();
    let tasks = tables.map(|table| table.pid);
    let ctx = Context { options: &options, init: holder.pid(), tasks: &tasks };
    let findings = inspect(&tables, &ctx).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    // The test's own stderr is not the container's, unless init has it too.
    assert!(findings.iter().all(|finding| !finding.object.contains("fd 10")), "{findings:?}");

    let image = holder.dump();
    let file = |number| {
        let fd = image.tables[0].fds.iter().find(|fd| fd.fd == number).unwrap();
        (fd.file, fd.cloexec)
    };
    assert_eq!(file(100).0, file(101).0);
    assert_ne!(file(100).0, file(102).0);
    assert_eq!(file(103), (file(100).0, true));
    assert!(!file(100).1);
    let restored = holder.migrate();
    rustix::fs::seek(restored.fd(100), rustix::fs::SeekFrom::Start(2)).unwrap();
    assert_eq!(restored.info(101).pos, 2);
    assert_eq!(restored.info(102).pos, 0);
}

pub(super) fn unmovable() {
    let (family, kind) = (AddressFamily::PACKET, SocketType::DGRAM);
    put(rustix::net::socket(family, kind, None).unwrap(), 100);
}

#[test]
fn what_cannot_move_is_refused_by_name() {
    let Some(holder) = Holder::start("unmovable") else { return };
    let findings = holder.inspect(&Options::default());
    let name = format!("fd 100 of pid {}", holder.pid());
    let [finding] = refusals(&findings)[..] else { panic!("{findings:?}") };
    assert_eq!(
        (&finding.object, &*finding.reason),
        (&name, "is a packet socket, which cannot be moved")
    );
    let Err(DumpError::Refused(refused)) = holder.try_dump(&Options::default()) else { panic!() };
    assert_eq!(&*refused, finding);
}

#[test]
fn standard_streams_are_replaced() {
    let Some(mut holder) = Holder::start("devices") else { return };
    let restored = holder.migrate();
    for number in 0..2 {
        let theirs = restored.stdio[usize::try_from(number).unwrap()].as_fd();
        let same = crate::sys::kcmp::files(restored.fd(number), theirs).unwrap();
        assert!(same.is_eq(), "fd {number}");
    }
}

pub(super) fn locks() {
    let path = format!("{}/locked", dir());
    fs::write(&path, "0123456789").unwrap();
    let open = |name: &str| {
        let path = format!("{}/{name}", dir());
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    };
    let file = open("locked");
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let lock = |kind, l_start, l_len| libc::flock {
        l_type: i16::try_from(kind).unwrap(),
        l_whence: 0,
        l_start,
        l_len,
        l_pid: 0,
    };
    let set = |file: &File, arg: nix::fcntl::FcntlArg<'_>| {
        nix::fcntl::fcntl(file.as_raw_fd(), arg).unwrap();
    };
    set(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock(libc::F_WRLCK, 2, 3)));
    put(file, 100);
    let file = open("posix");
    set(&file, nix::fcntl::FcntlArg::F_SETLK(&lock(libc::F_RDLCK, 7, 0)));
    let lease = open("leased");
    crate::sys::fcntl::set_lease(lease.as_fd(), libc::F_WRLCK).unwrap();
    // Closing any fd of the file would drop the table's lock.
    std::mem::forget(file);
    put(lease, 101);
}

#[test]
fn locks_are_taken_again() {
    let Some(mut holder) = Holder::start("locks") else { return };
    let findings = holder.inspect(&Options::default());
    assert!(refusals(&findings).len() == 3, "{findings:?}");
    assert!(findings.iter().all(|finding| finding.reason == "holds a file lock"));
    let options = Options { file_locks: true, ..Options::default() };
    assert_eq!(holder.inspect(&options), []);
    let restored = holder.migrate_with(&options);
    let lines = |info: &FdInfo| {
        let words = |line: &str| {
            let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
            [&words[2..5], &words[7..]].concat()
        };
        let mut lines: Vec<_> =
            info.rest.lines().filter(|l| l.starts_with("lock:")).map(words).collect();
        lines.sort();
        lines
    };
    assert_eq!(lines(&restored.info(100)).len(), 2);
    for number in [100, 101] {
        assert_eq!(lines(&restored.info(number)), lines(&restored.infos[&number]));
    }
    let [posix] = restored.opened.posix_locks(restored.pid) else { panic!() };
    let flock = posix.flock();
    assert_eq!((i32::from(flock.l_type), flock.l_start, flock.l_len), (libc::F_RDLCK, 7, 0));
    let path = fs::read_link(format!("/proc/self/fd/{}", restored.fd(posix.fd).as_raw_fd()));
    assert!(path.unwrap().ends_with("posix"));
}

pub(super) fn owners() {
    let (a, b) = rustix::pipe::pipe().unwrap();
    let (c, _) = rustix::pipe::pipe().unwrap();
    let me = Pid::this().as_raw();
    crate::sys::fcntl::set_owner(a.as_fd(), crate::sys::fcntl::Owner { kind: 1, pid: me }).unwrap();
    crate::sys::fcntl::set_signal(a.as_fd(), 40).unwrap();
    let flags = rustix::fs::fcntl_getfl(&a).unwrap()
        | OFlags::from_bits_retain(libc::O_ASYNC.cast_unsigned());
    rustix::fs::fcntl_setfl(&a, flags).unwrap();
    put(a, 100);
    put(b, 101);
    put(c, 102);
}

#[test]
fn owners_are_told_by_the_same_signal() {
    let Some(mut holder) = Holder::start("owners") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same(100..=102);
    let owner = crate::sys::fcntl::owner(restored.fd(100)).unwrap();
    // The test answers for every pid of the container.
    assert_eq!(owner, crate::sys::fcntl::Owner { kind: 1, pid: Pid::this().as_raw() });
    assert_eq!(crate::sys::fcntl::signal(restored.fd(100)).unwrap(), 40);
    assert_eq!(crate::sys::fcntl::owner(restored.fd(102)).unwrap().pid, 0);
}

pub(super) fn many() {
    for number in 0..2000 {
        let event = rustix::event::eventfd(number, EventfdFlags::empty()).unwrap();
        put(event, 1000 + i32::try_from(number).unwrap());
    }
    for number in (4000..5000).step_by(2) {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        put(a, number);
        put(b, number + 1);
    }
}

#[test]
fn thousands_of_descriptions_stay_apart() {
    let Some(mut holder) = Holder::start("many") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    for number in 1..2000 {
        assert_eq!(read_u64(restored.fd(1000 + number)), Ok(u64::from(number.cast_unsigned())));
    }
    for number in (4000..5000).step_by(2) {
        rustix::io::write(restored.fd(number), b"x").unwrap();
        assert_eq!(rustix::io::read(restored.fd(number + 1), &mut [0; 2]), Ok(1));
    }
}
