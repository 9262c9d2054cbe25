//! Worlds with something in them that cannot move: the refusal must name it
//! and leave the world as it was.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use dunlin_tests::Skipped;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::wait::{WaitStatus, waitpid};

use crate::fork::{Fork, fork, on_question, ready};
use crate::sys::{Mapping, PAGE, call};
use crate::world::{Scenario, wait_for_question};

/// An object that a system call makes and that merely has to be there still.
fn held(what: &str, number: i64, args: [usize; 6]) -> Result<Scenario> {
    let fd = match call(number, args) {
        Ok(fd) => i32::try_from(fd)?,
        Err(err) => return Err(Skipped(format!("{what} ({err})")).into()),
    };
    let check = |fd: &mut i32| {
        let flags = nix::fcntl::fcntl(*fd, nix::fcntl::FcntlArg::F_GETFD);
        ensure!(flags.is_ok(), "it was closed");
        Ok(())
    };
    Scenario::new(fd, check, |fd| Ok(nix::unistd::close(*fd)?))
}

pub(crate) fn refused_io_uring() -> Result<Scenario> {
    let parameters = Box::leak(Box::new([0_u32; 30]));
    held("io_uring", libc::SYS_io_uring_setup, [4, parameters.as_mut_ptr() as usize, 0, 0, 0, 0])
}

pub(crate) fn refused_mptcp() -> Result<Scenario> {
    stream_of("MPTCP", libc::IPPROTO_MPTCP)
}

pub(crate) fn refused_sctp() -> Result<Scenario> {
    stream_of("SCTP", libc::IPPROTO_SCTP)
}

fn stream_of(what: &str, protocol: i32) -> Result<Scenario> {
    let [family, kind, protocol] =
        [libc::AF_INET, libc::SOCK_STREAM, protocol].map(|number| number.unsigned_abs() as usize);
    held(what, libc::SYS_socket, [family, kind, protocol, 0, 0, 0])
}

pub(crate) fn refused_userfaultfd() -> Result<Scenario> {
    held("userfaultfd", libc::SYS_userfaultfd, [1, 0, 0, 0, 0, 0]) // UFFD_USER_MODE_ONLY
}

pub(crate) fn refused_fanotify() -> Result<Scenario> {
    held("fanotify", libc::SYS_fanotify_init, [0; 6])
}

pub(crate) fn refused_bpf() -> Result<Scenario> {
    // An array of one word: type, key size, value size, entries.
    let mut attributes = [0_u32; 32];
    attributes[..4].copy_from_slice(&[2, 4, 4, 1]);
    let at = Box::leak(Box::new(attributes)).as_ptr() as usize;
    held("BPF", libc::SYS_bpf, [0, at, 128, 0, 0, 0])
}

pub(crate) fn refused_block_device() -> Result<Scenario> {
    let device = File::open("/dev/loop0").map_err(|err| Skipped(format!("/dev/loop0 ({err})")))?;
    let check = |device: &mut File| {
        ensure!(device.metadata().is_ok(), "it was closed");
        Ok(())
    };
    Scenario::new(device, check, |device| Ok(nix::unistd::close(device.as_raw_fd())?))
}

/// An AIO context is a mapping, not a descriptor.
pub(crate) fn refused_aio() -> Result<Scenario> {
    let context = Mapping::anonymous(PAGE)?;
    if let Err(err) = call(libc::SYS_io_setup, [8, context.addr, 0, 0, 0, 0]) {
        return Err(Skipped(format!("AIO ({err})")).into());
    }
    let check = |context: &mut Mapping| {
        let mut id = [0; 8];
        for (to, from) in id.iter_mut().zip(context.bytes()) {
            *to = from.load(Ordering::SeqCst);
        }
        let id = usize::try_from(u64::from_ne_bytes(id))?;
        call(libc::SYS_io_destroy, [id, 0, 0, 0, 0, 0]).context("the context is gone")?;
        Ok(())
    };
    Scenario::new(context, check, |context| Ok(context.bytes()[0].store(1, Ordering::SeqCst)))
}

/// A child that its parent traces.
pub(crate) fn refused_traced() -> Result<Scenario> {
    let child = fork(|| on_question(|| Ok(())))?;
    ptrace::seize(child.0, ptrace::Options::empty())?;
    let check = |child: &mut Fork| {
        ptrace::interrupt(child.0).context("it is no longer traced")?;
        let stop = waitpid(child.0, None)?;
        ensure!(matches!(stop, WaitStatus::PtraceEvent(..)), "{stop:?}");
        ptrace::detach(child.0, None)?;
        child.ask()
    };
    let spoil = |child: &mut Fork| {
        ptrace::interrupt(child.0)?;
        waitpid(child.0, None)?;
        Ok(ptrace::detach(child.0, None)?)
    };
    Scenario::new(child, check, spoil)
}

/// A child with a host name of its own.
pub(crate) fn refused_namespace() -> Result<Scenario> {
    let child = fork(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUTS)?;
        rustix::system::sethostname(b"elsewhere")?;
        on_question(|| {
            let uname = rustix::system::uname();
            ensure!(uname.nodename() == c"elsewhere", "the host is called {:?}", uname.nodename());
            Ok(())
        })
    })?;
    let spoil = |child: &mut Fork| Ok(nix::sys::signal::kill(child.0, nix::sys::signal::SIGKILL)?);
    Scenario::new(child, |child| child.ask(), spoil)
}

/// An established TCP connection, where the options refuse them.
pub(crate) fn refused_tcp() -> Result<Scenario> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    let check = |(client, server): &mut (TcpStream, TcpStream)| {
        client.write_all(b"still there?")?;
        let mut text = [0; 12];
        server.read_exact(&mut text)?;
        ensure!(text == *b"still there?");
        Ok(())
    };
    let spoil =
        |(client, _): &mut (TcpStream, TcpStream)| Ok(client.shutdown(std::net::Shutdown::Write)?);
    Scenario::new((client, server), check, spoil)
}

/// A unix socket connected to a process that left the tree.
pub(crate) fn refused_outside_socket() -> Result<Scenario> {
    let (here, mut there) = UnixStream::pair()?;
    let copy = here.try_clone()?;
    let parent = fork(|| {
        fork(|| {
            drop(copy);
            ready()?;
            let mut byte = [0];
            there.read_exact(&mut byte)?;
            there.write_all(&byte)?;
            // Ends with the test, whose worker it belongs to now.
            wait_for_question()
        })?;
        ready()
    })?;
    parent.content()?;
    drop(there);
    let check = |here: &mut UnixStream| {
        here.write_all(b"7")?;
        let mut byte = [0];
        here.read_exact(&mut byte)?;
        ensure!(byte == *b"7", "heard {byte:?}");
        Ok(())
    };
    Scenario::new(here, check, |here| Ok(here.shutdown(std::net::Shutdown::Both)?))
}
