//! Named places at which a test lets a program of ours fail.
//!
//! `DUNLIN_FAULT` names a directory. A file in it that has a point's name makes
//! the first process that comes there fail as the file says, once: the file is
//! renamed to `NAME.reached`. Without the feature `fault-injection`, which
//! release builds refuse, nothing looks.

use std::io;

#[cfg(all(feature = "fault-injection", not(debug_assertions)))]
compile_error!("fault-injection is for tests, not for releases");

/// Points that the source's end of a migration comes by.
pub const SOURCE: &[&str] = &[
    "source.judging",
    "source.offered",
    "source.round",
    "source.frozen",
    "source.dumped",
    "source.may-commit",
    "source.parked",
    "source.committed",
    "source.reported",
    "journal.offered",
    "journal.preparing",
    "journal.copying",
    "journal.frozen",
    "journal.committing",
    "journal.departed",
];

/// Points that the destination's end comes by.
pub const DESTINATION: &[&str] = &[
    "destination.accepted",
    "destination.prepared",
    "destination.filling",
    "destination.ready",
    "destination.committed",
    "destination.running",
    "journal.accepted",
    "journal.preparing",
    "journal.filling",
    "journal.ready",
    "journal.committed",
    "journal.running",
];

/// Journal writes of either end that only a failure leads to.
pub const AFTER_FAILURE: &[&str] =
    &["journal.rolled-back", "journal.in-doubt", "journal.discarded"];

/// A point of this name; fails if a test wants it to.
///
/// The kinds: `abort` and `exit` end the process, `error` is the result,
/// `hang` never returns, `hold` returns once `NAME.reached` is gone.
#[cfg(feature = "fault-injection")]
pub fn point(name: &str) -> io::Result<()> {
    use std::{fs, path::PathBuf, process, thread, time::Duration};
    let Some(dir) = std::env::var_os("DUNLIN_FAULT").map(PathBuf::from) else { return Ok(()) };
    debug_assert!(
        [SOURCE, DESTINATION, AFTER_FAILURE].iter().any(|list| list.contains(&name)),
        "{name} is in no list"
    );
    let (armed, reached) = (dir.join(name), dir.join(format!("{name}.reached")));
    let Ok(kind) = fs::read_to_string(&armed) else { return Ok(()) };
    // Of two that come at once one fails.
    if fs::rename(&armed, &reached).is_err() {
        return Ok(());
    }
    let pause = Duration::from_millis(1);
    match kind.trim() {
        "abort" => process::abort(),
        "exit" => process::exit(70),
        "hang" => loop {
            thread::sleep(pause);
        },
        "hold" => {
            while reached.exists() {
                thread::sleep(pause);
            }
            Ok(())
        }
        _ => Err(io::Error::other(format!("a test lets {name} fail"))),
    }
}

/// A point of this name; nothing happens there.
#[cfg(not(feature = "fault-injection"))]
pub fn point(_: &str) -> io::Result<()> {
    Ok(())
}
