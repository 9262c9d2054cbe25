//! Hook calls that came while no shim listened, left as files by
//! `dunlin hook`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use dunlin_api::{ErrorCode, Problem, rest::HookState};
use serde::Deserialize;

use crate::daemon::Shim;

/// How often the spool is looked at beside the start.
const PERIOD: Duration = Duration::from_secs(2);

/// Longest file read.
const MAX_FILE: u64 = 256 << 10;

/// What a hook left.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Spooled {
    /// A container is there.
    Register(HookState),
    /// It is gone.
    Unregister(dunlin_api::rest::ContainerId),
}

/// Takes up spooled calls for ever.
pub(crate) async fn run(shim: Arc<Shim>) {
    let mut ticks = tokio::time::interval(PERIOD);
    loop {
        ticks.tick().await;
        if let Err(err) = drain(&shim).await {
            tracing::warn!(%err, "cannot read the spool");
        }
    }
}

/// Takes up all there are, in the order of their names, which is that of time.
async fn drain(shim: &Shim) -> io::Result<()> {
    let mut files: Vec<PathBuf> = fs::read_dir(shim.config.spool())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|end| end == "json"))
        .collect();
    files.sort();
    for path in files {
        let taken = match read(&path) {
            Ok(Spooled::Register(state)) => shim.containers.register(state).await,
            Ok(Spooled::Unregister(id)) => shim.containers.unregister(&id).await.map(drop),
            Err(err) => {
                tracing::warn!(path = %path.display(), %err, "not a hook's call: removed");
                Ok(())
            }
        };
        match taken {
            Ok(()) => fs::remove_file(&path)?,
            Err(Problem { code: ErrorCode::JournalFailed, detail, .. }) => {
                return Err(io::Error::other(detail));
            }
            Err(problem) => tracing::warn!(%problem, "a hook's call is left in the spool"),
        }
    }
    Ok(())
}

fn read(path: &Path) -> io::Result<Spooled> {
    if MAX_FILE < fs::symlink_metadata(path)?.len() {
        return Err(io::Error::other("too long"));
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}
