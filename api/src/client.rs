//! A client of the REST API, for the command line and for shims.

use std::{fmt, io, path::PathBuf, pin::Pin, str::FromStr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1,
    header::{CONNECTION, CONTENT_TYPE, HOST, HeaderValue, UPGRADE},
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use uuid::Uuid;

use crate::{
    ErrorCode, Problem,
    rest::{
        Acceptance, CanAccept, CheckpointRequest, Container, ContainerId, Drain, DrainRequest,
        Event, HookState, MigrateRequest, Migration, Node, PeerMigration, ResolveRequest,
        RestoreRequest, Verdict,
    },
    wire,
};

/// Longest answer accepted, in bytes.
const MAX_ANSWER: usize = 8 << 20;

/// Longest line of an event stream accepted, in bytes.
const MAX_EVENT: usize = 256 << 10;

/// Where a shim listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// On this machine.
    Unix(PathBuf),
    /// `http://host:port`: without encryption.
    Http(String),
    /// `https://host:port`.
    Https(String),
}

/// A URL that is not a shim's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no URL of a shim: expected http://HOST:PORT, https://HOST:PORT or unix:PATH")]
pub struct BadEndpoint(String);

impl FromStr for Endpoint {
    type Err = BadEndpoint;

    fn from_str(text: &str) -> Result<Self, BadEndpoint> {
        let bad = || BadEndpoint(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        let (make, rest): (fn(String) -> Self, _) = match text.split_once("://") {
            Some(("http", rest)) => (Self::Http, rest),
            Some(("https", rest)) => (Self::Https, rest),
            _ => return Err(bad()),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = authority.rsplit_once(':').ok_or_else(bad)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-.:[]_".contains(c);
        if host.is_empty() || port.parse::<u16>().is_err() || !host.chars().all(plain) {
            return Err(bad());
        }
        Ok(make(authority.to_owned()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Http(authority) => write!(f, "http://{authority}"),
            Self::Https(authority) => write!(f, "https://{authority}"),
        }
    }
}

/// Any connection HTTP can be spoken over.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for S {}

/// A connection to or from another node, before or after HTTP.
pub enum Conn {
    /// On this machine.
    Unix(UnixStream),
    /// Without encryption.
    Tcp(TcpStream),
    /// Anything that cannot be handed to another process as it is.
    Other(Box<dyn Stream>),
}

/// A TLS handshake in progress.
pub type Encrypting = Pin<Box<dyn Future<Output = io::Result<Box<dyn Stream>>> + Send>>;

/// Wraps a connection into TLS. The seam between this crate and whoever
/// brings the certificates.
pub trait Encrypt: Send + Sync {
    /// Speaks TLS on `stream` to `host`.
    fn encrypt(&self, host: String, stream: TcpStream) -> Encrypting;
}

/// A client of one shim. Opens a connection per request.
#[derive(Clone)]
pub struct Client {
    endpoint: Endpoint,
    encrypt: Option<Arc<dyn Encrypt>>,
    bearer: Option<HeaderValue>,
    patience: Duration,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({})", self.endpoint)
    }
}

impl Client {
    /// A client of the shim at `endpoint`.
    #[must_use]
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, encrypt: None, bearer: None, patience: Duration::from_secs(5) }
    }

    /// Speaks TLS by `encrypt` to `https` endpoints.
    #[must_use]
    pub fn with_tls(self, encrypt: Option<Arc<dyn Encrypt>>) -> Self {
        Self { encrypt, ..self }
    }

    /// Shows `token` with every request.
    #[must_use]
    pub fn with_bearer(self, token: &str) -> Self {
        let bearer = HeaderValue::try_from(format!("Bearer {token}")).ok().map(|mut value| {
            value.set_sensitive(true);
            value
        });
        Self { bearer, ..self }
    }

    /// `GET /v1/node`.
    pub async fn node(&self) -> Result<Node, Problem> {
        self.get("/v1/node").await
    }

    /// `GET /v1/containers`.
    pub async fn containers(&self) -> Result<Vec<Container>, Problem> {
        self.get("/v1/containers").await
    }

    /// `GET /v1/containers/{id}`.
    pub async fn container(&self, id: &ContainerId) -> Result<Container, Problem> {
        self.get(&format!("/v1/containers/{id}")).await
    }

    /// `POST /v1/containers/{id}/can-migrate`.
    pub async fn can_migrate(
        &self,
        id: &ContainerId,
        request: &MigrateRequest,
    ) -> Result<Verdict, Problem> {
        self.post(&format!("/v1/containers/{id}/can-migrate"), request).await
    }

