//! Migrations and their events.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
    response::{
        Sse,
        sse::{Event, KeepAlive},
    },
};
use dunlin_api::{
    ErrorCode, Problem,
    rest::{DestinationState, Migration, MigrationState, ResolveRequest, SourceState},
};
use futures::{Stream, stream};

use super::{Answer, Body, Failure, migration_id};
use crate::{daemon::Shim, outgoing};

/// All migrations that are remembered, oldest first
#[utoipa::path(get, path = "/v1/migrations", responses((status = 200, body = [Migration])))]
pub(crate) async fn list(State(shim): State<Arc<Shim>>) -> Json<Vec<Migration>> {
    Json(shim.migrations.all().iter().map(|entry| entry.migration()).collect())
}

/// One migration
#[utoipa::path(get, path = "/v1/migrations/{id}", params(("id" = String, Path)),
    responses((status = 200, body = Migration), (status = 404, body = Problem)))]
pub(crate) async fn one(
    State(shim): State<Arc<Shim>>,
    Path(id): Path<String>,
) -> Answer<Migration> {
    Ok(Json(shim.migrations.find(migration_id(&id)?)?.migration()))
}

/// The migration as it stands now and whenever it changes, until it is over
#[utoipa::path(get, path = "/v1/migrations/{id}/events", params(("id" = String, Path)),
    responses((status = 200, body = String, content_type = "text/event-stream")))]
pub(crate) async fn events(
    State(shim): State<Arc<Shim>>,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Failure> {
    let mut watch = shim.migrations.find(migration_id(&id)?)?.subscribe();
    watch.mark_changed();
    // A slow reader misses states in between, and never holds anything up.
    let events = stream::unfold((watch, false), |(mut watch, over)| async move {
        if over || watch.changed().await.is_err() {
            return None;
        }
        let migration = watch.borrow_and_update().clone();
        let over = migration.state.is_final();
        // Our own types have no maps with strange keys, the only thing that fails.
        let event = Event::default().json_data(&migration).unwrap_or_default();
        Some((Ok(event), (watch, over)))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(10))))
}

/// Cancels it; the source goes on
#[utoipa::path(delete, path = "/v1/migrations/{id}", params(("id" = String, Path)),
    responses((status = 202, body = Migration), (status = 409, body = Problem)))]
pub(crate) async fn cancel(
    State(shim): State<Arc<Shim>>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Migration>), Failure> {
    let entry = shim.migrations.find(migration_id(&id)?)?;
    let state = entry.migration().state;
    let late = matches!(
        state,
        MigrationState::Out(SourceState::InDoubt) | MigrationState::In(DestinationState::Committed)
    );
    if late || state.is_final() {
        let detail = format!("migration {id} cannot be cancelled any more");
        return Err(Problem::new(ErrorCode::TooLate, id, detail).into());
    }
    entry.cancel();
    Ok((StatusCode::ACCEPTED, Json(entry.migration())))
}

/// Ends a doubt by hand: said wrongly, it loses or doubles the container
#[utoipa::path(post, path = "/v1/migrations/{id}/resolve", params(("id" = String, Path)),
    request_body = ResolveRequest, responses((status = 200, body = Migration)))]
pub(crate) async fn resolve(
    State(shim): State<Arc<Shim>>,
    Path(id): Path<String>,
    Body(request): Body<ResolveRequest>,
) -> Answer<Migration> {
    let entry = shim.migrations.find(migration_id(&id)?)?;
    outgoing::resolve_by_hand(&shim, &entry, request.runs).await?;
    Ok(Json(entry.migration()))
}
