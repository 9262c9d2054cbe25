//! The clocks of a container that go on where it does: monotonic and boot time.
//!
//! A time namespace shifts them (`time_namespaces(7)`). Its offsets count from
//! the clocks of the host, whatever namespace we are in ourselves.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxTimeOffset, LinuxTimeOffsetBuilder};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// What the two clocks show, or by how much they are shifted; nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Clocks {
    pub(crate) monotonic_ns: i64,
    pub(crate) boottime_ns: i64,
}

impl Clocks {
    /// What they show to process `pid` now.
    pub(crate) fn of(pid: Pid) -> Result<Self> {
        let host = host()?;
        let shift = shift(&pid.to_string())?;
        Ok(Self {
            monotonic_ns: host.monotonic_ns + shift.monotonic_ns,
            boottime_ns: host.boottime_ns + shift.boottime_ns,
        })
    }

    /// By how much they must be shifted to show this from now on.
    pub(crate) fn offsets(self) -> Result<Self> {
        let host = host()?;
        Ok(Self {
            monotonic_ns: self.monotonic_ns - host.monotonic_ns,
            boottime_ns: self.boottime_ns - host.boottime_ns,
        })
    }

    /// As `linux.timeOffsets` of a specification.
    pub(crate) fn to_spec(self) -> Result<HashMap<String, LinuxTimeOffset>> {
        let offset = |ns: i64| -> Result<LinuxTimeOffset> {
            let nanosecs = u32::try_from(ns.rem_euclid(1_000_000_000))?;
            let secs = ns.div_euclid(1_000_000_000);
            Ok(LinuxTimeOffsetBuilder::default().secs(secs).nanosecs(nanosecs).build()?)
        };
        Ok(HashMap::from([
            ("monotonic".into(), offset(self.monotonic_ns)?),
            ("boottime".into(), offset(self.boottime_ns)?),
        ]))
    }
}

/// Whether this kernel can shift them.
pub(crate) fn can_shift() -> bool {
    fs::symlink_metadata("/proc/self/ns/time").is_ok()
}

/// The clocks without the shift of our own namespace.
fn host() -> Result<Clocks> {
    let now = |clock| {
        let time = clock_gettime(clock);
        time.tv_sec * 1_000_000_000 + time.tv_nsec
    };
    let shift = shift("self")?;
    Ok(Clocks {
        monotonic_ns: now(ClockId::Monotonic) - shift.monotonic_ns,
        boottime_ns: now(ClockId::Boottime) - shift.boottime_ns,
    })
}

fn shift(pid: &str) -> Result<Clocks> {
    if !can_shift() {
        return Ok(Clocks { monotonic_ns: 0, boottime_ns: 0 });
    }
    let path = format!("/proc/{pid}/timens_offsets");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    parse(&text).with_context(|| format!("{path} reads {text:?}"))
}

fn parse(text: &str) -> Option<Clocks> {
    let offset = |name: &str| {
        let line = text.lines().find(|line| line.split_whitespace().next() == Some(name))?;
        let mut numbers = line.split_whitespace().skip(1).map(str::parse::<i64>);
        let (secs, nanosecs) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        secs.checked_mul(1_000_000_000)?.checked_add(nanosecs)
    };
    Some(Clocks { monotonic_ns: offset("monotonic")?, boottime_ns: offset("boottime")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_text_is_understood() {
        let text = "monotonic           5         7\nboottime           -1  500000000\n";
        let clocks = Clocks { monotonic_ns: 5_000_000_007, boottime_ns: -500_000_000 };
        assert_eq!(parse(text), Some(clocks));
        assert_eq!(parse("monotonic 5\n"), None);
    }

    #[test]
    fn negative_offsets_have_positive_nanoseconds() {
        let clocks = Clocks { monotonic_ns: -1, boottime_ns: 2_000_000_003 };
        let spec = clocks.to_spec().unwrap();
        assert_eq!(spec["monotonic"].secs(), Some(-1));
        assert_eq!(spec["monotonic"].nanosecs(), Some(999_999_999));
        assert_eq!(spec["boottime"].secs(), Some(2));
        assert_eq!(spec["boottime"].nanosecs(), Some(3));
    }

    #[test]
    fn what_a_process_sees_is_what_we_see() {
        let before = clock_gettime(ClockId::Monotonic);
        let clocks = Clocks::of(nix::unistd::getpid()).unwrap();
        assert!(before.tv_sec * 1_000_000_000 + before.tv_nsec <= clocks.monotonic_ns);
        let shift = clocks.offsets().unwrap();
        assert!(shift.monotonic_ns <= 0 && -1_000_000_000 < shift.monotonic_ns, "{shift:?}");
    }
}
