//! `manifest.json`, which stands beside an image in a checkpoint directory.
//!
//! Says what the image is to people and to `restore`; nothing in it is trusted
//! beyond that.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use dunlin_checkpoint::Options;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::clocks::Clocks;

const NAME: &str = "manifest.json";
/// podman takes a checkpoint without this file of CRIU's for incomplete.
const INVENTORY: &str = "inventory.img";
/// runc's list of what init's stdin, stdout and stderr were; youki's too.
const DESCRIPTORS: &str = "descriptors.json";
const VERSION: u32 = 1;

/// A description of one checkpoint.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    /// Version of this file.
    pub(crate) version: u32,
    /// Version of dunlin that wrote it.
    pub(crate) dunlin: String,
    /// Id the container had.
    pub(crate) id: String,
    /// Whether this was a rehearsal (`--pre-dump`) without an image.
    pub(crate) pre_dump: bool,
    /// How it was dumped.
    pub(crate) options: Options,
    /// What init's stdin, stdout and stderr were.
    pub(crate) descriptors: [String; 3],
    /// What its clocks showed while it stood still.
    pub(crate) clocks: Option<Clocks>,
}

impl Manifest {
    /// Describes a checkpoint of container `id`.
    pub(crate) fn new(id: &str, init: Pid, options: &Options) -> Self {
        let name = |fd| {
            let link = fs::read_link(format!("/proc/{init}/fd/{fd}"));
            link.map_or_else(|_| String::new(), |path| path.display().to_string())
        };
        Self {
            version: VERSION,
            dunlin: env!("CARGO_PKG_VERSION").into(),
            id: id.into(),
            pre_dump: false,
            options: options.clone(),
            descriptors: [name(0), name(1), name(2)],
            clocks: None,
        }
    }

    /// Writes it into a checkpoint directory.
    pub(crate) fn save(&self, dir: &Path) -> Result<()> {
        write(&dir.join(NAME), &serde_json::to_string_pretty(self)?)?;
        write(&dir.join(DESCRIPTORS), &serde_json::to_string(&self.descriptors)?)?;
        write(&dir.join(INVENTORY), "dunlin: see manifest.json")
    }

    /// Reads the one of a checkpoint directory.
    pub(crate) fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(NAME);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let manifest: Self = serde_json::from_slice(&bytes)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if manifest.version != VERSION {
            bail!("{} is of version {}, which is unknown", path.display(), manifest.version);
        }
        Ok(manifest)
    }
}

/// Writes a file of a checkpoint directory.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        writeln!(file, "{text}")?;
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
