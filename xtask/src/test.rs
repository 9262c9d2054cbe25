//! `cargo xtask test`: every test of the project, with its skips by name.
//!
//! A test that cannot run here prints `SKIP name: what it lacks`, or `skipped:
//! what it lacks`, and returns. One that is not in the committed list,
//! `tests/skips.txt`, is a failure: otherwise a machine could lose half of its
//! tests without a word.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    process::{Command, ExitStatus, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use crate::{FAULTS, root, setup};

/// Which tests to run.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// Only tests of this package.
    #[arg(short, long)]
    package: Option<String>,
}

/// Builds everything and runs every test.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::install(&[setup::BUILD, setup::DEMO, setup::TEST])?;
    // Tests run the programs that belong together, so all are built first.
    setup::run(setup::cargo().args(["build", "--workspace", "--bins"]).args(FAULTS))?;
    let mut skips = BTreeMap::new();
    let status = run_tests(args, &mut skips)?;
    let known = known_skips()?;
    let mut unexpected = Vec::new();
    for (name, reason) in &skips {
        println!("skipped {name}: {reason}");
        let short = name.rsplit("::").next().unwrap_or(name);
        if !known.iter().any(|known| known == short) {
            unexpected.push(name.as_str());
        }
    }
    ensure!(status.success(), "tests failed");
    ensure!(unexpected.is_empty(), "skipped but not in tests/skips.txt: {}", unexpected.join(", "));
    println!("test: all good, {} skipped", skips.len());
    Ok(())
}

/// After so long without the end of a test, one of them hangs for good.
const PATIENCE: Duration = Duration::from_secs(15 * 60);

/// Runs the tests, shows what they say and notes who skipped and why.
fn run_tests(args: &Args, skips: &mut BTreeMap<String, String>) -> Result<ExitStatus> {
    // Compiled first, so that the silence of a compiler is not taken for a hang.
    setup::run(cargo_test(args).arg("--no-run"))?;
    let mut child = cargo_test(args)
        .args(&args.filter)
        .args(["--", "--show-output"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("cannot run `cargo test`")?;
    let group = Pid::from_raw(i32::try_from(child.id())?);
    let Some(stdout) = child.stdout.take() else { bail!("`cargo test` has no output") };
    let (to, lines) = channel();
    thread::spawn(move || {
        BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| to.send(line))
    });
    let mut section = String::new();
    let mut progress = Instant::now();
    loop {
        let line = match lines.recv_timeout(PATIENCE.saturating_sub(progress.elapsed())) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                killpg(group, Signal::SIGKILL)?;
                child.wait()?;
                bail!("no test has ended for {} minutes; it hangs", PATIENCE.as_secs() / 60);
            }
        };
        if line.starts_with("test ") {
            progress = Instant::now();
        }
        if let Some(name) = line.strip_prefix("---- ").and_then(|l| l.strip_suffix(" stdout ----"))
        {
            name.clone_into(&mut section);
        }
        if let Some((name, reason)) = parse_skip(&line, &section) {
            skips.insert(name.to_owned(), reason.to_owned());
        }
        println!("{line}");
    }
    Ok(child.wait()?)
}

fn cargo_test(args: &Args) -> Command {
    let mut cargo = setup::cargo();
    cargo.args(["test", "--no-fail-fast"]);
    match &args.package {
        Some(package) => cargo.args(["--package", package]),
        None => cargo.arg("--workspace").args(FAULTS),
    };
    cargo
}

/// Takes `SKIP name: reason`, `skipped: reason` in the output of test `section`,
/// or libtest's `test name ... ignored, reason` apart.
fn parse_skip<'a>(line: &'a str, section: &'a str) -> Option<(&'a str, &'a str)> {
    if let Some(reason) = line.strip_prefix("skipped: ") {
        return Some((section, reason));
    }
    if let Some(skip) = line.strip_prefix("SKIP ") {
        return Some(skip.split_once(": ").unwrap_or((skip, "no reason given")));
    }
    let (name, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let reason = result.strip_prefix("ignored")?;
    Some((name, reason.strip_prefix(", ").unwrap_or("no reason given")))
}

/// Names in `tests/skips.txt`: one a line, `#` begins a remark.
fn known_skips() -> Result<Vec<String>> {
    let path = root().join("tests/skips.txt");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim().to_owned())
        .filter(|name| !name.is_empty())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_skip_is_seen() {
        let parse = |line| parse_skip(line, "c::d");
        assert_eq!(parse("SKIP amx: needs AMX"), Some(("amx", "needs AMX")));
        assert_eq!(parse("skipped: needs root"), Some(("c::d", "needs root")));
        assert_eq!(parse("test a::b ... ignored, slow"), Some(("a::b", "slow")));
        assert_eq!(parse("test a::b ... ignored"), Some(("a::b", "no reason given")));
        assert_eq!(parse("test a::b ... ok"), None);
        assert_eq!(parse("running 3 tests"), None);
    }
}
