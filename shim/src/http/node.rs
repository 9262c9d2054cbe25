//! The node, its drain and its figures.

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use dunlin_api::rest::{Drain, DrainRequest, Node};

use super::{Answer, Body, Failure};
use crate::{daemon::Shim, drain};

/// What this node is and has
#[utoipa::path(get, path = "/v1/node", responses((status = 200, body = Node)))]
pub(crate) async fn node(State(shim): State<Arc<Shim>>) -> Answer<Node> {
    Ok(Json(shim.node().await?))
}

/// Moves everything away
#[utoipa::path(post, path = "/v1/node/drain", request_body = DrainRequest,
    responses((status = 202, body = Drain)))]
pub(crate) async fn drain(
    State(shim): State<Arc<Shim>>,
    Body(request): Body<DrainRequest>,
) -> Result<(StatusCode, Json<Drain>), Failure> {
    Ok((StatusCode::ACCEPTED, Json(drain::start(&shim, request).await?)))
}

/// How far the drain is
#[utoipa::path(get, path = "/v1/node/drain", responses((status = 200, body = Drain)))]
pub(crate) async fn drain_state(State(shim): State<Arc<Shim>>) -> Json<Drain> {
    Json(shim.drainer.state())
}

/// Takes containers in again
#[utoipa::path(delete, path = "/v1/node/drain", responses((status = 200, body = Drain)))]
pub(crate) async fn undrain(State(shim): State<Arc<Shim>>) -> Json<Drain> {
    Json(shim.drainer.open())
}

/// Figures for Prometheus
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String)))]
pub(crate) async fn metrics(State(shim): State<Arc<Shim>>) -> Result<String, Failure> {
    Ok(shim.metrics.text(&shim).await?)
}
