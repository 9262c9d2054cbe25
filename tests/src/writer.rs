//! A Redis client that writes without pause and keeps book of what was
//! acknowledged when.
//!
//! Each write goes to a key of its own, so that afterwards every acknowledged
//! one can be asked for. A write without an answer may or may not be there; the
//! writer leaves it, connects anew and goes on with the next.

use std::{
    io,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use redis::{Client, Connection, IntoConnectionInfo, TypedCommands, io::tcp::TcpSettings};

use crate::hosts::Host;

/// Patience of a client whose connections break when the server moves: less
/// than the kernel's first SYN retry (1 s), since what is measured is the
/// service and not TCP.
pub const IMPATIENT: Duration = Duration::from_millis(50);

/// Patience of a client whose connections are kept.
pub const PATIENT: Duration = Duration::from_secs(30);

/// Bytes of one value that [`fill`] writes.
const VALUE: usize = 64 << 10;

/// Keys asked for at once.
const BATCH: usize = 1000;

/// A client that writes without pause.
#[derive(Debug)]
pub struct Writer {
    stop: Arc<AtomicBool>,
    book: Arc<Mutex<Book>>,
    thread: JoinHandle<io::Result<()>>,
}

/// What was written, and what came of it.
#[derive(Debug, Clone, Default)]
pub struct Book {
    /// When each acknowledgement came.
    acknowledged: Vec<Instant>,
    /// Numbers of the writes that got no answer.
    unanswered: Vec<usize>,
}

/// What the client saw in some time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    /// Writes acknowledged.
    pub acknowledged: usize,
    /// Longest time between two acknowledgements.
    pub gap: Duration,
}

impl Writer {
    /// Starts to write from `host` to the Redis at `address`, connecting anew
    /// whenever there is no answer for `patience`.
    pub fn start(host: &Host, address: Ipv4Addr, patience: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let book = Arc::new(Mutex::new(Book::default()));
        let (stopped, shared) = (Arc::clone(&stop), Arc::clone(&book));
        let thread = host.thread(move || write(address, patience, &stopped, &shared))?;
        Ok(Self { stop, book, thread })
    }

    /// Waits for the first acknowledgement after `since`.
    pub fn next_acknowledgement(&self, since: Instant, patience: Duration) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        loop {
            let last = self.book().acknowledged.last().copied();
            if let Some(last) = last.filter(|last| since < *last) {
                return Ok(last);
            }
            ensure!(!self.thread.is_finished(), "the writer has given up");
            ensure!(Instant::now() < deadline, "no write was acknowledged for {patience:?}");
            // It is the writer that is measured: leave it the processor.
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// What the client saw since `since`.
    #[must_use]
    pub fn seen(&self, since: Instant) -> Seen {
        self.book().seen(since)
    }

    /// Stops writing.
    pub fn stop(self) -> Result<Book> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the writer panicked"))??;
        Ok(lock(&self.book).clone())
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        lock(&self.book)
    }
}

impl Book {
    /// How many writes were acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        self.acknowledged.len()
    }

    /// How many writes got no answer, so that the client had to connect anew.
    #[must_use]
    pub fn unanswered(&self) -> usize {
        self.unanswered.len()
    }

    /// What the client saw since `since`; a gap that began before counts.
    #[must_use]
    pub fn seen(&self, since: Instant) -> Seen {
        let first = self.acknowledged.partition_point(|at| *at < since);
        let times = &self.acknowledged[first.saturating_sub(1)..];
        let gap = times.windows(2).map(|two| two[1] - two[0]).max().unwrap_or_default();
        Seen { acknowledged: self.acknowledged.len() - first, gap }
    }

    /// Asks for every acknowledged write and returns the numbers of those that
    /// are not there.
    pub fn missing(&self, connection: &mut Connection) -> Result<Vec<usize>> {
        let attempts = self.acknowledged.len() + self.unanswered.len();
        let numbers: Vec<usize> =
            (0..attempts).filter(|n| self.unanswered.binary_search(n).is_err()).collect();
        let mut missing = Vec::new();
        for batch in numbers.chunks(BATCH) {
            let keys: Vec<String> = batch.iter().map(|n| key(*n)).collect();
            let values: Vec<Option<usize>> = redis::cmd("MGET").arg(keys).query(connection)?;
            let lost = batch.iter().zip(values).filter(|(n, value)| *value != Some(**n));
            missing.extend(lost.map(|(n, _)| *n));
        }
        Ok(missing)
    }
}

