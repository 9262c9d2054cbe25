//! The daemon: what all requests share, and how it starts and stops.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use dunlin_api::{
    ErrorCode, Problem,
    client::{Client, Encrypt, Endpoint},
    rest::{Container, ContainerId, Instance, Node},
    wire,
};
use dunlin_checkpoint::image;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    config::Config,
    containers::Containers,
    drain::Drainer,
    host::{self, Host},
    http, incoming,
    journal::{Journal, boot_id},
    listen,
    metrics::Metrics,
    migrations::Migrations,
    outgoing, reaper, spool,
    tls::Tls,
};

/// Longest time a stopping daemon waits for migrations to be rolled back or done.
const FAREWELL: Duration = Duration::from_secs(10);

/// Everything that requests share.
pub(crate) struct Shim {
    pub(crate) config: Config,
    pub(crate) host: Host,
    pub(crate) containers: Containers,
    pub(crate) migrations: Migrations,
    pub(crate) drainer: Drainer,
    pub(crate) metrics: Metrics,
    pub(crate) encrypt: Option<Arc<dyn Encrypt>>,
    journal: Journal,
    boot: String,
}

impl Shim {
    /// Reads the journal and looks at the machine.
    fn new(config: Config, tls: Option<Arc<Tls>>) -> anyhow::Result<Arc<Self>> {
        for dir in [&config.state_dir, &config.spool()] {
            private_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let journal = Journal::open(&config.state_dir).with_context(|| {
            format!("cannot open the journal in {}", config.state_dir.display())
        })?;
        Ok(Arc::new(Self {
            host: Host::probe(),
            containers: Containers::new(journal.clone()).context("cannot read the journal")?,
            migrations: Migrations::new(journal.clone()).context("cannot read the journal")?,
            drainer: Drainer::default(),
            metrics: Metrics::default(),
            encrypt: tls.map(|tls| tls as Arc<dyn Encrypt>),
            boot: boot_id(),
            journal,
            config,
        }))
    }

    /// Who we are when a peer asks.
    pub(crate) fn instance(&self) -> Instance {
        Instance {
            node: self.config.node.clone(),
            journal: self.journal.id(),
            boot: self.boot.clone(),
        }
    }

    /// A client of the node at a URL or of a peer's name.
    pub(crate) fn peer(&self, to: &str) -> Result<(Endpoint, Client), Problem> {
        let known = self.config.peers.iter().find(|peer| peer.name == to);
        let url = known.map_or(to, |peer| peer.url.as_str());
        let endpoint: Endpoint = url.parse().map_err(|err| {
            Problem::new(ErrorCode::BadRequest, to, format!("{err}, or the name of a peer"))
        })?;
        let client = Client::new(endpoint.clone()).with_tls(self.encrypt.clone());
        Ok((endpoint, client))
    }

    /// All containers, each with the migration it is in.
    pub(crate) async fn containers(&self) -> Result<Vec<Container>, Problem> {
        let mut all = self.containers.all(&self.config).await?;
        for container in &mut all {
            container.migration = self.migrations.of(&container.id).map(|e| e.migration().id);
        }
        Ok(all)
    }

    /// One container, with the migration it is in.
    pub(crate) async fn container(&self, id: &ContainerId) -> Result<Container, Problem> {
        let mut container = self.containers.find(&self.config, id).await?;
        container.migration = self.migrations.of(id).map(|entry| entry.migration().id);
        Ok(container)
    }

    /// The node, as shown.
    pub(crate) async fn node(&self) -> Result<Node, Problem> {
        let (memory_total, memory_available) = host::memory();
        Ok(Node {
            name: self.config.node.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            wire_versions: wire::VERSIONS.to_vec(),
            image_version: image::VERSION,
            kernel: self.host.kernel.clone(),
            arch: self.host.arch.clone(),
            cpus: self.host.cpus,
            cpu_features: self.host.cpu_features.clone(),
            memory_total,
            memory_available,
            containers: self.containers().await?.len(),
            migrations: self.migrations.running().len(),
            max_migrations: self.config.max_migrations,
            draining: self.drainer.is_closed(),
            peers: self.config.peers.clone(),
        })
    }
}

/// Runs until it is told to stop.
pub(crate) async fn run(config: Config) -> anyhow::Result<()> {
    // Containers that came here lose their parent when their worker ends.
    nix::sys::prctl::set_child_subreaper(true).context("cannot adopt containers")?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let tls = Tls::open(&config.tls)?;
    let shim = Shim::new(config, tls.clone())?;
    let local = listen::unix(&shim.config.socket)?;
    tokio::spawn(reaper::run(shim.clone()));
    tokio::spawn(spool::run(shim.clone()));
    for entry in shim.migrations.running() {
        match entry.record().await.away {
            Some(_) => tokio::spawn(outgoing::recover(shim.clone(), entry)),
            None => tokio::spawn(incoming::recover(shim.clone(), entry)),
        };
    }

    let router = http::router(shim.clone());
    let limits = listen::Limits::default();
    if let Some(address) = shim.config.insecure_listen {
        let listener = listen::tcp(address).await?;
        let address = listener.local_addr()?;
        tracing::warn!(%address, "listening WITHOUT ENCRYPTION: whoever reaches it owns this node");
        tokio::spawn(listen::serve_tcp(listener, router.clone(), limits.clone()));
    }
    if let (Some(address), Some(tls)) = (shim.config.listen, tls) {
        let listener = listen::tcp(address).await?;
        let address = listener.local_addr()?;
        tracing::info!(%address, "listening with mutual TLS");
        tokio::spawn(listen::serve_tls(listener, tls, router.clone(), limits.clone()));
    }
    // Last: who is answered here finds everything up.
    tokio::spawn(listen::serve_unix(local, router, limits));
    tracing::info!(node = %shim.config.node, socket = %shim.config.socket.display(), "ready");

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping: migrations are rolled back or finished, containers run on");
    shim.drainer.close();
    let running = shim.migrations.running();
    running.iter().for_each(|entry| entry.cancel());
    let over = futures::future::join_all(running.iter().map(|entry| entry.over()));
    if tokio::time::timeout(FAREWELL, over).await.is_err() {
        tracing::warn!("some migrations are not over; they go on when the shim is started again");
    }
    std::fs::remove_file(&shim.config.socket).context("cannot remove the socket")
}

/// Makes a directory that only we can look into.
fn private_dir(path: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}
