//! Threads inside a system call that is interrupted by the move and must go
//! on as if nothing had been: no `EINTR`, no timeout cut short.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::Signal;
use nix::unistd::{getpid, gettid, pipe, read, write};
use rustix::io::Errno as RustixErrno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use rustix::thread::{ClockId, NanosleepRelativeResult, futex};
use rustix::time::Timespec;

use crate::fork::{Fork, fork, on_question};
use crate::sys;
use crate::world::{Scenario, dir};

/// How long the calls last that end by themselves.
const WHILE: Duration = Duration::from_secs(2);

struct Call {
    /// Says how the call went.
    result: Receiver<Result<()>>,
    tid: i32,
    /// What makes the call return; without it, time does.
    release: Option<Box<dyn FnOnce() -> Result<()>>>,
}

extern "C" fn on_interrupt(_signal: i32) {}

/// Runs `call` in a thread and waits until that sleeps in syscall `number`.
fn blocked(
    number: i64,
    call: impl FnOnce() -> Result<()> + Send + 'static,
    release: Option<Box<dyn FnOnce() -> Result<()>>>,
) -> Result<Scenario> {
    sys::handle(Signal::SIGUSR1, on_interrupt, 0)?;
    let (told, tid) = channel();
    let (tell, result) = channel();
    std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
        told.send(gettid().as_raw())?;
        tell.send(call())?;
        // Stays, so that the world looks the same when time ended the call.
        loop {
            std::thread::park();
        }
        #[expect(unreachable_code, reason = "gives the closure its type")]
        anyhow::Ok(())
    })?;
    let tid = tid.recv()?;
    let inside = || {
        let text = fs::read_to_string(format!("/proc/self/task/{tid}/syscall"));
        text.is_ok_and(|text| text.split(' ').next() == Some(&number.to_string()))
    };
    while !inside() {
        if let Ok(result) = result.try_recv() {
            return Err(anyhow!("the call ended at once: {result:?}"));
        }
        std::thread::yield_now();
    }
    let check = |state: &mut Call| {
        if let Some(release) = state.release.take() {
            if let Ok(result) = state.result.try_recv() {
                return Err(anyhow!("the call returned early: {result:?}"));
            }
            release()?;
        }
        state.result.recv()?
    };
    let spoil = |state: &mut Call| {
        sys::interrupt(getpid().as_raw(), state.tid, libc::SIGUSR1)?;
        let result = state.result.recv()?;
        // A new world in which the call has failed already.
        let (tell, failed) = channel();
        tell.send(result)?;
        *state = Call { result: failed, tid: state.tid, release: state.release.take() };
        Ok(())
    };
    Scenario::new(Call { result, tid, release }, check, spoil)
}

/// A call that must take [`WHILE`] and not much less.
fn timed(number: i64, call: impl FnOnce() -> Result<()> + Send + 'static) -> Result<Scenario> {
    let timed = move || {
        let start = Instant::now();
        call()?;
        let took = start.elapsed();
        ensure!(WHILE <= took, "it took only {took:?}");
        Ok(())
    };
    blocked(number, timed, None)
}

/// A call that returns when `release` was called.
fn released(
    number: i64,
    call: impl FnOnce() -> Result<()> + Send + 'static,
    release: impl FnOnce() -> Result<()> + 'static,
) -> Result<Scenario> {
    blocked(number, call, Some(Box::new(release)))
}

fn put(fd: &OwnedFd) -> Result<()> {
    ensure!(write(fd, b"x")? == 1);
    Ok(())
}

fn get(fd: &OwnedFd) -> Result<()> {
    let mut byte = [0];
    ensure!(read(fd.as_raw_fd(), &mut byte)? == 1 && byte == *b"x", "read something else");
    Ok(())
}

fn timespec() -> Timespec {
    Timespec { tv_sec: 2, tv_nsec: 0 }
}

