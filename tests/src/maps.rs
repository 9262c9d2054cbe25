//! The mappings of a process as `/proc/PID/smaps` lists them.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

use crate::facts::Names;

#[derive(Debug, PartialEq)]
struct Mapping {
    start: u64,
    end: u64,
    /// Access, file, locked bytes wanted, flags: all that must be equal for
    /// the kernel to be free to join two neighbours.
    kind: String,
    /// Offset in the file; for anonymous memory none.
    offset: Option<u64>,
}

/// Range and properties of each mapping.
///
/// Where the kernel joins two neighbours depends on the order in which they
/// were made, so neighbours that are alike are always joined here.
pub(crate) fn read(dir: &str, names: &mut Names) -> Result<BTreeMap<String, String>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in fs::read_to_string(format!("{dir}/smaps"))?.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            // `sd` is set by every write; `ac` says that the mapping once was
            // writable, which only the sum of reserved memory remembers.
            let flags = flags.split_ascii_whitespace().filter(|flag| !["sd", "ac"].contains(flag));
            let last = mappings.last_mut().context("flags before any mapping")?;
            last.kind = format!("{} {}", last.kind, flags.collect::<Vec<_>>().join(" "));
        } else if line.split_ascii_whitespace().next().is_some_and(|word| !word.ends_with(':')) {
            mappings.push(parse(line, names).with_context(|| line.to_owned())?);
        }
    }
    mappings.dedup_by(|next, last| {
        let length = last.end - last.start;
        let continues = last.offset.map(|offset| offset + length) == next.offset;
        let joined = last.end == next.start && last.kind == next.kind && continues;
        if joined {
            last.end = next.end;
        }
        joined
    });
    let shown = mappings.into_iter().map(|Mapping { start, end, kind, offset }| {
        (
            format!("{start:012x}-{end:012x}"),
            format!("{kind} {}", offset.map_or(String::new(), |o| format!("{o:x}"))),
        )
    });
    Ok(shown.collect())
}

fn parse(line: &str, names: &mut Names) -> Result<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let mut word = || words.next().context("too short");
    let (start, end) = word()?.split_once('-').context("no range")?;
    let (access, offset, device, inode) = (word()?, word()?, word()?, word()?);
    let path = words.collect::<Vec<_>>().join(" ");
    let file = if inode == "0" {
        path
    } else if path.starts_with("/dev/zero")
        || path.starts_with("/memfd:")
        || path.starts_with("/SYSV")
        || path.ends_with("(deleted)")
    {
        // The inode of such memory is new after a move, but stays shared.
        format!("{path} {}", names.of(&format!("{device} {inode}")))
    } else {
        format!("{path} {device} {inode}")
    };
    Ok(Mapping {
        start: u64::from_str_radix(start, 16)?,
        end: u64::from_str_radix(end, 16)?,
        kind: format!("{access} {file}"),
        offset: (inode != "0").then(|| u64::from_str_radix(offset, 16)).transpose()?,
    })
}
