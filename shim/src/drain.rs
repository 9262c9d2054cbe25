//! Emptying the node: one migration per container, a few at a time, each to
//! the next destination that takes it.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use dunlin_api::{
    ErrorCode, Problem,
    rest::{Container, Drain, DrainRequest, DrainState, MigrateRequest, Status},
};
use futures::StreamExt;

use crate::{daemon::Shim, outgoing};

/// Whether the node takes containers in, and how far its drain is.
#[derive(Default)]
pub(crate) struct Drainer {
    closed: AtomicBool,
    state: Mutex<Drain>,
}

impl Drainer {
    /// Whether containers may not come in.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Takes nothing in any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// How far the drain is.
    pub(crate) fn state(&self) -> Drain {
        self.lock().clone()
    }

    /// Takes containers in again; those that left stay where they are, and
    /// migrations that run go on.
    pub(crate) fn open(&self) -> Drain {
        self.closed.store(false, Ordering::SeqCst);
        let mut state = self.lock();
        state.state = DrainState::Off;
        state.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Drain> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts a drain and returns at once.
pub(crate) async fn start(shim: &Arc<Shim>, request: DrainRequest) -> Result<Drain, Problem> {
    let to: Vec<String> = match request.to.is_empty() {
        true => shim.config.peers.iter().map(|peer| peer.name.clone()).collect(),
        false => request.to.clone(),
    };
    let bad = |detail: &str| Problem::new(ErrorCode::BadRequest, "drain", detail);
    if to.is_empty() {
        return Err(bad("there is no destination: name one, or start the shim with --peer"));
    }
    for to in &to {
        shim.peer(to)?;
    }
    let parallel = request.parallel.unwrap_or(shim.config.max_migrations);
    if parallel == 0 {
        return Err(bad("parallel must be at least 1"));
    }
    shim.containers.refresh().await;
    let all = shim.containers().await?;
    let movable: Vec<Container> =
        all.into_iter().filter(|container| container.status == Status::Running).collect();
    {
        let mut state = shim.drainer.lock();
        if state.state == DrainState::Draining {
            return Err(bad("the node is being drained already"));
        }
        *state = Drain { state: DrainState::Draining, total: movable.len(), ..Drain::default() };
        shim.drainer.close();
    }
    tokio::spawn(empty(shim.clone(), movable, to, request, parallel));
    Ok(shim.drainer.state())
}

async fn empty(
    shim: Arc<Shim>,
    containers: Vec<Container>,
    to: Vec<String>,
    request: DrainRequest,
    parallel: usize,
) {
    let parallel = parallel.min(shim.config.max_migrations);
    let moves = containers.into_iter().enumerate().map(|(turn, container)| {
        let (shim, to, request) = (shim.clone(), to.clone(), request.clone());
        async move {
            let left = leave(&shim, &container, &to, turn, &request).await;
            let mut state = shim.drainer.lock();
            if left {
                state.moved += 1;
            } else {
                state.stayed += 1;
            }
        }
    });
    futures::stream::iter(moves).buffer_unordered(parallel).collect::<()>().await;
    let mut state = shim.drainer.lock();
    if state.state == DrainState::Draining {
        state.state = DrainState::Drained;
    }
    let (moved, stayed) = (state.moved, state.stayed);
    tracing::info!(moved, stayed, "drained");
}

/// Tries the destinations in turn, beginning with another for each container.
async fn leave(
    shim: &Arc<Shim>,
    container: &Container,
    to: &[String],
    turn: usize,
    request: &DrainRequest,
) -> bool {
    for to in to.iter().cycle().skip(turn % to.len()).take(to.len()) {
        if !shim.drainer.is_closed() {
            return false;
        }
        let asked = MigrateRequest { tcp: request.tcp, ..MigrateRequest::to(to) };
        match outgoing::start(shim, &container.id, asked).await {
            Ok(entry) => {
                shim.drainer.lock().migrations.push(entry.migration().id);
                entry.over().await;
                if entry.migration().state.is_success() {
                    return true;
                }
            }
            Err(problem) => {
                tracing::warn!(container = %container.id, %to, %problem, "does not leave");
            }
        }
    }
    false
}
