//! The REST API: paths, bodies, and errors as `application/problem+json`.

mod containers;
mod migrations;
mod node;
mod peer;

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::to_bytes,
    extract::{FromRequest, Request},
    http::{HeaderValue, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use dunlin_api::{
    ErrorCode, Problem,
    error::PROBLEM_JSON,
    rest::{ContainerId, MAX_REQUEST},
};
use serde::de::DeserializeOwned;
use utoipa::OpenApi;
use uuid::Uuid;

use crate::daemon::Shim;

/// Longest time a request's body may take to come.
const PATIENCE: Duration = Duration::from_secs(10);

/// The OpenAPI document, made from the handlers and their types.
#[derive(OpenApi)]
#[openapi(
    info(title = "Dunlin", description = "Live migration of running containers"),
    paths(
        node::node,
        node::drain,
        node::drain_state,
        node::undrain,
        node::metrics,
        containers::list,
        containers::one,
        containers::can_migrate,
        containers::migrate,
        containers::checkpoint,
        containers::restore,
        containers::register,
        containers::unregister,
        migrations::list,
        migrations::one,
        migrations::events,
        migrations::cancel,
        migrations::resolve,
        peer::can_accept,
        peer::outcome,
        peer::open,
    ),
    components(schemas(Problem))
)]
struct Document;

/// What a handler gives: a value, or a problem.
type Answer<T> = Result<Json<T>, Failure>;

/// All paths.
pub(crate) fn router(shim: Arc<Shim>) -> Router {
    let v1 = Router::new()
        .route("/openapi.json", get(|| async { Json(Document::openapi()) }))
        .route("/node", get(node::node))
        .route("/node/drain", get(node::drain_state).post(node::drain).delete(node::undrain))
        .route("/containers", get(containers::list))
        .route("/containers/{id}", get(containers::one))
        .route("/containers/{id}/can-migrate", post(containers::can_migrate))
        .route("/containers/{id}/migrate", post(containers::migrate))
        .route("/containers/{id}/checkpoint", post(containers::checkpoint))
        .route("/restore", post(containers::restore))
        .route("/hooks/{id}", put(containers::register).delete(containers::unregister))
        .route("/migrations", get(migrations::list))
        .route("/migrations/{id}", get(migrations::one).delete(migrations::cancel))
        .route("/migrations/{id}/events", get(migrations::events))
        .route("/migrations/{id}/resolve", post(migrations::resolve))
        .route("/peer/can-accept", post(peer::can_accept))
        .route("/peer/migrations", post(peer::open))
        .route("/peer/migrations/{id}", get(peer::outcome));
    Router::new()
        .nest("/v1", v1)
        .route("/metrics", get(node::metrics))
        .fallback(|request: Request| async move {
            let path = request.uri().path().to_owned();
            let detail = format!("there is nothing at {path}");
            Failure(Problem::new(ErrorCode::NoRoute, path, detail))
        })
        .method_not_allowed_fallback(|request: Request| async move {
            let path = request.uri().path().to_owned();
            let detail = format!("{path} does not take {}", request.method());
            Failure(Problem::new(ErrorCode::NoRoute, path, detail))
        })
        .with_state(shim)
}

/// A problem as an answer.
struct Failure(Problem);

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self(problem) = self;
        if 500 <= problem.status {
            tracing::error!(%problem, code = %problem.code, "a request failed");
        }
        let status = StatusCode::from_u16(problem.code.status());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(problem)).into_response();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        response
    }
}

/// A request's body, read only as far as we accept.
struct Body<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let path = request.uri().path().to_owned();
        let bytes = to_bytes(request.into_body(), MAX_REQUEST);
        let bytes = tokio::time::timeout(PATIENCE, bytes).await.map_err(|_| {
            let detail = "the request did not come to its end in time";
            Problem::new(ErrorCode::BadRequest, &path, detail)
        })?;
        let bytes = bytes.map_err(|_| {
            let detail = format!("the request is longer than {MAX_REQUEST} bytes or cut short");
            Problem::new(ErrorCode::TooLarge, &path, detail)
        })?;
        let value = serde_json::from_slice(&bytes).map_err(|err| {
            let detail = format!("the request is not understood: {err}");
            Problem::new(ErrorCode::BadRequest, &path, detail)
        })?;
        Ok(Self(value))
    }
}

/// A container's id out of a path.
fn container_id(text: &str) -> Result<ContainerId, Problem> {
    text.parse()
        .map_err(|err| Problem::new(ErrorCode::BadRequest, text, format!("{err}: {text:?}")))
}

/// A migration's id out of a path.
fn migration_id(text: &str) -> Result<Uuid, Problem> {
    text.parse().map_err(|_| {
        let detail = format!("{text:?} is no migration's id");
        Problem::new(ErrorCode::BadRequest, text, detail)
    })
}
