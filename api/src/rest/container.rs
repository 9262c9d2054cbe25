//! Containers of a node.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{ContainerId, TcpPolicy};

/// A container as the node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Container {
    /// Its id.
    pub id: ContainerId,
    /// What it does.
    pub status: Status,
    /// Its first process, as the host counts.
    pub pid: Option<i32>,
    /// Absolute path of its bundle.
    pub bundle: String,
    /// How it is known here.
    pub origin: Origin,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// The migration it is in.
    pub migration: Option<Uuid>,
    /// How its first process ended, where that was seen: the exit code, or
    /// 128 and the signal.
    pub exit_code: Option<i32>,
}

/// What a container does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being made.
    Creating,
    /// Made, its program not started.
    Created,
    /// Its program runs.
    Running,
    /// Paused by its runtime.
    Paused,
    /// Its program has ended.
    Stopped,
}

/// How a container came to be known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Origin {
    /// It runs under `dunlin`.
    Dunlin,
    /// It runs under another OCI runtime and told us by a hook.
    Hook {
        /// Program that runs it, e.g. `runc`.
        runtime: String,
        /// The runtime's `--root`, where it is not the default.
        root: Option<String>,
    },
}

/// What a hook says of a container: the OCI state, and who runs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HookState {
    /// The container's id.
    pub id: ContainerId,
    /// What it does.
    pub status: Status,
    /// Its first process, as the host counts.
    pub pid: Option<i32>,
    /// Absolute path of its bundle.
    pub bundle: String,
    /// Its annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// Program of the runtime that called the hook.
    pub runtime: String,
    /// The runtime's `--root`, where it was given one.
    pub root: Option<String>,
}

/// Asks for an image of a container in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// Absolute path of the directory; made if it does not exist.
    pub path: String,
    /// Let the container run on.
    #[serde(default)]
    pub leave_running: bool,
    /// Established TCP connections.
    #[serde(default)]
    pub tcp: TcpPolicy,
    /// Carry file locks.
    #[serde(default)]
    pub file_locks: bool,
    /// Accept unix sockets to processes outside.
    #[serde(default)]
    pub external_unix: bool,
    /// Accept a controlling terminal from outside.
    #[serde(default)]
    pub shell_job: bool,
}

/// Asks for a container out of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// Id of the new container.
    pub id: ContainerId,
    /// Absolute path of the image's directory.
    pub path: String,
    /// Absolute path of the bundle.
    pub bundle: String,
}
