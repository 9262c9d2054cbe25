//! What other shims ask.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Path, Query, Request, State},
    http::{
        HeaderValue, StatusCode,
        header::{CONNECTION, UPGRADE},
    },
    response::{IntoResponse, Response},
};
use dunlin_api::{
    ErrorCode, Problem,
    client::reclaim,
    rest::{Acceptance, CanAccept, PeerMigration},
    wire,
};
use hyper::upgrade::OnUpgrade;
use serde::Deserialize;
use uuid::Uuid;

use super::{Answer, Body, Failure, migration_id};
use crate::{daemon::Shim, incoming, listen::Caller};

/// Whether this node would take a container
#[utoipa::path(post, path = "/v1/peer/can-accept", request_body = CanAccept,
    responses((status = 200, body = Acceptance)))]
pub(crate) async fn can_accept(
    State(shim): State<Arc<Shim>>,
    Body(asked): Body<CanAccept>,
) -> Answer<Acceptance> {
    shim.containers.refresh().await;
    Ok(Json(incoming::can_accept(&shim, &asked).await?))
}

/// Shows that the caller is part of the migration.
#[derive(Deserialize)]
pub(crate) struct Token {
    token: Uuid,
}

/// What became of a migration to here
#[utoipa::path(get, path = "/v1/peer/migrations/{id}",
    params(("id" = String, Path), ("token" = String, Query)),
    responses((status = 200, body = PeerMigration), (status = 403, body = Problem)))]
pub(crate) async fn outcome(
    State(shim): State<Arc<Shim>>,
    Path(id): Path<String>,
    token: Result<Query<Token>, axum::extract::rejection::QueryRejection>,
) -> Answer<PeerMigration> {
    let id = migration_id(&id)?;
    let Query(Token { token }) = token.map_err(|_| {
        let detail = "the fencing token is missing or malformed";
        Problem::new(ErrorCode::BadRequest, id.to_string(), detail)
    })?;
    Ok(Json(incoming::outcome(&shim, id, token)?))
}

/// Turns the connection into a migration's stream
#[utoipa::path(post, path = "/v1/peer/migrations",
    responses((status = 101), (status = 422, body = Problem)))]
pub(crate) async fn open(
    State(shim): State<Arc<Shim>>,
    Extension(caller): Extension<Caller>,
    mut request: Request,
) -> Result<Response, Failure> {
    let asked = request.headers().get(UPGRADE).map(HeaderValue::as_bytes);
    if asked != Some(wire::UPGRADE.as_bytes()) {
        let detail = format!("this path wants Upgrade: {}", wire::UPGRADE);
        return Err(Problem::new(ErrorCode::VersionMismatch, "upgrade", detail).into());
    }
    let Some(upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
        let detail = "this connection cannot be upgraded";
        return Err(Problem::new(ErrorCode::BadRequest, "upgrade", detail).into());
    };
    tokio::spawn(async move {
        match upgrade.await.map(reclaim) {
            Ok(Some(conn)) => incoming::serve(shim, conn, caller).await,
            Ok(None) => tracing::warn!("a peer spoke before it was answered"),
            Err(err) => tracing::warn!(%err, "a stream was not opened"),
        }
    });
    let headers = [
        (CONNECTION, HeaderValue::from_static("upgrade")),
        (UPGRADE, HeaderValue::from_static(wire::UPGRADE)),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}
