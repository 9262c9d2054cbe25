//! Integration tests and the programs they move.

pub mod hosts;

/// Says that the running test cannot do its work here: `lacks` names what is
/// missing. `cargo xtask test` fails unless `tests/skips.txt` knows the test.
#[allow(clippy::print_stdout, reason = "the test command reads it from the captured output")]
pub fn skip(lacks: &str) {
    println!("SKIP {}: {lacks}", std::thread::current().name().unwrap_or("unnamed"));
}
