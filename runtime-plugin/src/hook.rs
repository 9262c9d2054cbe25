//! `dunlin hook`: a container under another OCI runtime becomes known to the
//! node's shim, which can then move it.
//!
//! A container must never fail to start or stop because of us: whatever goes
//! wrong is said, left in a spool for the shim, and the exit code is 0.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use dunlin_api::client::{Client, Endpoint};
use dunlin_api::rest::{ContainerId, HookState, Status};
use dunlin_api::{ErrorCode, Problem};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::log::say;
use crate::network;

/// Longest state read from stdin.
const MAX_STATE: u64 = 1 << 20;

/// Longest time the shim may take; a container waits for us.
const PATIENCE: Duration = Duration::from_secs(2);

/// Tells the node's shim of a container under another runtime
#[derive(Debug, Args)]
pub(crate) struct Hook {
    /// Stage the runtime is at
    stage: Stage,
    /// Socket of the node's shim
    #[arg(long, env = "DUNLIN_SHIM", default_value = "/run/dunlin/shim.sock")]
    shim: PathBuf,
    /// Where calls are left while no shim listens
    #[arg(long, env = "DUNLIN_SPOOL", default_value = "/run/dunlin-shim/spool")]
    spool: PathBuf,
    /// Program of the runtime; found out from who calls when left out
    #[arg(long)]
    runtime: Option<String>,
    /// The runtime's --root; found out from who calls when left out
    #[arg(long)]
    runtime_root: Option<String>,
}

/// Stages of a container's life that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    #[value(name = "createRuntime")]
    CreateRuntime,
    Poststart,
    Poststop,
}

/// The OCI state as runtimes write it.
#[derive(Debug, Deserialize)]
struct State {
    id: ContainerId,
    #[serde(default)]
    status: Option<String>,
    #[serde(default)]
    pid: Option<i32>,
    bundle: String,
    #[serde(default)]
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

/// What is to be told; also the content of a spooled file.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Call {
    Register(HookState),
    Unregister(ContainerId),
}

/// Tells the shim, or leaves the call in the spool.
pub(crate) fn hook(args: &Hook) -> u8 {
    if let Err(err) = tell(args) {
        say(&format!("dunlin hook: {err:#}"));
        say("the container is not affected; it cannot be migrated until the shim knows of it");
    }
    0
}

fn tell(args: &Hook) -> Result<()> {
    let mut text = Vec::new();
    io::stdin().take(MAX_STATE).read_to_end(&mut text).context("cannot read the state")?;
    let state: State = serde_json::from_slice(&text).context("stdin is no OCI state")?;
    if let (Stage::CreateRuntime, Some(pid)) = (args.stage, state.pid)
        && let Err(err) = network::release(Pid::from_raw(pid))
    {
        tracing::warn!("{err:#}");
    }
    let call = call(args, state)?;
    let Err(problem) = send(&args.shim, &call) else { return Ok(()) };
    if problem.code != ErrorCode::PeerUnreachable && problem.code != ErrorCode::PeerSilent {
        bail!("the shim refuses: {problem}");
    }
    spool(&args.spool, &call).context("no shim listens, and the call cannot be left for it")
}

fn call(args: &Hook, state: State) -> Result<Call> {
    if args.stage == Stage::Poststop {
        return Ok(Call::Unregister(state.id));
    }
    let (program, root) = match (&args.runtime, &args.runtime_root) {
        (Some(program), root) => (program.clone(), root.clone()),
        (None, root) => {
            let (program, found) = caller().context("cannot see which runtime calls")?;
            (program, root.clone().or(found))
        }
    };
    // createRuntime says `creating`, poststart `running` or, in older ones, `created`.
    let status = match state.status.as_deref() {
        Some("running") => Status::Running,
        Some("created") => Status::Created,
        Some("stopped") => Status::Stopped,
        _ => Status::Creating,
    };
    Ok(Call::Register(HookState {
        id: state.id,
        status: if args.stage == Stage::Poststart { Status::Running } else { status },
        pid: state.pid.filter(|pid| 0 < *pid),
        bundle: state.bundle,
        annotations: state.annotations.unwrap_or_default(),
        runtime: program,
        root,
    }))
}

