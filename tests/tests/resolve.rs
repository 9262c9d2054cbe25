//! A doubt whose destination does not answer is ended by hand, with what the
//! operator saw there.

#![cfg(feature = "fault-injection")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may do what tests may")]

use std::{
    thread,
    time::{Duration, Instant},
};

use dunlin_api::rest::{MigrationState, SourceState};
use dunlin_tests::{
    node::dunlin,
    pair::{PATIENCE, Pair},
};
use uuid::Uuid;

/// A migration that stays in doubt: its destination was told to run it and has
/// come to `point`, where its worker is held and its daemon killed.
fn doubt(pair: &mut Pair, point: &str) -> Uuid {
    pair.arm(1, point, "hold").unwrap();
    let id = pair.start(0).unwrap().id;
    pair.reached(1, point).unwrap();
    pair.stop(1).unwrap();
    assert_eq!(pair.kill_worker(0, "source-worker"), 1);
    wait_for(pair, id, SourceState::InDoubt);
    id
}

fn wait_for(pair: &Pair, id: Uuid, state: SourceState) {
    let deadline = Instant::now() + PATIENCE;
    while pair.find(0, id).unwrap().state != MigrationState::Out(state) {
        assert!(Instant::now() < deadline, "never {state:?}: {}", pair.said());
        thread::sleep(Duration::from_millis(5));
    }
}

fn resolve(pair: &Pair, id: Uuid, how: &str) {
    let id = id.to_string();
    pair.host(0).run(&mut dunlin(&["migrations", "resolve", &id, how]).unwrap()).unwrap();
}

#[test]
fn here_lets_the_original_run_on() {
    let mut pair = Pair::set(&[]).unwrap();
    let id = doubt(&mut pair, "destination.committed");
    // The operator made sure of it.
    pair.end_all(1, "receive").unwrap();
    resolve(&pair, id, "--here");
    wait_for(&pair, id, SourceState::RolledBack);
    assert_eq!(pair.counts_on().unwrap(), 0);
    pair.disarm(1).unwrap();
    pair.revive(1).unwrap();
    assert_eq!(pair.settled().unwrap(), 0);
    pair.nothing_leaked(0).unwrap();
    pair.must_move(0).unwrap();
}

#[test]
fn there_ends_the_original() {
    let mut pair = Pair::set(&[]).unwrap();
    let id = doubt(&mut pair, "destination.running");
    assert_eq!(pair.counts_on().unwrap(), 1);
    resolve(&pair, id, "--there");
    wait_for(&pair, id, SourceState::Departed);
    pair.disarm(1).unwrap();
    pair.revive(1).unwrap();
    assert_eq!(pair.settled().unwrap(), 1);
    pair.nothing_leaked(1).unwrap();
    pair.must_move(1).unwrap();
}

#[test]
fn only_a_doubt_is_ended_and_only_with_a_word() {
    let pair = Pair::set(&[]).unwrap();
    let id = pair.start(0).unwrap().id;
    assert_eq!(pair.settled().unwrap(), 1);
    let id = id.to_string();
    let refused = |args: &[&str]| pair.host(0).run(&mut dunlin(args).unwrap()).unwrap_err();
    let err = refused(&["migrations", "resolve", &id, "--here"]).to_string();
    assert!(err.contains("is not in doubt"), "{err}");
    refused(&["migrations", "resolve", &id]);
    refused(&["migrations", "resolve", &id, "--here", "--there"]);
    pair.must_move(1).unwrap();
}
