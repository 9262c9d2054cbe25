//! A migration is cancelled at every point, at either end: it ends at once,
//! one copy runs on, nothing is left, and the next one works.

#![cfg(feature = "fault-injection")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may do what tests may")]

use std::{
    thread,
    time::{Duration, Instant},
};

use dunlin_api::{
    ErrorCode,
    fault::{DESTINATION, SOURCE},
    rest::{MigrationState, SourceState},
};
use dunlin_tests::pair::{PATIENCE, Pair};

/// Points of each end at which it is not too late; the journal's are between,
/// and at `source.offered` nobody can say when a cancel has come through.
fn points() -> Vec<(usize, &'static str)> {
    let early = |name: &&&str| {
        let late = [
            "source.offered",
            "source.committed",
            "source.reported",
            "destination.committed",
            "destination.running",
        ];
        !name.starts_with("journal.") && !late.contains(name)
    };
    let source = SOURCE.iter().filter(early).map(|name| (0, *name));
    source.chain(DESTINATION.iter().filter(early).map(|name| (1, *name))).collect()
}

fn cancel_at(pair: &Pair, at: usize, end: usize, point: &str, by: usize) {
    let ends = [at, 1 - at];
    pair.arm(ends[end], point, "hold").unwrap();
    let id = pair.start(at).unwrap().id;
    pair.reached(ends[end], point).unwrap();
    pair.node(ends[by]).ask(async |client| client.cancel(id).await).unwrap();
    // It has gone through when an end is over: the one that is not held.
    let deadline = Instant::now() + PATIENCE;
    let over = |at| pair.find(at, id).is_ok_and(|migration| migration.state.is_final());
    while !over(0) && !over(1) {
        assert!(Instant::now() < deadline, "{point}, by {by}: {}", pair.said());
        thread::sleep(Duration::from_millis(1));
    }
    pair.disarm(ends[end]).unwrap();
    assert_eq!(pair.settled().unwrap(), at, "{point}, by {by}: {}", pair.said());
    let migration = pair.find(at, id).unwrap();
    assert_eq!(migration.state, MigrationState::Out(SourceState::RolledBack));
    // The source may see the connection end before it hears why.
    let code = migration.error.unwrap().code;
    assert!(by == 1 || code == ErrorCode::Cancelled, "{point}: {code}");
    pair.nothing_leaked(at).unwrap_or_else(|err| panic!("{point}, by {by}: {err:#}"));
}

#[test]
fn a_cancel_works_in_every_phase() {
    let points = points();
    thread::scope(|scope| {
        for share in points.chunks(points.len().div_ceil(4)) {
            scope.spawn(move || {
                let (pair, mut at) = (Pair::set(&[]).unwrap(), 0);
                for (end, point) in share.iter().copied() {
                    cancel_at(&pair, at, end, point, 0);
                    // A daemon that is held there hears nobody.
                    if end == 1 && point != "destination.accepted" {
                        cancel_at(&pair, at, end, point, 1);
                    }
                    at = pair.must_move(at).unwrap();
                }
            });
        }
    });
}