    /// `POST /v1/containers/{id}/migrate`.
    pub async fn migrate(
        &self,
        id: &ContainerId,
        request: &MigrateRequest,
    ) -> Result<Migration, Problem> {
        self.post(&format!("/v1/containers/{id}/migrate"), request).await
    }

    /// `POST /v1/containers/{id}/checkpoint`.
    pub async fn checkpoint(
        &self,
        id: &ContainerId,
        request: &CheckpointRequest,
    ) -> Result<(), Problem> {
        self.post(&format!("/v1/containers/{id}/checkpoint"), request).await
    }

    /// `POST /v1/restore`.
    pub async fn restore(&self, request: &RestoreRequest) -> Result<Container, Problem> {
        self.post("/v1/restore", request).await
    }

    /// `GET /v1/migrations`.
    pub async fn migrations(&self) -> Result<Vec<Migration>, Problem> {
        self.get("/v1/migrations").await
    }

    /// `GET /v1/migrations/{id}`.
    pub async fn migration(&self, id: Uuid) -> Result<Migration, Problem> {
        self.get(&format!("/v1/migrations/{id}")).await
    }

    /// `DELETE /v1/migrations/{id}`: cancels it.
    pub async fn cancel(&self, id: Uuid) -> Result<Migration, Problem> {
        self.ask(Method::DELETE, &format!("/v1/migrations/{id}"), None::<&()>).await
    }

    /// `POST /v1/migrations/{id}/resolve`.
    pub async fn resolve(&self, id: Uuid, request: &ResolveRequest) -> Result<Migration, Problem> {
        self.post(&format!("/v1/migrations/{id}/resolve"), request).await
    }

    /// `GET /v1/migrations/{id}/events`.
    pub async fn events(&self, id: Uuid) -> Result<Events, Problem> {
        let path = format!("/v1/migrations/{id}/events");
        let response = self.send(Method::GET, &path, None::<&()>).await?;
        Ok(Events { body: self.judge(response).await?.into_body(), buffer: Vec::new() })
    }

    /// `POST /v1/node/drain`.
    pub async fn drain(&self, request: &DrainRequest) -> Result<Drain, Problem> {
        self.post("/v1/node/drain", request).await
    }

    /// `GET /v1/node/drain`.
    pub async fn drain_state(&self) -> Result<Drain, Problem> {
        self.get("/v1/node/drain").await
    }

    /// `DELETE /v1/node/drain`: takes containers in again.
    pub async fn undrain(&self) -> Result<Drain, Problem> {
        self.ask(Method::DELETE, "/v1/node/drain", None::<&()>).await
    }

    /// `PUT /v1/hooks/{id}`: a container under another runtime says where it is.
    pub async fn register(&self, state: &HookState) -> Result<(), Problem> {
        let path = format!("/v1/hooks/{}", state.id);
        self.ask(Method::PUT, &path, Some(state)).await
    }

    /// `DELETE /v1/hooks/{id}`: it is gone.
    pub async fn unregister(&self, id: &ContainerId) -> Result<(), Problem> {
        self.ask(Method::DELETE, &format!("/v1/hooks/{id}"), None::<&()>).await
    }

    /// `POST /v1/peer/can-accept`.
    pub async fn can_accept(&self, request: &CanAccept) -> Result<Acceptance, Problem> {
        self.post("/v1/peer/can-accept", request).await
    }

    /// `GET /v1/peer/migrations/{id}?token=`.
    pub async fn peer_migration(&self, id: Uuid, token: Uuid) -> Result<PeerMigration, Problem> {
        self.get(&format!("/v1/peer/migrations/{id}?token={token}")).await
    }

