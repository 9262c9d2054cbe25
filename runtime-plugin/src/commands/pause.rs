//! `pause` and `resume`.

use anyhow::{Context, Result};
use liboci_cli::{Pause, Resume};

use crate::container::Root;

/// Freezes every process of a container.
pub(crate) fn pause(root: &Root, args: &Pause) -> Result<u8> {
    let id = &args.container_id;
    root.load(id)?.pause().with_context(|| format!("cannot pause {id}"))?;
    Ok(0)
}

/// Lets them run on.
pub(crate) fn resume(root: &Root, args: &Resume) -> Result<u8> {
    let id = &args.container_id;
    root.load(id)?.resume().with_context(|| format!("cannot resume {id}"))?;
    Ok(0)
}
