//! The examples do what they say, and leave nothing behind.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use dunlin_tests::{hosts::Hosts, node};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// A host whose empty `/run` shows what an example makes and leaves.
struct Place(Hosts);

impl Place {
    fn new() -> Result<Self> {
        Ok(Self(Hosts::new(&["example"])?))
    }

    fn start(&self, example: &str) -> Result<Child> {
        let dunlin = node::dunlin(&[])?;
        let bin = Path::new(dunlin.get_program()).parent().context("a program in no directory")?;
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let mut command = Command::new(examples.join(example).join("run"));
        command.env("DUNLIN_BIN", bin).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(self.0["example"].spawn(&mut command)?)
    }

    /// Runs an example to its end and returns what it said.
    fn run(&self, example: &str) -> Result<String> {
        let output = self.start(example)?.wait_with_output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Names of the directories of running examples.
    fn runs(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.0["example"].outside("/run"))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with("dunlin-example-") {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn is_clean(&self) -> Result<()> {
        ensure!(self.runs()?.is_empty(), "left: {:?}", self.runs()?);
        let netns = fs::read_dir(self.0["example"].outside("/run/netns"))?.count();
        ensure!(netns == 0, "{netns} network namespaces are left");
        let processes = self.0["example"].run(Command::new("ps").args(["-e", "-o", "comm"]))?;
        // The title, the host's own first process, and ps.
        ensure!(processes.lines().count() == 3, "left: {processes}");
        Ok(())
    }
}

#[test]
fn two_hosts() {
    let place = Place::new().unwrap();
    let said = place.run("two-hosts").unwrap();
    assert!(said.contains("counter can move to"), "{said}");
    assert!(said.contains("a ended with"), "{said}");
    place.is_clean().unwrap();
}

#[test]
fn node_drain() {
    let place = Place::new().unwrap();
    let said = place.run("node-drain").unwrap();
    assert!(said.ends_with("a runs 0\nb runs 2\nc runs 2\n"), "{said}");
    place.is_clean().unwrap();
}

#[test]
fn an_interrupted_example_cleans_up() {
    let place = Place::new().unwrap();
    let mut child = place.start("node-drain").unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.starts_with("web-1 -> "), "{line}");
    let runs = place.runs().unwrap();
    assert_eq!(runs.len(), 1);
    killpg(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    // 7 is what curl says when the shim was interrupted before the script.
    let code = child.wait().unwrap().code();
    assert!(matches!(code, Some(130 | 7)), "{code:?}");
    stdout.read_to_string(&mut line).unwrap();
    assert!(!line.contains("a runs"), "it was not interrupted: {line}");
    place.is_clean().unwrap();
    for top in fs::read_dir("/sys/fs/cgroup").unwrap() {
        assert!(!top.unwrap().path().join(&runs[0]).exists(), "a cgroup is left");
    }
}
