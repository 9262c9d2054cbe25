//! Pipes and FIFOs.

use rustix::{
    event::{PollFd, PollFlags, poll},
    pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe, pipe_with},
};

use super::*;

pub(super) fn pipes() {
    let (read, write) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    fcntl_setpipe_size(&write, 1 << 17).unwrap();
    rustix::io::write(&write, &[7; 100_000]).unwrap();
    put(read, 100);
    put(write, 101);

    let (read, write) = pipe_with(PipeFlags::DIRECT).unwrap();
    rustix::io::write(&write, b"one").unwrap();
    rustix::io::write(&write, b"two").unwrap();
    put(read, 102);
    put(write, 103);

    let (read, write) = pipe().unwrap();
    rustix::io::write(&write, b"last words").unwrap();
    drop(write);
    put(read, 104);

    let (_, write) = pipe().unwrap();
    put(write, 105);

    let fifo = format!("{}/fifo", dir());
    unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let both = rustix::fs::open(&*fifo, OFlags::RDWR, Mode::empty()).unwrap();
    rustix::io::write(&both, b"named").unwrap();
    put(both, 106);

    // Waits for its first writer: neither data nor a hang-up.
    let waiting = format!("{}/waiting", dir());
    unistd::mkfifo(waiting.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    put(
        rustix::fs::open(&*waiting, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap(),
        107,
    );
}

fn read(restored: &Restored, number: RawFd) -> rustix::io::Result<Vec<u8>> {
    let mut buf = vec![0; 1 << 18];
    let len = rustix::io::read(restored.fd(number), &mut buf)?;
    buf.truncate(len);
    Ok(buf)
}

fn polled(fd: BorrowedFd<'_>) -> PollFlags {
    let mut fds = [PollFd::new(&fd, PollFlags::IN | PollFlags::OUT)];
    poll(&mut fds, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
    fds[0].revents()
}

#[test]
fn pipes_keep_content_and_ends() {
    let Some(mut holder) = Holder::start("pipes") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same(100..=107);
    assert_eq!(fcntl_getpipe_size(restored.fd(100)).unwrap(), 1 << 17);
    assert_eq!(read(&restored, 100).unwrap(), vec![7; 100_000]);
    assert_eq!(read(&restored, 100), Err(rustix::io::Errno::AGAIN));
    rustix::io::write(restored.fd(101), b"more").unwrap();
    assert_eq!(read(&restored, 100).unwrap(), b"more");

    assert_eq!(read(&restored, 102).unwrap(), b"one");
    assert_eq!(read(&restored, 102).unwrap(), b"two");
    rustix::io::write(restored.fd(103), b"a").unwrap();
    rustix::io::write(restored.fd(103), b"b").unwrap();
    assert_eq!(read(&restored, 102).unwrap(), b"a");

    assert_eq!(read(&restored, 104).unwrap(), b"last words");
    assert_eq!(read(&restored, 104).unwrap(), b"");
    assert!(polled(restored.fd(104)).contains(PollFlags::HUP));
    assert!(polled(restored.fd(105)).contains(PollFlags::ERR));

    assert_eq!(read(&restored, 106).unwrap(), b"named");
    assert_eq!(polled(restored.fd(107)), PollFlags::empty());
}

#[test]
fn reading_takes_nothing_from_the_source() {
    let Some(holder) = Holder::start("pipes") else { return };
    assert_eq!(holder.dump(), holder.dump());
}

/// A pipe to the test process under a number that is no standard stream.
pub(super) fn outside_pipe() {
    let stdout = rustix::io::dup(std::io::stdout()).unwrap();
    put(stdout, 100);
}

#[test]
fn only_standard_streams_lead_out() {
    let Some(holder) = Holder::start("outside_pipe") else { return };
    // Another way into the pipe behind stdout goes where stdout goes.
    assert_eq!(holder.inspect(&Options::default()), []);
    let image = holder.dump();
    let file = |number| image.tables[0].fds.iter().find(|fd| fd.fd == number).unwrap().file;
    assert_eq!(file(100), file(1));
    // Judged alone, without the init whose stdout it is, it leads nowhere.
    let init = Pid::this();
    let options = Options::default();
    let ctx = Context { options: &options, init, tasks: &[] };
    let findings = inspect(&holder.tables(), &ctx).unwrap();
    let refused = refusals(&findings);
    assert!(
        refused.iter().any(|finding| finding.reason.contains("outside the container")),
        "{refused:?}"
    );
}
