//! A short form of `cargo xtask chaos`.

#![cfg(feature = "fault-injection")]
#![allow(clippy::print_stdout, reason = "captured, and shown for a test that fails")]

use std::time::Duration;

use dunlin_tests::chaos::Chaos;

#[test]
fn one_copy_counts_on_whatever_fails() {
    let mut chaos = Chaos::new(0xd0_17).unwrap();
    chaos.run(1, Duration::from_secs(45), |round| println!("{round}")).unwrap();
    println!("{chaos}");
}
