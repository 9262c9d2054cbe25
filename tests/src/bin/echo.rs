//! A server that sends back on each connection what comes in, one thread for
//! all: `echo PORT`.

use std::{
    env,
    io::{ErrorKind, Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream},
    os::fd::AsFd,
};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};

/// A connection, and what of its last input is still to be sent back.
struct Echo {
    stream: TcpStream,
    pending: Vec<u8>,
}

impl Echo {
    fn wants(&self) -> PollFlags {
        if self.pending.is_empty() { PollFlags::IN } else { PollFlags::OUT }
    }

    /// Does what can be done; `false` once the client has left.
    fn step(&mut self) -> std::io::Result<bool> {
        if self.pending.is_empty() {
            let mut buf = [0; 16 << 10];
            let len = self.stream.read(&mut buf)?;
            self.pending.extend_from_slice(&buf[..len]);
            return Ok(len > 0);
        }
        let len = self.stream.write(&self.pending)?;
        self.pending.drain(..len);
        Ok(true)
    }
}

fn main() -> Result<()> {
    let port = env::args().nth(1).context("usage: echo PORT")?.parse()?;
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    listener.set_nonblocking(true)?;
    let mut echoes: Vec<Echo> = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(&listener, PollFlags::IN)];
        fds.extend(echoes.iter().map(|e| PollFd::from_borrowed_fd(e.stream.as_fd(), e.wants())));
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(err) => return Err(err.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ready = ready.into_iter();
        if ready.next() == Some(true) {
            let (stream, _) = listener.accept()?;
            stream.set_nonblocking(true)?;
            echoes.push(Echo { stream, pending: Vec::new() });
        }
        // One that broke is the client's to notice.
        echoes.retain_mut(|echo| match ready.next() {
            Some(true) => echo.step().unwrap_or_else(|err| err.kind() == ErrorKind::WouldBlock),
            _ => true,
        });
    }
}
