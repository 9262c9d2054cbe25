//! For how long a container stands still: processes that write to a few pages
//! all the time, and one with much memory that writes to none.
//!
//! Beside what the shim reports stands what a client on a third host sees that
//! asks the container for an answer once in a millisecond: the longest time
//! without one, and as `gap before` the same before the move, which is what the
//! machine itself makes of it.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dunlin_api::rest::{Mechanism, MigrateRequest};
use dunlin_tests::{
    bundle::Bundle,
    hosts::{Host, Hosts},
    node::{Node, run_container},
    worker::program,
};

use super::{Bench, Sample, milliseconds};

const ID: &str = "dirty";
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 71, 0, 101);

/// How long the client watches before it is asked to judge.
const BEFORE: Duration = Duration::from_millis(500);

struct Freeze {
    name: String,
    processes: usize,
    /// Pages that each writes to.
    pages: usize,
    /// MiB that the first one has besides.
    mib: usize,
    with_total_copy: bool,
}

pub(super) fn benches() -> Vec<Box<dyn Bench>> {
    let busy = |processes: usize, pages| Freeze {
        name: format!("freeze-{processes}"),
        processes,
        pages,
        mib: 0,
        with_total_copy: false,
    };
    let idle = |mib| Freeze {
        name: format!("idle-{mib}"),
        processes: 1,
        pages: 0,
        mib,
        with_total_copy: true,
    };
    let all = [busy(1, 256), busy(9, 16), busy(32, 16), busy(128, 16)].into_iter();
    let all = all.chain([idle(1), idle(256), idle(1024)]);
    all.map(|bench| Box::new(bench) as Box<dyn Bench>).collect()
}

impl Bench for Freeze {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn ways(&self) -> Vec<&'static str> {
        if self.with_total_copy { vec!["pre-copy", "total-copy"] } else { vec!["pre-copy"] }
    }

    fn measure(&mut self, way: usize) -> Result<Vec<Sample>> {
        let hosts = Hosts::new(&["a", "b", "client"])?;
        let nodes = [Node::start(&hosts["a"])?, Node::start(&hosts["b"])?];
        for host in [&hosts["a"], &hosts["b"]] {
            let mut bundle = Bundle::on(host, ID)?;
            bundle.program_as(&program("dirty")?, "/dirty".as_ref())?.address(ADDRESS);
            bundle.args(
                ["/dirty".to_owned()]
                    .into_iter()
                    .chain([self.processes, self.pages, self.mib].map(|number| number.to_string())),
            );
            bundle.save()?;
        }
        run_container(&hosts["a"], ID)?;
        // It answers once its memory is filled.
        Client::start(&hosts["client"])?.stop()?;
        let client = Client::start(&hosts["client"])?;
        thread::sleep(BEFORE);
        let before = client.stop()?;
        let client = Client::start(&hosts["client"])?;
        let mut request = MigrateRequest::to(nodes[1].url());
        request.mechanism = if way == 0 { Mechanism::PreCopy } else { Mechanism::TotalCopy };
        let migration = nodes[0].migrate(ID, &request, |_| {})?;
        let report = match migration.error {
            Some(problem) => return Err(problem).context("the move failed"),
            None => migration.report.context("a migration that succeeded has a report")?,
        };
        let gap = client.stop()?;
        let ms = |what, us| milliseconds(what, Duration::from_micros(us));
        Ok(vec![
            ms("freeze", report.downtime_us),
            ms("stop", report.freeze_us),
            ms("dump", report.dump_us),
            ms("ready", report.ready_us),
            ms("commit", report.commit_us),
            ms("total", report.total_us),
            milliseconds("gap", gap),
            milliseconds("gap before", before),
        ])
    }
}

/// Asks for an answer once in a millisecond, until it is stopped.
struct Client<'h> {
    host: &'h Host,
    stop: std::sync::Arc<AtomicBool>,
    thread: thread::JoinHandle<std::io::Result<Result<Duration>>>,
}

impl<'h> Client<'h> {
    fn start(host: &'h Host) -> Result<Self> {
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let stopped = std::sync::Arc::clone(&stop);
        let thread = host.thread(move || longest_gap(&stopped))?;
        Ok(Self { host, stop, thread })
    }

    /// Waits for one more answer; the longest time without one.
    fn stop(self) -> Result<Duration> {
        let Self { host, stop, thread } = self;
        stop.store(true, Ordering::Relaxed);
        let gap = thread.join().ok().context("the client panicked")?;
        gap.with_context(|| format!("on host {}", host.name()))?
    }
}

fn longest_gap(stopped: &AtomicBool) -> Result<Duration> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((ADDRESS, 7))?;
    socket.set_read_timeout(Some(Duration::from_millis(1)))?;
    let started = Instant::now();
    let mut last: Option<Instant> = None;
    let mut longest = Duration::ZERO;
    let mut word = [0; 8];
    let mut number = 0_u64;
    loop {
        let ends = stopped.load(Ordering::Relaxed);
        number += 1;
        // Refused while nobody listens yet.
        socket.send(&number.to_le_bytes()).ok();
        match socket.recv(&mut word) {
            Ok(_) => {
                let now = Instant::now();
                longest = longest.max(last.map_or(Duration::ZERO, |last| now - last));
                last = Some(now);
                if ends {
                    return Ok(longest);
                }
            }
            Err(err)
                if matches!(
                    err.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::ConnectionRefused
                ) => {}
            Err(err) => return Err(err.into()),
        }
        ensure!(started.elapsed() < Duration::from_secs(60), "the container does not answer");
    }
}
