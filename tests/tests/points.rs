//! At every point of a hand-over, on either end, whatever stands there fails in
//! every way. Whatever it was: exactly one copy counts on, nothing is left
//! behind, and the next migration works.

#![cfg(feature = "fault-injection")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests may do what tests may"
)]

use std::thread;

use dunlin_api::fault::{AFTER_FAILURE, DESTINATION, SOURCE};
use dunlin_tests::pair::{NAMES, Pair};

/// Room for a loaded machine, and yet short enough to wait for.
const FLAGS: [&str; 2] = ["--stuck-s=6", "--prepare-s=6"];

/// Where a point lies.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Source,
    Destination,
}

/// A point and its end.
type Point = (End, &'static str);

fn points() -> impl Iterator<Item = Point> {
    let source = SOURCE.iter().map(|name| (End::Source, *name));
    source.chain(DESTINATION.iter().map(|name| (End::Destination, *name)))
}

/// Points that a daemon comes by, not a worker.
fn is_daemons(point: &str) -> bool {
    point.starts_with("journal.") || point == "destination.accepted"
}

/// Two nodes, and where the container is.
struct Stage {
    pair: Pair,
    at: usize,
}

impl Stage {
    fn set() -> Self {
        Self { pair: Pair::set(&FLAGS).unwrap(), at: 0 }
    }

    fn host(&self, end: End) -> usize {
        if end == End::Source { self.at } else { 1 - self.at }
    }

    /// Starts a migration and waits until it has come to the point.
    fn run_into(&mut self, (end, point): Point, kind: &str) {
        let host = self.host(end);
        self.pair.arm(host, point, kind).unwrap();
        // Refused at once if its first record cannot be written.
        self.pair.start(self.at).ok();
        self.pair.reached(host, point).unwrap();
    }

    /// Checks that one copy runs, nothing is left, and the next one works.
    fn recovers(&mut self, what: &str) {
        let settled = self.pair.settled().unwrap_or_else(|err| panic!("{what}: {err:#}"));
        let clean = self.pair.nothing_leaked(settled);
        clean.unwrap_or_else(|err| panic!("{what}: {err:#}\n{}", self.pair.said()));
        self.pair.disarm(0).unwrap();
        self.pair.disarm(1).unwrap();
        println!("{what}: {} -> {}", NAMES[self.at], NAMES[settled]);
        let moved = self.pair.must_move(settled);
        self.at = moved.unwrap_or_else(|err| panic!("after {what}: {err:#}"));
    }

    /// Waits until a daemon has failed at a point, and starts it anew.
    fn revive(&mut self, at: usize) {
        self.pair.await_end(at).unwrap();
        self.pair.revive(at).unwrap();
    }
}

/// Does `work` at all `points`, several side by side as they mostly wait.
fn side_by_side(points: impl Iterator<Item = Point>, work: impl Fn(&mut Stage, Point) + Sync) {
    let points: Vec<Point> = points.collect();
    thread::scope(|scope| {
        for share in points.chunks(points.len().div_ceil(4)) {
            scope.spawn(|| {
                let mut stage = Stage::set();
                share.iter().for_each(|point| work(&mut stage, *point));
            });
        }
    });
}

#[test]
fn a_worker_fails_at_every_point() {
    side_by_side(points().filter(|(_, point)| !is_daemons(point)), |stage, (end, point)| {
        for kind in ["abort", "error"] {
            stage.run_into((end, point), kind);
            stage.recovers(&format!("{end:?}: {point}: {kind}"));
        }
    });
}

#[test]
fn a_worker_hangs_at_every_point() {
    side_by_side(points().filter(|(_, point)| !is_daemons(point)), |stage, (end, point)| {
        stage.run_into((end, point), "hang");
        stage.recovers(&format!("{end:?}: {point}: hang"));
    });
}

#[test]
fn a_daemon_fails_at_every_point() {
    side_by_side(points().filter(|(_, point)| is_daemons(point)), |stage, (end, point)| {
        for kind in ["abort", "error"] {
            let host = stage.host(end);
            stage.run_into((end, point), kind);
            if kind != "error" {
                stage.revive(host);
            }
            stage.recovers(&format!("{end:?}: {point}: {kind}"));
        }
    });
}

#[test]
fn a_daemon_fails_after_a_failure() {
    let points = AFTER_FAILURE.iter().map(|point| match *point {
        "journal.discarded" => (End::Destination, *point),
        _ => (End::Source, *point),
    });
    side_by_side(points, |stage, (end, point)| {
        let (first, how) = match point {
            "journal.rolled-back" => ("source.frozen", "error"),
            "journal.in-doubt" => ("source.parked", "abort"),
            _ => ("destination.ready", "error"),
        };
        for kind in ["abort", "error"] {
            let host = stage.host(end);
            stage.pair.arm(host, first, how).unwrap();
            stage.run_into((end, point), kind);
            if kind == "abort" {
                stage.revive(host);
            }
            stage.recovers(&format!("{end:?}: {first}: {how}, {point}: {kind}"));
        }
    });
}

#[test]
fn either_daemon_is_killed_at_every_point() {
    side_by_side(points().filter(|(_, point)| !is_daemons(point)), |stage, (end, point)| {
        for killed in [End::Source, End::Destination] {
            let (host, victim) = (stage.host(end), stage.host(killed));
            stage.run_into((end, point), "hold");
            stage.pair.kill_shim(victim).unwrap();
            stage.pair.revive(victim).unwrap();
            stage.pair.disarm(host).unwrap();
            stage.recovers(&format!("{end:?}: {point}: the {killed:?}'s daemon killed"));
        }
    });
}

#[test]
fn a_journal_hangs_at_every_write() {
    let journal = points().filter(|(_, point)| point.starts_with("journal."));
    side_by_side(journal, |stage, (end, point)| {
        let what = format!("{end:?}: {point}: hang");
        let host = stage.host(end);
        stage.run_into((end, point), "hold");
        // The container waits for its journal, but not for ever.
        let counts = stage.pair.counts_on();
        counts.unwrap_or_else(|err| panic!("{what}: {err:#}"));
        stage.pair.disarm(host).unwrap();
        stage.recovers(&what);
    });
}
