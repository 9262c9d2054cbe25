//! What every scenario goes through.
#![allow(clippy::print_stdout, reason = "captured, and shown for a test that fails")]

use std::thread::yield_now;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{Child, Facts, Mood, Place, Skipped, skip};

/// Moves a scenario five times in a row, alone on the host and as the init of
/// namespaces; compares `/proc` each time, and asks it in the end.
pub fn check(scenario: &str, mood: Mood) -> Result<()> {
    unless_skipped(|| {
        for place in [Place::Plain, Place::Isolated] {
            let mut child = Child::spawn(scenario, place, mood)?;
            let before = child.facts()?;
            for time in 1..=5 {
                child.relocate().with_context(|| format!("{place:?}, move {time}"))?;
                settled(&child, &before).with_context(|| format!("{place:?}, move {time}"))?;
            }
            child.verify().with_context(|| format!("{place:?}"))?;
        }
        Ok(())
    })
}

/// Leaves a scenario where it is: its check must pass, and must fail once its
/// world is damaged, or passing after a move would mean nothing.
pub fn at_rest(scenario: &str) -> Result<()> {
    unless_skipped(|| {
        for place in [Place::Plain, Place::Isolated] {
            let child = Child::spawn(scenario, place, Mood::Idle)?;
            settled(&child, &child.facts()?)?;
            child.verify().with_context(|| format!("{place:?}"))?;
        }
        match Child::spawn(scenario, Place::Isolated, Mood::Spoiled)?.verify() {
            Ok(()) => bail!("it does not notice that its world was damaged"),
            Err(noticed) => {
                let text = noticed.to_string();
                let found =
                    text.strip_prefix("failed: ").filter(|text| !text.starts_with("cannot"));
                ensure!(found.is_some(), "it should find the damage: {text}");
                println!("{scenario} notices: {text}");
                Ok(())
            }
        }
    })
}

/// Runs `test`; what this machine lacks is printed and is no failure.
pub fn unless_skipped(test: impl FnOnce() -> Result<()>) -> Result<()> {
    match test() {
        Err(err) if err.is::<Skipped>() => {
            skip(&err.to_string());
            Ok(())
        }
        other => other,
    }
}

/// Compares until nothing differs. A task that was just released needs a
/// moment to be back in the call in which it was stopped, and that shows: in
/// the signal mask of `ppoll`, or the depth of its stack.
pub fn settled(child: &Child, before: &Facts) -> Result<()> {
    let start = Instant::now();
    loop {
        let after = child.facts();
        let differences = after.as_ref().map(|after| before.differences(after));
        match differences {
            Ok(none) if none.is_empty() => return Ok(()),
            _ if start.elapsed() < Duration::from_secs(60) => yield_now(),
            Ok(differences) => bail!("/proc differs:\n{}", differences.join("\n")),
            Err(_) => return after.map(drop),
        }
    }
}
