//! Containers on this host: where their state lives, how it is read.
//!
//! The state directory is libcontainer's (`state.json`, `youki_config.json`)
//! plus our own `dunlin.json`.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libcgroups::common::{AnyCgroupManager, CgroupConfig, create_cgroup_manager};
use libcontainer::container::{Container, ContainerStatus, State};
use nix::unistd::{Pid, geteuid};
use serde::{Deserialize, Serialize};

/// The directory that holds the state of all containers.
#[derive(Debug)]
pub(crate) struct Root(PathBuf);

/// What we know of a container beyond libcontainer's state.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Record {
    /// When its init started, in clock ticks since boot: tells it from a later
    /// process of the same pid.
    pub(crate) init_start: u64,
    /// Host end of the veth pair made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) veth: Option<String>,
}

const RECORD: &str = "dunlin.json";

impl Root {
    /// Takes the directory asked for or the default one, and makes it.
    pub(crate) fn find(asked: Option<&Path>) -> Result<Self> {
        let path = match asked {
            Some(path) => path.to_owned(),
            None => default_root(),
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&path)
            .and_then(|()| path.canonicalize())
            .map(Self)
            .with_context(|| format!("cannot use state directory {}", path.display()))
    }

    /// Whether this is the directory used when none is asked for.
    pub(crate) fn is_default(&self) -> bool {
        self.0 == default_root()
    }

    /// The directory itself.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// State directory of one container.
    ///
    /// # Errors
    /// When `id` could lead out of the root.
    pub(crate) fn dir(&self, id: &str) -> Result<PathBuf> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
        if id.is_empty() || id == "." || id == ".." || !id.chars().all(allowed) {
            bail!("invalid container id {id:?}");
        }
        Ok(self.0.join(id))
    }

    /// Loads a container with its present status.
    pub(crate) fn load(&self, id: &str) -> Result<Container> {
        let dir = self.dir(id)?;
        if !State::file_path(&dir).exists() {
            bail!("container {id} does not exist");
        }
        let mut container = Container::load(dir)
            .with_context(|| format!("cannot read the state of container {id}"))?;
        if let (Some(pid), Some(record)) = (container.pid(), Record::load(&container)?)
            && start_time(pid).is_some_and(|start| start != record.init_start)
        {
            container.set_status(ContainerStatus::Stopped);
        }
        Ok(container)
    }

    /// The ids of all containers, sorted.
    pub(crate) fn ids(&self) -> Result<Vec<String>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            if State::file_path(&entry.path()).exists() {
                ids.extend(entry.file_name().into_string());
            }
        }
        ids.sort();
        Ok(ids)
    }
}

impl Record {
    /// Reads the record of a container; one made by an older version has none.
    pub(crate) fn load(container: &Container) -> Result<Option<Self>> {
        let path = container.root.join(RECORD);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("cannot read {}", path.display()))
                .map(Some),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(err) => Err(err).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Writes it into the container's state directory.
    pub(crate) fn save(&self, container: &Container) -> Result<()> {
        let path = container.root.join(RECORD);
        fs::write(&path, serde_json::to_vec(self)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The cgroup of a container.
pub(crate) fn cgroup(container: &Container) -> Result<AnyCgroupManager> {
    let config = CgroupConfig {
        cgroup_path: container.spec().context("cannot read the container's cgroup")?.cgroup_path,
        systemd_cgroup: container.systemd(),
        container_name: container.id().to_owned(),
    };
    create_cgroup_manager(config).context("cannot open the container's cgroup")
}

/// When a process started, in clock ticks since boot; `None` when it is gone.
pub(crate) fn start_time(pid: Pid) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may itself hold spaces and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

fn default_root() -> PathBuf {
    if geteuid().is_root() {
        return "/run/dunlin".into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) => Path::new(&dir).join("dunlin"),
        None => format!("/run/user/{}/dunlin", geteuid()).into(),
    }
}