pub(crate) fn call_nanosleep() -> Result<Scenario> {
    timed(libc::SYS_nanosleep, || {
        let left = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut request = [timespec(), left];
        let [wanted, left] = &mut request;
        let args = [&raw const *wanted as usize, &raw mut *left as usize, 0, 0, 0, 0];
        sys::call(libc::SYS_nanosleep, args)?;
        Ok(())
    })
}

pub(crate) fn call_clock_nanosleep() -> Result<Scenario> {
    timed(libc::SYS_clock_nanosleep, || {
        let slept = rustix::thread::clock_nanosleep_relative(ClockId::Boottime, &timespec());
        ensure!(matches!(slept, NanosleepRelativeResult::Ok), "{slept:?}");
        Ok(())
    })
}

pub(crate) fn call_clock_nanosleep_until() -> Result<Scenario> {
    timed(libc::SYS_clock_nanosleep, || {
        let mut until = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        until.tv_sec += 2;
        Ok(rustix::thread::clock_nanosleep_absolute(ClockId::Monotonic, &until)?)
    })
}

pub(crate) fn call_poll() -> Result<Scenario> {
    let (read, write) = pipe()?;
    let poll = move || {
        ensure!(poll(&mut [PollFd::new(read.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)? == 1);
        get(&read)
    };
    released(libc::SYS_poll, poll, move || put(&write))
}

pub(crate) fn call_poll_timeout() -> Result<Scenario> {
    timed(libc::SYS_poll, || {
        let ready = poll(&mut [], PollTimeout::from(2000_u16))?;
        ensure!(ready == 0, "{ready} fds are ready");
        Ok(())
    })
}

pub(crate) fn call_ppoll_timeout() -> Result<Scenario> {
    timed(libc::SYS_ppoll, || {
        let timeout = Some(nix::sys::time::TimeSpec::from_duration(WHILE));
        ensure!(nix::poll::ppoll(&mut [], timeout, None)? == 0);
        Ok(())
    })
}

pub(crate) fn call_select_timeout() -> Result<Scenario> {
    timed(libc::SYS_select, || {
        let mut timeout = [2_i64, 0];
        let ready = sys::call(libc::SYS_select, [0, 0, 0, 0, timeout.as_mut_ptr() as usize, 0])?;
        ensure!(ready == 0);
        Ok(())
    })
}

fn epoll_of(fd: &OwnedFd) -> Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 5))?;
    Ok(epoll)
}

pub(crate) fn call_epoll_wait() -> Result<Scenario> {
    let (read, write) = pipe()?;
    let epoll = epoll_of(&read)?;
    let wait = move || {
        let mut events = [EpollEvent::empty()];
        ensure!(epoll.wait(&mut events, EpollTimeout::NONE)? == 1 && events[0].data() == 5);
        get(&read)
    };
    released(libc::SYS_epoll_wait, wait, move || put(&write))
}

pub(crate) fn call_epoll_wait_timeout() -> Result<Scenario> {
    let (read, write) = pipe()?;
    let epoll = epoll_of(&read)?;
    timed(libc::SYS_epoll_wait, move || {
        ensure!(epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::from(2000_u16))? == 0);
        drop((read, write));
        Ok(())
    })
}

static FUTEX: AtomicU32 = AtomicU32::new(0);

pub(crate) fn call_futex() -> Result<Scenario> {
    let wait = || Ok(futex::wait(&FUTEX, futex::Flags::PRIVATE, 0, None)?);
    released(libc::SYS_futex, wait, || {
        FUTEX.store(1, Ordering::SeqCst);
        futex::wake(&FUTEX, futex::Flags::PRIVATE, 1)?;
        Ok(())
    })
}

pub(crate) fn call_futex_timeout() -> Result<Scenario> {
    timed(libc::SYS_futex, || {
        let waited = futex::wait(&FUTEX, futex::Flags::PRIVATE, 0, Some(&timespec()));
        ensure!(waited == Err(RustixErrno::TIMEDOUT), "{waited:?}");
        Ok(())
    })
}

