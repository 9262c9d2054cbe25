//! Integration tests and the programs they move.
//!
//! A test starts a self-checking program ([`Child`]), reads what `/proc` says
//! about it ([`Facts`]), moves it with the engine, reads again, and then asks
//! the program whether its world is whole.

pub mod bundle;
pub mod capture;
pub mod chaos;
mod check;
mod child;
mod clone;
pub mod echo;
mod facts;
pub mod hosts;
pub mod image;
mod maps;
pub mod node;
pub mod pair;
pub mod proc;
pub mod random;
pub mod scenarios;
pub mod stage;
pub mod worker;
pub mod writer;

pub use check::{at_rest, check, settled, unless_skipped};
pub use child::{Child, Mood, Skipped};
pub use facts::Facts;
pub use worker::Place;

/// Says that the running test cannot do its work here: `lacks` names what is
/// missing. `cargo xtask test` fails unless `tests/skips.txt` knows the test.
#[allow(clippy::print_stdout, reason = "the test command reads it from the captured output")]
pub fn skip(lacks: &str) {
    println!("SKIP {}: {lacks}", std::thread::current().name().unwrap_or("unnamed"));
}
