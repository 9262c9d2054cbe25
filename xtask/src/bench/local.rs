//! A process that holds memory is dumped, ended and restored on one host: by
//! the engine alone, and by CRIU alone. Both keep the image in memory.
//!
//! CRIU's times are those of its two commands, start and end of the program
//! included, as its user waits for them; ours are the engine's own, and as
//! `round trip` everything from the order to the answer of another process.

use std::{
    fs::File,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use dunlin_tests::{
    Child, Mood, Place,
    worker::{Moved, Order},
};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use super::{Bench, Sample, milliseconds};

const WAYS: [&str; 2] = ["dunlin", "criu"];

struct Local {
    mib: usize,
    with_criu: bool,
}

pub(super) fn benches(with_criu: bool) -> impl Iterator<Item = Box<dyn Bench>> {
    [16, 256, 1024].into_iter().map(move |mib| Box::new(Local { mib, with_criu }) as Box<dyn Bench>)
}

impl Bench for Local {
    fn name(&self) -> String {
        format!("local-{}", self.mib)
    }

    fn ways(&self) -> Vec<&'static str> {
        WAYS[..if self.with_criu { 2 } else { 1 }].to_vec()
    }

    fn measure(&mut self, way: usize) -> Result<Vec<Sample>> {
        let child = Child::spawn(&format!("memory_of_{}", self.mib), Place::Plain, Mood::Idle)?;
        let [dump, restore, round_trip] = if way == 0 { by_us(child)? } else { by_criu(child)? };
        Ok(vec![
            milliseconds("dump", dump),
            milliseconds("restore", restore),
            milliseconds("round trip", round_trip),
        ])
    }
}

fn by_us(mut child: Child) -> Result<[Duration; 3]> {
    let start = Instant::now();
    let moved: Moved = child.relocate()?;
    let round_trip = start.elapsed();
    child.verify()?;
    let us = Duration::from_micros;
    let dump = us(moved.dump.freeze_us + moved.dump.dump_us);
    Ok([dump, us(moved.restore.restore_us), round_trip])
}

fn by_criu(mut child: Child) -> Result<[Duration; 3]> {
    let image = TempDir::with_prefix_in("dunlin-bench-", "/dev/shm")?;
    let root = child.root();
    let start = Instant::now();
    criu(&image, &["dump", "--tree", &root.to_string()])?;
    let dump = start.elapsed();
    // Its parent collects it, or the pid stays taken; that it was killed is no
    // exit code, and said so.
    child.order::<i32>(&Order::Wait).err();
    let start = Instant::now();
    criu(&image, &["restore", "--restore-detached"])?;
    let restore = start.elapsed();
    end(root)?;
    Ok([dump, restore, dump + restore])
}

fn criu(image: &TempDir, args: &[&str]) -> Result<()> {
    let log = image.path().join("log");
    let mut command = Command::new("criu");
    command.args(args).arg("--images-dir").arg(image.path());
    command.stdout(File::create(&log)?).stderr(File::options().append(true).open(&log)?);
    let status = command.status()?;
    ensure!(status.success(), "{command:?}: {status}: {}", std::fs::read_to_string(&log)?.trim());
    Ok(())
}

/// Ends what CRIU restored: no child of ours, so all there is to see is that
/// the pid is free.
fn end(pid: Pid) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match kill(pid, Signal::SIGKILL) {
            Err(Errno::ESRCH) => return Ok(()),
            other => other?,
        }
        if deadline < Instant::now() {
            bail!("pid {pid} does not end");
        }
        thread::sleep(Duration::from_millis(5));
    }
}