/// The runtime that runs us: its program and its `--root`.
fn caller() -> Result<(String, Option<String>)> {
    let pid = nix::unistd::getppid();
    let line = fs::read(format!("/proc/{pid}/cmdline"))?;
    let words: Vec<_> =
        line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word)).collect();
    let exe = fs::read_link(format!("/proc/{pid}/exe"))?;
    // A runtime that runs from a sealed copy of itself has no path.
    let program = match exe.to_str() {
        Some(path) if path.starts_with('/') && exe.exists() => path.to_owned(),
        _ => words.first().context("the caller has no name")?.to_string(),
    };
    Ok((program, root_flag(&words)))
}

/// The value of a global `--root` or `-root`, with which every runtime keeps
/// its state apart.
fn root_flag(words: &[impl AsRef<str>]) -> Option<String> {
    let mut words = words.iter().map(AsRef::as_ref);
    while let Some(word) = words.next() {
        match word.strip_prefix("--").or_else(|| word.strip_prefix('-')) {
            Some("root" | "r") => return words.next().map(str::to_owned),
            Some(flag) => {
                if let Some(value) = flag.strip_prefix("root=") {
                    return Some(value.to_owned());
                }
            }
            None => {}
        }
    }
    None
}

fn send(shim: &Path, call: &Call) -> Result<(), Problem> {
    let silent = |err: &dyn std::fmt::Display| {
        Problem::new(ErrorCode::PeerSilent, "shim", format!("the shim does not answer: {err}"))
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|err| silent(&err))?;
    runtime.block_on(async {
        let client = Client::new(Endpoint::Unix(shim.to_owned()));
        let told = async {
            match call {
                Call::Register(state) => client.register(state).await,
                Call::Unregister(id) => match client.unregister(id).await {
                    // It left by a migration, which the shim knows better than we do.
                    Err(problem) if problem.code == ErrorCode::UnknownContainer => Ok(()),
                    told => told,
                },
            }
        };
        tokio::time::timeout(PATIENCE, told).await.map_err(|err| silent(&err))?
    })
}

/// Leaves a call as a file that is there as a whole or not at all. Names sort
/// by time.
fn spool(dir: &Path, call: &Call) -> Result<()> {
    fs::create_dir_all(dir)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    let path = dir.join(format!("{now:039}-{}.json", std::process::id()));
    let part = path.with_extension("part");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
    file.write_all(&serde_json::to_vec(call)?)?;
    fs::rename(&part, &path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(stage: Stage, dir: &Path) -> Hook {
        Hook {
            stage,
            shim: dir.join("no.sock"),
            spool: dir.join("spool"),
            runtime: Some("/usr/bin/runc".into()),
            runtime_root: Some("/run/x".into()),
        }
    }

    fn state() -> State {
        let text = r#"{"ociVersion":"1.0.2","id":"web-1","status":"created","pid":42,
                       "bundle":"/srv/web-1","annotations":{"k":"v"}}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_runtimes_root_is_found() {
        assert_eq!(root_flag(&["runc", "--root", "/a", "create"]), Some("/a".into()));
        assert_eq!(root_flag(&["runc", "--debug", "-root=/b", "create"]), Some("/b".into()));
        assert_eq!(root_flag(&["runc", "create", "x"]), None);
        assert_eq!(root_flag(&["runc", "--root"]), None);
    }

    #[test]
    fn what_nobody_hears_is_left_in_the_spool_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for stage in [Stage::CreateRuntime, Stage::Poststart, Stage::Poststop] {
            let args = args(stage, dir.path());
            let call = call(&args, state()).unwrap();
            let problem = send(&args.shim, &call).unwrap_err();
            assert_eq!(problem.code, ErrorCode::PeerUnreachable);
            spool(&args.spool, &call).unwrap();
        }
        let mut files: Vec<_> = fs::read_dir(dir.path().join("spool"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        let said: Vec<_> = files.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
        assert!(said[0].starts_with(r#"{"register":{"id":"web-1","status":"created","pid":42"#));
        assert!(said[1].contains(r#""status":"running""#) && said[1].contains("/usr/bin/runc"));
        assert_eq!(said[2], r#"{"unregister":"web-1"}"#);
    }

    #[test]
    fn a_state_that_leads_out_is_refused() {
        let text = r#"{"id":"../x","bundle":"/b"}"#;
        assert!(serde_json::from_str::<State>(text).is_err());
    }
}
