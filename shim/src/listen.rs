//! Listeners: the local socket, and the seam where a peer's connection comes
//! in, with or without encryption.

use std::{
    io, net::SocketAddr, os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration,
};

use anyhow::Context;
use axum::{Extension, Router};
use dunlin_api::client::Conn;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

use crate::tls::Tls;

/// Longest time a client may take to send a request's head.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most bytes of a request's head.
const MAX_HEAD: usize = 32 << 10;

/// Most headers of a request.
const MAX_HEADERS: usize = 64;

/// Bounds on what clients may hold open.
#[derive(Clone)]
pub(crate) struct Limits {
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
}

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) enum Caller {
    /// Root on this machine.
    Local,
    /// Whoever reaches a listener without encryption.
    Anybody,
    /// The node that its certificate names.
    Node(String),
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: Arc::new(Semaphore::new(512)),
            handshakes: Arc::new(Semaphore::new(64)),
        }
    }
}

/// Makes the local socket, for root alone; replaces one that nobody listens on.
pub(crate) fn unix(path: &Path) -> anyhow::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        anyhow::bail!("another shim listens on {}", path.display());
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match std::fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => {
            return Err(err).with_context(|| format!("cannot replace {}", path.display()));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Makes a listener for peers.
pub(crate) async fn tcp(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Serves local clients; only root's, whatever became of the socket's mode.
pub(crate) async fn serve_unix(listener: UnixListener, router: Router, limits: Limits) {
    let router = router.layer(Extension(Caller::Local));
    let us = rustix::process::geteuid().as_raw();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => match stream.peer_cred() {
                Ok(peer) if peer.uid() == 0 || peer.uid() == us => {
                    serve(Conn::Unix(stream), router.clone(), limits.clone());
                }
                Ok(peer) => tracing::warn!(uid = peer.uid(), "turned away from the local socket"),
                Err(err) => tracing::warn!(%err, "a local client cannot be identified"),
            },
            Err(err) => pause(&err).await,
        }
    }
}

/// Serves peers and operators without encryption.
pub(crate) async fn serve_tcp(listener: TcpListener, router: Router, limits: Limits) {
    let router = router.layer(Extension(Caller::Anybody));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if let Err(err) = stream.set_nodelay(true) {
                    tracing::debug!(%err, "small frames will be delayed");
                }
                serve(Conn::Tcp(stream), router.clone(), limits.clone());
            }
            Err(err) => pause(&err).await,
        }
    }
}

/// Serves peers and operators by mutual TLS.
pub(crate) async fn serve_tls(
    listener: TcpListener,
    tls: Arc<Tls>,
    router: Router,
    limits: Limits,
) {
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                if let Err(err) = stream.set_nodelay(true) {
                    tracing::debug!(%err, "small frames will be delayed");
                }
                let Ok(permit) = limits.handshakes.clone().try_acquire_owned() else {
                    tracing::warn!(%address, "too many handshakes: one is turned away");
                    continue;
                };
                let (tls, router, limits) = (tls.clone(), router.clone(), limits.clone());
                tokio::spawn(async move {
                    match tokio::time::timeout(PATIENCE, tls.accept(stream)).await {
                        Ok(Ok((stream, node))) => {
                            let router = router.layer(Extension(Caller::Node(node)));
                            serve(Conn::Other(stream), router, limits);
                        }
                        Ok(Err(err)) => tracing::warn!(%address, %err, "turned away"),
                        Err(_) => tracing::warn!(%address, "a handshake takes too long"),
                    }
                    drop(permit);
                });
            }
            Err(err) => pause(&err).await,
        }
    }
}

/// Speaks HTTP on one connection.
fn serve(conn: Conn, router: Router, limits: Limits) {
    let Ok(permit) = limits.connections.try_acquire_owned() else {
        return tracing::warn!("too many connections: one is turned away");
    };
    tokio::spawn(async move {
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
        http.max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
        let service = TowerToHyperService::new(router);
        if let Err(err) = http.serve_connection(TokioIo::new(conn), service).with_upgrades().await {
            tracing::debug!(%err, "a connection ended badly");
        }
        drop(permit);
    });
}

/// After a failed accept, mostly for want of descriptors.
async fn pause(err: &io::Error) {
    tracing::error!(%err, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}
