//! The daemon's flags.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use dunlin_api::{client::Endpoint, rest::Peer, wire::Limits};

/// Flags of the daemon. Every path is one, so that several run side by side.
#[derive(Debug, Clone, Args)]
pub(crate) struct Config {
    /// Name of this node
    #[arg(long, default_value_t = host_name())]
    pub(crate) node: String,
    /// Unix socket for local clients
    #[arg(long, default_value = "/run/dunlin/shim.sock")]
    pub(crate) socket: PathBuf,
    /// Where the journal, logs and spooled hook calls are kept
    #[arg(long, default_value = "/run/dunlin-shim")]
    pub(crate) state_dir: PathBuf,
    /// The `dunlin` program
    #[arg(long, default_value = "dunlin")]
    pub(crate) runtime: PathBuf,
    /// `--root` of the runtime
    #[arg(long, default_value = "/run/dunlin")]
    pub(crate) runtime_root: PathBuf,
    /// Directory in which bundles of incoming containers are looked for
    #[arg(long)]
    pub(crate) bundles: Option<PathBuf>,
    /// Listen for peers and operators WITHOUT ENCRYPTION: whoever reaches this
    /// address owns this machine
    #[arg(long, value_name = "ADDR")]
    pub(crate) insecure_listen: Option<SocketAddr>,
    /// Listen for peers and operators, with mutual TLS
    #[arg(long, value_name = "ADDR", requires = "tls_cert")]
    pub(crate) listen: Option<SocketAddr>,
    #[command(flatten)]
    pub(crate) tls: crate::tls::Files,
    /// Another node
    #[arg(long = "peer", value_name = "NAME=URL", value_parser = parse_peer)]
    pub(crate) peers: Vec<Peer>,
    /// Most migrations at once, in and out together
    #[arg(long, default_value_t = 4)]
    pub(crate) max_migrations: usize,
    /// Longest silence of a peer before a migration is rolled back, in milliseconds
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(100..=600_000))]
    pub(crate) silence_ms: u64,
    /// Longest time a destination may take to prepare, in seconds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) prepare_s: u64,
    /// Longest time a worker may show no sign of life before it is killed, in seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) stuck_s: u64,
}

impl Config {
    /// Limits of a migration's stream.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            silence: Duration::from_millis(self.silence_ms),
            prepare: Duration::from_secs(self.prepare_s),
        }
    }

    /// Longest time a worker may say nothing.
    pub(crate) fn stuck(&self) -> Duration {
        Duration::from_secs(self.stuck_s)
    }

    /// Directory of one migration's files.
    pub(crate) fn migration_dir(&self, id: uuid::Uuid) -> PathBuf {
        self.state_dir.join("migrations").join(id.to_string())
    }

    /// Where the output of containers that came here goes.
    pub(crate) fn container_log(&self, id: &dunlin_api::rest::ContainerId) -> PathBuf {
        self.state_dir.join("logs").join(format!("{id}.log"))
    }

    /// Where hooks leave what they could not tell us.
    pub(crate) fn spool(&self) -> PathBuf {
        self.state_dir.join("spool")
    }
}

fn parse_peer(text: &str) -> Result<Peer, String> {
    let (name, url) = text.split_once('=').ok_or("expected NAME=URL")?;
    let endpoint: Endpoint = url.parse().map_err(|err| format!("{err}"))?;
    if name.is_empty() {
        return Err("a peer needs a name".into());
    }
    Ok(Peer { name: name.to_owned(), url: endpoint.to_string() })
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
