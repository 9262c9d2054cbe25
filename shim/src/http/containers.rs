//! Containers and what can be done with them.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
    http::{HeaderName, StatusCode, header::LOCATION},
};
use dunlin_api::{
    ErrorCode, Problem,
    rest::{
        CheckpointRequest, Container, HookState, MigrateRequest, Migration, Origin, RestoreRequest,
        Verdict,
    },
};

use super::{Answer, Body, Failure, container_id};
use crate::{daemon::Shim, outgoing, runtime};

/// All containers
#[utoipa::path(get, path = "/v1/containers", responses((status = 200, body = [Container])))]
pub(crate) async fn list(State(shim): State<Arc<Shim>>) -> Answer<Vec<Container>> {
    Ok(Json(shim.containers().await?))
}

/// One container
#[utoipa::path(get, path = "/v1/containers/{id}", params(("id" = String, Path)),
    responses((status = 200, body = Container), (status = 404, body = Problem)))]
pub(crate) async fn one(
    State(shim): State<Arc<Shim>>,
    Path(id): Path<String>,
) -> Answer<Container> {
    Ok(Json(shim.container(&container_id(&id)?).await?))
}

/// Whether it could move, without touching anything
#[utoipa::path(post, path = "/v1/containers/{id}/can-migrate", params(("id" = String, Path)),
    request_body = MigrateRequest, responses((status = 200, body = Verdict)))]
pub(crate) async fn can_migrate(
    State(shim): State<Arc<Shim>>,
    Path(id): Path<String>,
    Body(request): Body<MigrateRequest>,
) -> Answer<Verdict> {
    absolute("bundle", request.bundle.as_deref())?;
    Ok(Json(outgoing::can_migrate(&shim, &container_id(&id)?, &request).await?))
}

/// Starts a migration
#[utoipa::path(post, path = "/v1/containers/{id}/migrate", params(("id" = String, Path)),
    request_body = MigrateRequest,
    responses((status = 202, body = Migration, headers(("location" = String)))))]
pub(crate) async fn migrate(
    State(shim): State<Arc<Shim>>,
    Path(id): Path<String>,
    Body(request): Body<MigrateRequest>,
) -> Result<(StatusCode, [(HeaderName, String); 1], Json<Migration>), Failure> {
    absolute("bundle", request.bundle.as_deref())?;
    let entry = outgoing::start(&shim, &container_id(&id)?, request).await?;
    let migration = entry.migration();
    let location = format!("/v1/migrations/{}", migration.id);
    Ok((StatusCode::ACCEPTED, [(LOCATION, location)], Json(migration)))
}

/// Writes an image of it into a directory
#[utoipa::path(post, path = "/v1/containers/{id}/checkpoint", params(("id" = String, Path)),
    request_body = CheckpointRequest, responses((status = 204)))]
pub(crate) async fn checkpoint(
    State(shim): State<Arc<Shim>>,
    Path(id): Path<String>,
    Body(request): Body<CheckpointRequest>,
) -> Result<StatusCode, Failure> {
    absolute("path", Some(&request.path))?;
    let container = shim.container(&container_id(&id)?).await?;
    if let Origin::Hook { runtime, .. } = &container.origin {
        let detail = format!("{id} runs under {runtime}: it can be migrated, not checkpointed");
        return Err(Problem::new(ErrorCode::NotSupported, id, detail).into());
    }
    if let Some(migration) = container.migration {
        let detail = format!("{id} is in migration {migration}");
        return Err(Problem::new(ErrorCode::AlreadyMigrating, id, detail).into());
    }
    runtime::checkpoint(&shim.config, &container.id, &request).await?;
    shim.containers.refresh().await;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes a container out of an image
#[utoipa::path(post, path = "/v1/restore", request_body = RestoreRequest,
    responses((status = 201, body = Container)))]
pub(crate) async fn restore(
    State(shim): State<Arc<Shim>>,
    Body(request): Body<RestoreRequest>,
) -> Result<(StatusCode, Json<Container>), Failure> {
    absolute("path", Some(&request.path))?;
    absolute("bundle", Some(&request.bundle))?;
    let id = request.id.clone();
    if shim.containers().await?.iter().any(|known| known.id == id) {
        let detail = format!("there is a container {id} on {} already", shim.config.node);
        return Err(Problem::new(ErrorCode::IdTaken, id.as_str(), detail).into());
    }
    if !std::path::Path::new(&request.bundle).join("config.json").is_file() {
        let detail = format!("{} has no config.json", request.bundle);
        return Err(Problem::new(ErrorCode::BundleMissing, request.bundle, detail).into());
    }
    runtime::restore(&shim.config, &request).await?;
    shim.containers.refresh().await;
    Ok((StatusCode::CREATED, Json(shim.container(&id).await?)))
}

/// A container under another runtime says where it is
#[utoipa::path(put, path = "/v1/hooks/{id}", params(("id" = String, Path)),
    request_body = HookState, responses((status = 204)))]
pub(crate) async fn register(
    State(shim): State<Arc<Shim>>,
    Path(id): Path<String>,
    Body(state): Body<HookState>,
) -> Result<StatusCode, Failure> {
    if container_id(&id)? != state.id {
        let detail = "the path and the state name different containers";
        return Err(Problem::new(ErrorCode::BadRequest, id, detail).into());
    }
    absolute("bundle", Some(&state.bundle))?;
    shim.containers.register(state).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// It is gone
#[utoipa::path(delete, path = "/v1/hooks/{id}", params(("id" = String, Path)),
    responses((status = 204)))]
pub(crate) async fn unregister(
    State(shim): State<Arc<Shim>>,
    Path(id): Path<String>,
) -> Result<StatusCode, Failure> {
    let id = container_id(&id)?;
    match shim.containers.unregister(&id).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => {
            let detail = format!("no hook has told us of {id}");
            Err(Problem::new(ErrorCode::UnknownContainer, id.as_str(), detail).into())
        }
    }
}

/// A path that means the same for everybody.
fn absolute(what: &str, path: Option<&str>) -> Result<(), Problem> {
    match path {
        Some(path) if !path.starts_with('/') || path.contains('\0') => {
            let detail = format!("{what} is not an absolute path: {path:?}");
            Err(Problem::new(ErrorCode::BadRequest, path, detail))
        }
        _ => Ok(()),
    }
}
