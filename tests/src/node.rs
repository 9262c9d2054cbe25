//! A node: a host on which `dunlin-shim` runs.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use dunlin_api::{
    Problem,
    client::{Client, Endpoint},
    rest::{ContainerId, MigrateRequest, Migration},
};
use tokio::runtime::{Builder, Runtime};

use crate::{bundle::Bundle, hosts::Host, worker::program};

/// Where the shim listens for this host's clients.
const SOCKET: &str = "/run/dunlin/shim.sock";

/// Where it listens for peers.
const PORT: u16 = 7070;

/// How long a shim may take to come up.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running shim and a client of it; dropping it ends the shim.
#[derive(Debug)]
pub struct Node {
    url: String,
    log: PathBuf,
    client: Client,
    runtime: Runtime,
    shim: Child,
}

impl Node {
    /// Starts a shim on `host` and waits until it answers.
    pub fn start(host: &Host) -> Result<Self> {
        Self::start_with(host, &[])
    }

    /// Starts it with more flags.
    pub fn start_with(host: &Host, flags: &[&str]) -> Result<Self> {
        let log = host.folder().join("shim.log");
        let said = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(program("dunlin-shim")?);
        command
            .arg("--runtime")
            .arg(program("dunlin")?)
            .arg(format!("--insecure-listen={}:{PORT}", host.address()))
            .args(flags)
            // Only programs with the feature `fault-injection` look there.
            .env("DUNLIN_FAULT", Path::new(crate::hosts::FOLDER).join("faults"))
            .stdin(Stdio::null())
            .stdout(said.try_clone()?)
            .stderr(said);
        let shim = host.spawn(&mut command).context("cannot run dunlin-shim")?;
        let mut node = Self {
            url: format!("http://{}:{PORT}", host.address()),
            log,
            client: Client::new(Endpoint::Unix(host.outside(SOCKET))),
            runtime: Builder::new_current_thread().enable_all().build()?,
            shim,
        };
        node.wait_until_it_answers()?;
        Ok(node)
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let Err(err) = self.ask(async |client| client.node().await) else { return Ok(()) };
            if let Some(status) = self.shim.try_wait()? {
                bail!("dunlin-shim ended with {status}:\n{}", self.said()?);
            }
            if deadline < Instant::now() {
                return Err(err).context(format!("dunlin-shim:\n{}", self.said()?));
            }
            // Until its socket is there, asking fails at once.
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// URL at which other nodes reach it.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What the shim logged.
    pub fn said(&self) -> io::Result<String> {
        fs::read_to_string(&self.log)
    }

    /// The shim's process, as the caller counts.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.shim.id()
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.shim.try_wait(), Ok(None))
    }

    /// Asks the shim something.
    pub fn ask<T>(
        &self,
        question: impl AsyncFnOnce(&Client) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        self.runtime.block_on(question(&self.client))
    }

    /// Migrates a container, tells `watch` each event, and returns the last one.
    pub fn migrate(
        &self,
        id: &str,
        request: &MigrateRequest,
        mut watch: impl FnMut(&Migration),
    ) -> Result<Migration> {
        let id: ContainerId = id.parse()?;
        Ok(self.ask(async |client| {
            let mut migration = client.migrate(&id, request).await?;
            let mut events = client.events(migration.id).await?;
            while let Some(event) = events.next().await? {
                watch(&event);
                migration = event;
            }
            Ok(migration)
        })?)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It may have ended by itself, and its host is about to anyway.
        self.shim.kill().ok();
        self.shim.wait().ok();
    }
}

/// The `dunlin` program, to be run on a host.
pub fn dunlin(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("dunlin")?);
    command.args(args);
    Ok(command)
}

/// Runs the container `id` of the bundle that [`Bundle::on`] made; what it
/// says goes to `<id>.log` in the host's folder.
pub fn run_container(host: &Host, id: &str) -> Result<()> {
    let said = File::create(host.folder().join(format!("{id}.log")))?;
    let mut command = dunlin(&["run", "--detach", "--bundle"])?;
    command.arg(Bundle::on_host(id)).arg(id);
    command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
    let status = host.spawn(&mut command)?.wait()?;
    if !status.success() {
        let said = fs::read_to_string(host.folder().join(format!("{id}.log")))?;
        bail!("dunlin run {id} on host {}: {status}: {}", host.name(), said.trim());
    }
    Ok(())
}
