//! The stage of demo, bench and tests: two nodes, a client's host, and a Redis
//! that moves between the nodes while the client writes.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use dunlin_api::rest::{MigrateRequest, Migration, TcpPolicy};

use crate::{
    bundle::{self, Bundle},
    hosts::{Host, Hosts},
    node::{Node, run_container},
    writer::{self, Book, PATIENT, Writer},
};

/// The container's id.
pub const ID: &str = "redis";

/// The container's address, which moves with it.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 71, 0, 100);

/// How long anything that should happen at once may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

const NAMES: [&str; 2] = ["a", "b"];

/// Two nodes and a client's host; dropping it removes all of it.
#[derive(Debug)]
pub struct Stage {
    nodes: [Node; 2],
    hosts: Hosts,
}

/// One move.
#[derive(Debug, Clone)]
pub struct Move {
    /// The node it left.
    pub from: &'static str,
    /// The node it went to.
    pub to: &'static str,
    /// Longest time between two acknowledged writes around the switch.
    pub downtime: Duration,
    /// From the first stop request until the destination ran it.
    pub frozen: Duration,
    /// From the request until the destination ran it.
    pub total: Duration,
    /// Bytes of image sent.
    pub bytes: u64,
}

impl Stage {
    /// Makes the hosts and starts their shims.
    pub fn set() -> Result<Self> {
        let hosts = Hosts::new(&[NAMES[0], NAMES[1], "client"])?;
        let nodes = [Node::start(&hosts[NAMES[0]])?, Node::start(&hosts[NAMES[1]])?];
        Ok(Self { nodes, hosts })
    }

    /// The client's host.
    #[must_use]
    pub fn client(&self) -> &Host {
        &self.hosts["client"]
    }

    /// The two hosts between which the container moves.
    #[must_use]
    pub fn hosts(&self) -> [&Host; 2] {
        NAMES.map(|name| &self.hosts[name])
    }

    /// The node on each.
    #[must_use]
    pub fn nodes(&self) -> &[Node; 2] {
        &self.nodes
    }

    /// Starts Redis on the first host and fills it; the second has its bundle.
    pub fn start_redis(&self, mib: usize) -> Result<()> {
        for host in self.hosts() {
            let mut bundle = Bundle::on(host, ID)?;
            bundle::redis(&mut bundle)?;
            bundle.address(ADDRESS).save()?;
        }
        run_container(self.hosts()[0], ID)?;
        let mut connection = writer::connect(self.client(), ADDRESS, PATIENCE)?;
        writer::fill(&mut connection, mib << 20)
    }

    /// Starts to write to it.
    pub fn start_writer(&self) -> Result<Writer> {
        let writer = Writer::start(self.client(), ADDRESS, PATIENT)?;
        writer.next_acknowledgement(Instant::now(), PATIENCE)?;
        Ok(writer)
    }

    /// Moves Redis from where it is after `number` moves to the other host.
    pub fn move_redis(
        &self,
        number: usize,
        writer: &Writer,
        watch: impl FnMut(&Migration),
    ) -> Result<Move> {
        let (here, there) = (number % 2, (number + 1) % 2);
        let (from, to) = (NAMES[here], NAMES[there]);
        let mut request = MigrateRequest::to(self.nodes[there].url());
        request.tcp = TcpPolicy::Keep;
        let start = Instant::now();
        let migration = self.nodes[here]
            .migrate(ID, &request, watch)
            .with_context(|| format!("cannot move redis from {from} to {to}"))?;
        if let Some(problem) = migration.error {
            return Err(problem).context(format!("cannot move redis from {from} to {to}"));
        }
        let report = migration.report.context("a migration that succeeded has a report")?;
        writer.next_acknowledgement(Instant::now(), PATIENCE)?;
        Ok(Move {
            from,
            to,
            downtime: writer.seen(start).gap,
            frozen: Duration::from_micros(report.downtime_us),
            total: Duration::from_micros(report.total_us),
            bytes: report.bytes,
        })
    }

    /// How many acknowledged writes are missing, and how many of the values
    /// with which it was filled are damaged.
    pub fn losses(&self, book: &Book, mib: usize) -> Result<(usize, usize)> {
        let mut connection = writer::connect(self.client(), ADDRESS, PATIENCE)?;
        let missing = book.missing(&mut connection)?.len();
        Ok((missing, writer::damaged(&mut connection, mib << 20)?))
    }
}
