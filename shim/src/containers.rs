//! The containers of this node: those under `dunlin`, those that a hook told
//! us of, and how each ended.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use dunlin_api::{
    ErrorCode, Problem,
    rest::{Container, ContainerId, HookState, Origin, Status},
};

use crate::{config::Config, journal::Journal, process::Process, runtime};

/// How long an answer of the runtime is used again.
const FRESH: Duration = Duration::from_millis(300);

/// Exit codes remembered, the newest.
const MAX_EXITS: usize = 1000;

/// What is known of containers.
pub(crate) struct Containers {
    journal: Journal,
    hooks: Mutex<BTreeMap<ContainerId, HookState>>,
    exits: Mutex<BTreeMap<ContainerId, i32>>,
    listed: tokio::sync::Mutex<Option<(Instant, Vec<Container>)>>,
    /// First processes seen, so that an end can be told from whose it was.
    inits: Mutex<BTreeMap<i32, ContainerId>>,
}

impl Containers {
    /// Starts with what hooks said before.
    pub(crate) fn new(journal: Journal) -> Result<Self, redb::Error> {
        let hooks = journal.hooks()?.into_iter().map(|state| (state.id.clone(), state)).collect();
        Ok(Self {
            journal,
            hooks: Mutex::new(hooks),
            exits: Mutex::default(),
            listed: tokio::sync::Mutex::default(),
            inits: Mutex::default(),
        })
    }

    /// All containers, by id.
    pub(crate) async fn all(&self, config: &Config) -> Result<Vec<Container>, Problem> {
        let mut all = BTreeMap::new();
        for state in lock(&self.hooks).values() {
            let container = hooked(state);
            all.insert(container.id.clone(), container);
        }
        for container in self.listed(config).await? {
            all.insert(container.id.clone(), container);
        }
        let exits = lock(&self.exits);
        let mut inits = lock(&self.inits);
        for container in all.values_mut() {
            container.exit_code = match container.status {
                Status::Stopped => exits.get(&container.id).copied(),
                _ => None,
            };
            if let Some(pid) = container.pid {
                inits.insert(pid, container.id.clone());
            }
        }
        Ok(all.into_values().collect())
    }

    /// One container.
    pub(crate) async fn find(
        &self,
        config: &Config,
        id: &ContainerId,
    ) -> Result<Container, Problem> {
        let all = self.all(config).await?;
        all.into_iter().find(|container| container.id == *id).ok_or_else(|| {
            let detail = format!("there is no container {id} on {}", config.node);
            Problem::new(ErrorCode::UnknownContainer, id.as_str(), detail)
        })
    }

    /// Takes what a hook says.
    pub(crate) async fn register(&self, state: HookState) -> Result<(), Problem> {
        self.journal.put_hook(state.id.to_string(), Some(state.clone())).await?;
        lock(&self.exits).remove(&state.id);
        lock(&self.hooks).insert(state.id.clone(), state);
        Ok(())
    }

    /// Forgets what hooks said of a container; says whether they had said anything.
    pub(crate) async fn unregister(&self, id: &ContainerId) -> Result<bool, Problem> {
        self.journal.put_hook(id.to_string(), None).await?;
        Ok(lock(&self.hooks).remove(id).is_some())
    }

    /// Asks the runtime anew at the next question.
    pub(crate) async fn refresh(&self) {
        *self.listed.lock().await = None;
    }

    /// Notes that the process `pid` ended.
    pub(crate) fn ended(&self, pid: i32, code: i32) {
        let Some(id) = lock(&self.inits).remove(&pid) else { return };
        tracing::info!(container = %id, pid, code, "container ended");
        let mut exits = lock(&self.exits);
        exits.insert(id, code);
        while MAX_EXITS < exits.len() {
            exits.pop_first();
        }
    }

    async fn listed(&self, config: &Config) -> Result<Vec<Container>, Problem> {
        let mut listed = self.listed.lock().await;
        if let Some((since, containers)) = &*listed
            && since.elapsed() < FRESH
        {
            return Ok(containers.clone());
        }
        let containers = runtime::list(config).await?;
        *listed = Some((Instant::now(), containers.clone()));
        Ok(containers)
    }
}

/// A container that a hook told us of, as it is now.
fn hooked(state: &HookState) -> Container {
    let alive = state.pid.and_then(Process::find).is_some();
    let status = match state.status {
        _ if !alive => Status::Stopped,
        // runc says `created` in poststart; whether its program was started
        // shows in what the process is.
        Status::Creating | Status::Created if state.pid.is_some_and(started) => Status::Running,
        status => status,
    };
    Container {
        id: state.id.clone(),
        status,
        pid: state.pid.filter(|_| alive),
        bundle: state.bundle.clone(),
        origin: Origin::Hook { runtime: state.runtime.clone(), root: state.root.clone() },
        annotations: state.annotations.clone(),
        migration: None,
        exit_code: None,
    }
}

/// Whether a container's first process has left the runtime's own program.
fn started(pid: i32) -> bool {
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    // `runc init` and `youki:[2:INIT]` wait for the start under these names.
    !(comm.starts_with("runc:[") || comm.starts_with("youki:[") || comm.starts_with("crun"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
