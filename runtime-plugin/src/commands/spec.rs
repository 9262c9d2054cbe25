//! `spec`: writes a `config.json` to begin with.

use std::fs::OpenOptions;
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::unistd::{getegid, geteuid};

/// Writes the default specification into a bundle; never over one.
pub(crate) fn spec(args: &liboci_cli::Spec) -> Result<u8> {
    let spec = if args.rootless {
        oci_spec::runtime::Spec::rootless(geteuid().as_raw(), getegid().as_raw())
    } else {
        oci_spec::runtime::Spec::default()
    };
    let path = args.bundle.clone().unwrap_or_else(|| PathBuf::from(".")).join("config.json");
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    serde_json::to_writer_pretty(file, &spec)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(0)
}