/// Connects to the Redis at `address` from `host`, waiting until it answers.
pub fn connect(host: &Host, address: Ipv4Addr, patience: Duration) -> Result<Connection> {
    let deadline = Instant::now() + patience;
    loop {
        match host.with(|| open(address, IMPATIENT))? {
            Err(err) if deadline <= Instant::now() => {
                return Err(err).context(format!("Redis at {address} does not answer"));
            }
            // Refused at once while it starts.
            Err(_) => thread::sleep(Duration::from_millis(5)),
            Ok(connection) => {
                connection.set_read_timeout(Some(PATIENT))?;
                connection.set_write_timeout(Some(PATIENT))?;
                return Ok(connection);
            }
        }
    }
}

/// Writes `bytes` of data that is different in every page.
pub fn fill(connection: &mut Connection, bytes: usize) -> Result<()> {
    for n in 0..bytes / VALUE {
        connection.set(format!("fill:{n}"), value(n))?;
    }
    Ok(())
}

/// How many of the values that [`fill`] wrote are not as they were.
pub fn damaged(connection: &mut Connection, bytes: usize) -> Result<usize> {
    let mut damaged = 0;
    for n in 0..bytes / VALUE {
        let found: Option<Vec<u8>> =
            redis::cmd("GET").arg(format!("fill:{n}")).query(connection)?;
        damaged += usize::from(found != Some(value(n)));
    }
    Ok(damaged)
}

/// The `n`th value: words of a xorshift generator, which no one can compress.
fn value(n: usize) -> Vec<u8> {
    let mut state = n as u64 + 1;
    let mut words = Vec::with_capacity(VALUE);
    while words.len() < VALUE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words.extend_from_slice(&state.to_le_bytes());
    }
    words
}

fn key(n: usize) -> String {
    format!("write:{n}")
}

fn open(address: Ipv4Addr, patience: Duration) -> Result<Connection> {
    let info = (address.to_string(), 6379).into_connection_info()?;
    let redis = info.redis_settings().clone().set_skip_set_lib_name();
    let info =
        info.set_redis_settings(redis).set_tcp_settings(TcpSettings::default().set_nodelay(true));
    let connection = Client::open(info)?.get_connection_with_timeout(patience)?;
    connection.set_read_timeout(Some(patience))?;
    connection.set_write_timeout(Some(patience))?;
    Ok(connection)
}

/// The writer's thread.
fn write(address: Ipv4Addr, patience: Duration, stop: &AtomicBool, book: &Mutex<Book>) {
    let mut connection = None;
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        let Some(open) = &mut connection else {
            connection = open(address, patience).ok();
            continue;
        };
        let answer = open.set(key(number), number);
        let now = Instant::now();
        let mut book = lock(book);
        match answer {
            Ok(()) => book.acknowledged.push(now),
            Err(_) => {
                book.unanswered.push(number);
                connection = None;
            }
        }
        number += 1;
    }
}

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    // Whoever panicked, each entry in the book is whole.
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::hosts::Hosts;

    #[test]
    fn a_lost_write_and_a_damaged_value_are_found() {
        let program = ["/usr/bin/redis-server", "/usr/bin/redis-check-rdb"]
            .into_iter()
            .find(|path| std::path::Path::new(path).exists());
        let Some(program) = program else { return crate::skip("needs redis-tools") };
        let hosts = Hosts::new(&["server", "client"]).unwrap();
        let (server, client) = (&hosts["server"], &hosts["client"]);
        let mut command = Command::new("bash");
        command
            .args(["-c", "exec -a redis-server \"$0\" --protected-mode no --save ''", program])
            .stdout(Stdio::null());
        let mut redis = server.spawn(&mut command).unwrap();
        let mut connection = connect(client, server.address(), Duration::from_secs(10)).unwrap();
        fill(&mut connection, 1 << 20).unwrap();
        let writer = Writer::start(client, server.address(), IMPATIENT).unwrap();
        let start = Instant::now();
        let at = writer.next_acknowledgement(start, Duration::from_secs(10)).unwrap();
        writer.next_acknowledgement(at, Duration::from_secs(10)).unwrap();
        let seen = writer.seen(start);
        assert!(seen.acknowledged > 0 && Duration::ZERO < seen.gap);
        let book = writer.stop().unwrap();
        assert_eq!(book.missing(&mut connection).unwrap(), Vec::<usize>::new());
        assert_eq!(damaged(&mut connection, 1 << 20).unwrap(), 0);
        connection.del(key(0)).unwrap();
        connection.set("fill:3", "x").unwrap();
        assert_eq!(book.missing(&mut connection).unwrap(), [0]);
        assert_eq!(damaged(&mut connection, 1 << 20).unwrap(), 1);
        redis.kill().unwrap();
        redis.wait().unwrap();
    }
}