    /// Turns a connection into a migration's stream.
    pub async fn open_migration(&self) -> Result<Conn, Problem> {
        let mut request = self.request(Method::POST, "/v1/peer/migrations", None::<&()>)?;
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(UPGRADE, HeaderValue::from_static(wire::UPGRADE));
        let response = self.exchange(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            self.judge(response).await?;
            return Err(self.garbled("the peer does not speak dunlin-migrate/1"));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|err| self.unreachable(err))?;
        reclaim(upgraded).ok_or_else(|| self.garbled("the peer spoke before it was greeted"))
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Problem> {
        self.ask(Method::GET, path, None::<&()>).await
    }

    async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, Problem> {
        self.ask(Method::POST, path, Some(body)).await
    }

    async fn ask<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, Problem> {
        let response = self.send(method, path, body).await?;
        let response = self.judge(response).await?;
        let bytes = self.body(response).await?;
        let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(text).map_err(|_| self.garbled("the answer is not what was asked"))
    }

    async fn send<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Response<Incoming>, Problem> {
        self.exchange(self.request(method, path, body)?).await
    }

    fn request<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Request<Full<Bytes>>, Problem> {
        let host = match &self.endpoint {
            Endpoint::Unix(_) => "localhost",
            Endpoint::Http(authority) | Endpoint::Https(authority) => authority,
        };
        let internal = |err: &dyn fmt::Display| {
            Problem::new(ErrorCode::Internal, path, format!("cannot write the request: {err}"))
        };
        let json = body.map(serde_json::to_vec).transpose().map_err(|err| internal(&err))?;
        let mut request = Request::builder().method(method).uri(path).header(HOST, host);
        if json.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some(bearer) = &self.bearer {
            request = request.header(hyper::header::AUTHORIZATION, bearer);
        }
        let body = Full::new(Bytes::from(json.unwrap_or_default()));
        request.body(body).map_err(|err| internal(&err))
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Problem> {
        let conn = timeout(self.patience, self.connect())
            .await
            .map_err(|_| self.unreachable("no answer in time"))?
            .map_err(|err| self.unreachable(err))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(conn)).await.map_err(|err| self.unreachable(err))?;
        // It ends with the response's body or with the upgraded stream.
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.map_err(|err| self.unreachable(err))
    }

    async fn connect(&self) -> io::Result<Conn> {
        Ok(match &self.endpoint {
            Endpoint::Unix(path) => Conn::Unix(UnixStream::connect(path).await?),
            Endpoint::Http(authority) => Conn::Tcp(dial(authority).await?),
            Endpoint::Https(authority) => {
                let encrypt = self.encrypt.as_ref().ok_or_else(|| {
                    io::Error::other("https needs a certificate, and none is configured")
                })?;
                let host = authority.rsplit_once(':').map_or(&**authority, |(host, _)| host);
                let host = host.trim_matches(['[', ']']).to_owned();
                Conn::Other(encrypt.encrypt(host, dial(authority).await?).await?)
            }
        })
    }

    /// Lets a good answer pass, and turns a bad one into its problem.
    async fn judge(&self, response: Response<Incoming>) -> Result<Response<Incoming>, Problem> {
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = self.body(response).await?;
        Err(serde_json::from_slice(&body)
            .unwrap_or_else(|_| self.garbled(&format!("it answered {status}"))))
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes, Problem> {
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        body.map(http_body_util::Collected::to_bytes)
            .map_err(|_| self.garbled("its answer is cut short or too long"))
    }

    fn unreachable(&self, err: impl fmt::Display) -> Problem {
        let endpoint = self.endpoint.to_string();
        let detail = format!("cannot reach the shim at {endpoint}: {err}");
        Problem::new(ErrorCode::PeerUnreachable, endpoint, detail)
    }

    fn garbled(&self, what: &str) -> Problem {
        let endpoint = self.endpoint.to_string();
        let detail = format!("the shim at {endpoint} answered strangely: {what}");
        Problem::new(ErrorCode::StreamDamaged, endpoint, detail)
    }
}

async fn dial(authority: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(authority).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Takes the connection back from HTTP, unless bytes were read beyond it.
#[must_use]
pub fn reclaim(upgraded: Upgraded) -> Option<Conn> {
    let parts = upgraded.downcast::<TokioIo<Conn>>().ok()?;
    parts.read_buf.is_empty().then(|| parts.io.into_inner())
}

/// A migration's events as they come.
pub struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    /// The next event, or `None` when the migration is over.
    pub async fn next(&mut self) -> Result<Option<Event>, Problem> {
        let broken = |what: &str| {
            Problem::new(ErrorCode::StreamDamaged, "events", format!("the event stream {what}"))
        };
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if let Some(data) = line.strip_prefix(b"data:") {
                    return serde_json::from_slice(data)
                        .map(Some)
                        .map_err(|_| broken("holds what is no event"));
                }
                continue;
            }
            if MAX_EVENT < self.buffer.len() {
                return Err(broken("holds a line that is too long"));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(_)) => return Err(broken("broke")),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

impl AsyncRead for Conn {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Other(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Other(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(
        self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Other(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(
        self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Other(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_judged() {
        let http: Endpoint = "http://10.0.0.2:7600/".parse().unwrap();
        assert_eq!(http, Endpoint::Http("10.0.0.2:7600".into()));
        assert_eq!(http.to_string(), "http://10.0.0.2:7600");
        assert_eq!("unix:/x".parse(), Ok(Endpoint::Unix("/x".into())));
        for bad in
            ["", "host:1", "ftp://a:1", "http://a", "http://:1", "http://a:99999", "http://a/b:1"]
        {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad:?}");
        }
    }
}
