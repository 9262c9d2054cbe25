//! What is asked of OCI runtimes, always by running their program.

use std::{
    collections::BTreeMap,
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use dunlin_api::{
    ErrorCode, Problem,
    rest::{CheckpointRequest, Container, ContainerId, Origin, RestoreRequest, Status, TcpPolicy},
};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Command,
};

use crate::{config::Config, reaper};

/// Longest time a runtime may take for anything but moving memory.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most bytes read of what a runtime writes.
const MAX_OUTPUT: u64 = 4 << 20;

type Pipe = Box<dyn AsyncRead + Send + Unpin>;

/// One container in the answer to `list --format json`.
#[derive(Deserialize)]
struct Listed {
    id: ContainerId,
    #[serde(default)]
    pid: Option<i32>,
    status: Status,
    bundle: String,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// The containers that run under `dunlin`.
pub(crate) async fn list(config: &Config) -> Result<Vec<Container>, Problem> {
    let mut command = dunlin(config);
    command.args(["list", "--format", "json"]);
    let output = run(command, PATIENCE, "list").await?;
    let listed: Option<Vec<Listed>> = serde_json::from_slice(&output.stdout).map_err(|err| {
        Problem::new(ErrorCode::RuntimeFailed, "list", format!("dunlin list is no JSON: {err}"))
    })?;
    let containers = listed.unwrap_or_default().into_iter().map(|listed| Container {
        id: listed.id,
        status: listed.status,
        pid: listed.pid.filter(|pid| 0 < *pid && listed.status != Status::Stopped),
        bundle: listed.bundle,
        origin: Origin::Dunlin,
        annotations: listed.annotations.unwrap_or_default(),
        migration: None,
        exit_code: None,
    });
    Ok(containers.collect())
}

/// Deletes a container, whatever state it is in.
pub(crate) async fn delete(
    config: &Config,
    origin: &Origin,
    id: &ContainerId,
) -> Result<(), Problem> {
    let mut command = match origin {
        Origin::Dunlin => dunlin(config),
        Origin::Hook { runtime, root } => {
            let mut command = Command::new(runtime);
            command.args(root.iter().flat_map(|root| ["--root", root.as_str()]));
            command
        }
    };
    command.args(["delete", "--force", id.as_str()]);
    run(command, PATIENCE, id.as_str()).await.map(drop)
}

/// Writes a container's image into a directory.
pub(crate) async fn checkpoint(
    config: &Config,
    id: &ContainerId,
    request: &CheckpointRequest,
) -> Result<(), Problem> {
    let mut command = dunlin(config);
    command.args(["checkpoint", "--image-path", &request.path]);
    let tcp = match request.tcp {
        TcpPolicy::Keep => Some("--tcp-established"),
        TcpPolicy::Close => {
            let detail = "a checkpoint keeps its connections or is refused; \
                          close them when it is restored";
            return Err(Problem::new(ErrorCode::NotSupported, id.as_str(), detail));
        }
        TcpPolicy::Refuse => None,
    };
    let flags = [
        request.leave_running.then_some("--leave-running"),
        request.file_locks.then_some("--file-locks"),
        request.external_unix.then_some("--ext-unix-sk"),
        request.shell_job.then_some("--shell-job"),
        tcp,
    ];
    command.args(flags.into_iter().flatten()).arg(id.as_str());
    run(command, Duration::MAX, id.as_str()).await.map(drop)
}

/// Makes a container out of an image.
pub(crate) async fn restore(config: &Config, request: &RestoreRequest) -> Result<(), Problem> {
    let log = crate::worker::append(&config.container_log(&request.id));
    let log = log.and_then(|log| Ok((log.try_clone()?, log))).map_err(|err| {
        let detail = format!("cannot open the container's log: {err}");
        Problem::new(ErrorCode::Internal, request.id.as_str(), detail)
    })?;
    let mut command = dunlin(config);
    command.args(["restore", "--detach", "--image-path", &request.path]);
    command.args(["--bundle", &request.bundle, request.id.as_str()]);
    // Its output stays open in the container, so it cannot be a pipe of ours.
    command.stdin(Stdio::null()).stdout(log.0).stderr(log.1);
    let failed = |text: String| {
        let id = &request.id;
        let log = config.container_log(id);
        let detail = format!("dunlin restore of {id} {text}; see {}", log.display());
        Problem::new(ErrorCode::RestoreFailed, id.as_str(), detail)
    };
    let status = match reaper::spawn(&mut command) {
        Ok(mut child) => child.wait().await,
        Err(err) => Err(err),
    };
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(failed(format!("ended with {status}"))),
        Err(err) => Err(failed(format!("could not be started: {err}"))),
    }
}

/// `dunlin` with the root all its calls share.
pub(crate) fn dunlin(config: &Config) -> Command {
    let mut command = Command::new(&config.runtime);
    command.arg("--root").arg(&config.runtime_root);
    command
}

async fn run(mut command: Command, patience: Duration, object: &str) -> Result<Output, Problem> {
    let name = command.as_std().get_program().to_owned();
    let name = Path::new(&name).file_name().unwrap_or(&name).to_string_lossy().into_owned();
    let failed = |detail: String| Problem::new(ErrorCode::RuntimeFailed, object, detail);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let unusable = |err: std::io::Error| failed(format!("{name} cannot be run: {err}"));
    let mut child = reaper::spawn(&mut command).map_err(unusable)?;
    let output = tokio::time::timeout(patience, collect(&mut child))
        .await
        .map_err(|_| failed(format!("{name} did not end in time")))?
        .map_err(unusable)?;
    if output.status.success() {
        return Ok(output);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let said = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
    Err(failed(format!("{name} ended with {} and said: {}", output.status, said.trim())))
}

/// Waits for a child and what it writes. Something it left behind may hold
/// the pipes open, so their end is not waited for once the child is gone.
async fn collect(child: &mut reaper::Own) -> std::io::Result<Output> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let read = |pipe: Option<Pipe>| {
        tokio::spawn(async move {
            let mut bytes = Vec::new();
            if let Some(pipe) = pipe {
                pipe.take(MAX_OUTPUT).read_to_end(&mut bytes).await?;
            }
            Ok::<_, std::io::Error>(bytes)
        })
    };
    let out = read(stdout.map(|pipe| Box::new(pipe) as Pipe));
    let err = read(stderr.map(|pipe| Box::new(pipe) as Pipe));
    let status = child.wait().await?;
    let late = |task| tokio::time::timeout(Duration::from_secs(1), task);
    let bytes = |read: Result<Result<std::io::Result<Vec<u8>>, _>, _>| match read {
        Ok(Ok(bytes)) => bytes.unwrap_or_default(),
        Ok(Err(_)) | Err(_) => Vec::new(),
    };
    Ok(Output { status, stdout: bytes(late(out).await), stderr: bytes(late(err).await) })
}