fn sockets() -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

pub(crate) fn call_recv() -> Result<Scenario> {
    let (here, there) = sockets()?;
    let receive = move || {
        let mut byte = [0];
        let (_, n) = recv(&here, &mut byte, RecvFlags::empty())?;
        ensure!(n == 1 && byte == *b"x");
        Ok(())
    };
    released(libc::SYS_recvfrom, receive, move || {
        Ok(send(&there, b"x", SendFlags::empty()).map(drop)?)
    })
}

pub(crate) fn call_recv_timeout() -> Result<Scenario> {
    let (here, there) = sockets()?;
    set_socket_timeout(&here, Timeout::Recv, Some(WHILE))?;
    timed(libc::SYS_recvfrom, move || {
        let received = recv(&here, &mut [0], RecvFlags::empty()).map(|(_, n)| n);
        ensure!(received == Err(RustixErrno::AGAIN), "{received:?}");
        drop(there);
        Ok(())
    })
}

pub(crate) fn call_accept() -> Result<Scenario> {
    let path = dir().join("listening");
    let listener = std::os::unix::net::UnixListener::bind(&path)?;
    let accept = move || {
        let fd =
            sys::call(libc::SYS_accept4, [usize::try_from(listener.as_raw_fd())?, 0, 0, 0, 0, 0]);
        ensure!(fd? > 2);
        Ok(())
    };
    released(libc::SYS_accept4, accept, move || {
        Ok(std::os::unix::net::UnixStream::connect(&path).map(drop)?)
    })
}

pub(crate) fn call_read_pipe() -> Result<Scenario> {
    let (read, write) = pipe()?;
    released(libc::SYS_read, move || get(&read), move || put(&write))
}

pub(crate) fn call_write_pipe() -> Result<Scenario> {
    let (source, sink) = pipe()?;
    let full =
        usize::try_from(nix::fcntl::fcntl(sink.as_raw_fd(), nix::fcntl::FcntlArg::F_GETPIPE_SZ)?)?;
    ensure!(write(&sink, &vec![b'x'; full])? == full, "the pipe is larger than it says");
    let put_one = move || put(&sink);
    released(libc::SYS_write, put_one, move || {
        let mut buffer = vec![0; full];
        ensure!(read(source.as_raw_fd(), &mut buffer)? == full, "the pipe lost some");
        get(&source)
    })
}

pub(crate) fn call_wait4() -> Result<Scenario> {
    let child = fork(|| on_question(|| Ok(())))?;
    let Fork(pid) = child;
    let ask = move || Ok(nix::sys::signal::kill(pid, Signal::SIGUSR2)?);
    released(libc::SYS_wait4, move || child.content(), ask)
}

pub(crate) fn call_sigtimedwait() -> Result<Scenario> {
    let signal = libc::SIGRTMIN() + 5;
    sys::block(&[signal])?;
    let wait = move || {
        ensure!(sys::wait_signal(signal, Some(3600))?.value == 8);
        Ok(())
    };
    released(libc::SYS_rt_sigtimedwait, wait, move || sys::queue(signal, 8))
}

pub(crate) fn call_sigtimedwait_timeout() -> Result<Scenario> {
    let signal = libc::SIGRTMIN() + 5;
    sys::block(&[signal])?;
    timed(libc::SYS_rt_sigtimedwait, move || {
        let waited = sys::wait_signal(signal, Some(2)).err().context("a signal came")?;
        let kind = waited.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        ensure!(kind == Some(std::io::ErrorKind::WouldBlock), "{waited}");
        Ok(())
    })
}

pub(crate) fn call_flock() -> Result<Scenario> {
    let open = || fs::File::options().create(true).append(true).open(dir().join("locked"));
    let (held, wanted) = (open()?, open()?);
    held.lock()?;
    released(libc::SYS_flock, move || Ok(wanted.lock()?), move || Ok(held.unlock()?))
}
