//! The log that callers look for in the work directory of a checkpoint or a
//! restore.
//!
//! It is called `dump.log` or `restore.log`, unless the file that annotation
//! `org.criu.config` names says `log-file=NAME`. Nothing else of that file
//! means anything here.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};

const CONFIG: &str = "org.criu.config";

/// A log that is written once, when it is known how the work ended.
#[derive(Debug)]
pub(crate) struct WorkLog {
    path: PathBuf,
}

impl WorkLog {
    /// A log called `name` in `work`, or in `image` where there is no `work`.
    pub(crate) fn new(
        work: Option<&Path>,
        image: &Path,
        name: &str,
        annotations: Option<&HashMap<String, String>>,
    ) -> Result<Self> {
        let name = match annotations.and_then(|all| all.get(CONFIG)) {
            Some(config) => {
                let text = fs::read_to_string(config)
                    .with_context(|| format!("cannot read {config}, named by {CONFIG}"))?;
                configured(&text).unwrap_or(name).to_owned()
            }
            None => name.to_owned(),
        };
        Ok(Self { path: work.unwrap_or(image).join(name) })
    }

    /// Says how it ended; that nobody can read it later is no failure.
    pub(crate) fn write(&self, id: &str, result: Result<&impl Serialize, &anyhow::Error>) {
        let line = match result {
            Ok(report) => json!({ "container": id, "report": report }),
            Err(err) => json!({ "container": id, "error": format!("{err:#}") }),
        };
        if let Err(err) = self.put(&line) {
            tracing::warn!(%err, path = %self.path.display(), "cannot write the work log");
        }
    }

    fn put(&self, line: &Value) -> std::io::Result<()> {
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(&self.path, format!("{line}\n"))
    }
}

/// The name in a configuration of CRIU's.
fn configured(text: &str) -> Option<&str> {
    text.lines().find_map(|line| {
        let rest = line.trim().trim_start_matches("--").strip_prefix("log-file")?;
        let name = rest.trim_start().trim_start_matches('=').trim();
        (!name.is_empty()).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_found_as_criu_writes_it() {
        assert_eq!(configured("tcp-established\nlog-file=a.log\n"), Some("a.log"));
        assert_eq!(configured("--log-file a.log"), Some("a.log"));
        assert_eq!(configured("# log-file=a.log"), None);
        assert_eq!(configured(""), None);
    }
}
