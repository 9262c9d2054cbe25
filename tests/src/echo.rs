//! A client of the program `echo` that keeps many connections busy in both
//! directions and judges every byte that comes back.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::hosts::Host;

/// Most bytes of a connection that are under way.
const WINDOW: u64 = 64 << 10;
/// How often the client looks whether it is to stop.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// Connections that send and receive without pause.
#[derive(Debug)]
pub struct Echoes {
    stop: Arc<AtomicBool>,
    book: Arc<Mutex<Book>>,
    thread: Option<JoinHandle<io::Result<Result<()>>>>,
}

/// What each connection has sent and received, and the longest time that
/// nothing came on any of them.
#[derive(Debug, Clone, Default)]
struct Book {
    sent: Vec<u64>,
    received: Vec<u64>,
    last: Option<Instant>,
    gap: Duration,
}

impl Echoes {
    /// Connects from `host` to the server at `address`, `count` times.
    pub fn start(host: &Host, address: SocketAddr, count: usize) -> Result<Self> {
        let connect = || (0..count).map(|_| TcpStream::connect(address)).collect::<io::Result<_>>();
        let streams: Vec<TcpStream> = host.with(connect)?.context("cannot connect")?;
        let counts = vec![0; count];
        let book = Book { sent: counts.clone(), received: counts, ..Book::default() };
        let (stop, book) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(book)));
        let (stopped, shared) = (Arc::clone(&stop), Arc::clone(&book));
        let thread = Some(host.thread(move || run(&streams, &stopped, &shared))?);
        Ok(Self { stop, book, thread })
    }

    /// Waits until everything sent so far, and something, has come back on every
    /// connection.
    pub fn catch_up(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        let sent: Vec<u64> = self.book().sent.iter().map(|sent| *sent.max(&1)).collect();
        loop {
            let received = self.book().received;
            let behind = sent.iter().zip(&received).position(|(sent, got)| got < sent);
            let Some(behind) = behind else { return Ok(()) };
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                return Err(self.join().err().unwrap_or_else(|| anyhow!("the client ended")));
            }
            ensure!(
                Instant::now() < deadline,
                "connection {behind}: {} of {} bytes came back",
                received[behind],
                sent[behind]
            );
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The longest time that nothing came since the last call.
    pub fn take_gap(&self) -> Duration {
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut book.gap)
    }

    /// Stops and says how many bytes came back.
    pub fn stop(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.join()?;
        Ok(self.book().received.iter().sum())
    }

    fn join(&mut self) -> Result<()> {
        let thread = self.thread.take().context("the client was stopped before")?;
        thread.join().map_err(|_| anyhow!("the client panicked"))??
    }

    fn book(&self) -> Book {
        self.book.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What is at a place of a connection's stream.
fn byte(connection: usize, place: u64) -> u8 {
    (place.wrapping_mul(2_654_435_761) >> 7).to_le_bytes()[connection % 3]
}

fn run(streams: &[TcpStream], stop: &AtomicBool, book: &Mutex<Book>) -> Result<()> {
    for stream in streams {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
    }
    let (mut sent, mut received) = (vec![0; streams.len()], vec![0; streams.len()]);
    while !stop.load(Ordering::Relaxed) {
        let wants = sent.iter().zip(&received).map(|(sent, received): (&u64, &u64)| {
            let room = if sent - received < WINDOW { PollFlags::OUT } else { PollFlags::empty() };
            PollFlags::IN | room
        });
        let mut fds: Vec<PollFd<'_>> = streams
            .iter()
            .zip(wants)
            .map(|(stream, wants)| PollFd::from_borrowed_fd(stream.as_fd(), wants))
            .collect();
        poll(&mut fds, Some(&LOOK))?;
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        let mut came = false;
        for (id, (stream, ready)) in streams.iter().zip(ready).enumerate() {
            if ready.contains(PollFlags::OUT) {
                send(stream, id, &mut sent[id]).with_context(|| format!("connection {id}"))?;
            }
            if ready.intersects(PollFlags::IN | PollFlags::ERR | PollFlags::HUP) {
                receive(stream, id, &mut received[id])?;
                came = true;
            }
        }
        let now = Instant::now();
        let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
        book.sent.clone_from(&sent);
        book.received.clone_from(&received);
        if came {
            book.gap = book.gap.max(book.last.replace(now).map_or(Duration::ZERO, |t| now - t));
        }
    }
    Ok(())
}

fn send(mut stream: &TcpStream, id: usize, sent: &mut u64) -> io::Result<()> {
    let data: Vec<u8> = (*sent..*sent + 4096).map(|place| byte(id, place)).collect();
    match stream.write(&data) {
        Ok(len) => *sent += len as u64,
        Err(err) if err.kind() == ErrorKind::WouldBlock => {}
        Err(err) => return Err(err),
    }
    Ok(())
}

fn receive(mut stream: &TcpStream, id: usize, received: &mut u64) -> Result<()> {
    let mut data = [0; 16 << 10];
    let len = match stream.read(&mut data) {
        Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(()),
        read => read.with_context(|| format!("connection {id} broke"))?,
    };
    ensure!(len > 0, "connection {id} was closed");
    let wrong = data[..len].iter().zip(*received..).find(|(is, at)| **is != byte(id, *at));
    ensure!(wrong.is_none(), "connection {id}: a wrong byte at {:?}", wrong.map(|(_, at)| at));
    *received += len as u64;
    Ok(())
}
