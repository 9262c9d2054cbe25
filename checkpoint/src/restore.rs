//! Destination side: build a tree from an image, release it or drop it.

mod builder;
mod task;

use std::os::fd::OwnedFd;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::{
    RestoreError,
    image::{Assembler, ImageSource, Kind},
};
use builder::{Builder, Built};

/// Where a tree is to be built.
pub struct Sandbox {
    /// The process that becomes the tree's root: it runs [`crate::skeleton`],
    /// in the namespaces, cgroup and root directory made for it, as uid 0 with
    /// all capabilities, no seccomp filter. In the caller's pid namespace.
    pub init: Pid,
    /// What takes the place of the source's stdin, stdout and stderr where
    /// those led out of the container.
    pub stdio: [OwnedFd; 3],
}

/// What a restore did. Times in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// Processes built.
    pub processes: u64,
    /// Threads built.
    pub threads: u64,
    /// Pages filled.
    pub pages: u64,
    /// Bytes read from the source.
    pub bytes: u64,
    /// From the first record until all stood ready.
    pub restore_us: u64,
}

/// Builds the tree of an image inside `sandbox`; nothing of it runs yet.
pub fn restore(sandbox: Sandbox, source: &mut dyn ImageSource) -> Result<Nascent, RestoreError> {
    let mut builder = Builder::seize(sandbox)?;
    let started = std::time::Instant::now();
    let mut body = Vec::new();
    let mut assembler = Assembler::default();
    let mut report = RestoreReport::default();
    loop {
        let raw = source.next(&mut body).map_err(RestoreError::Source)?;
        let raw = raw.ok_or_else(|| RestoreError::Image("it ends before its end".into()))?;
        report.bytes += body.len() as u64;
        let Some(kind) = assembler.take(raw, &mut body)? else { continue };
        if kind == Kind::End {
            break;
        }
        report.pages += builder.record(kind, &body)?;
    }
    let built = builder.finish()?;
    report.processes = built.processes();
    report.threads = built.threads();
    report.restore_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok(Nascent { report, built })
}

/// A complete tree that has not run yet: dropping this kills it.
#[must_use = "dropping it kills the tree"]
pub struct Nascent {
    report: RestoreReport,
    built: Built,
}

impl Nascent {
    /// What was built.
    #[must_use]
    pub fn report(&self) -> &RestoreReport {
        &self.report
    }

    /// Arms timers and lets every thread run.
    pub fn thaw(self) -> Result<(), RestoreError> {
        self.built.thaw()
    }
}
