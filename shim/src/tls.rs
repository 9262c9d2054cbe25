//! Mutual TLS between nodes.
//!
//! A node is who its certificate's common name says; both ends show one, both
//! signed by the CA they share. Certificates are read again when their files
//! change, so that they can be renewed without a restart.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use anyhow::Context;
use clap::Args;
use dunlin_api::client::{Encrypt, Encrypting, Stream};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
    version::TLS13,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Where this node's identity lies.
#[derive(Debug, Clone, Args)]
pub(crate) struct Files {
    /// This node's certificate
    #[arg(long, value_name = "PEM", requires_all = ["tls_key", "tls_ca"])]
    tls_cert: Option<PathBuf>,
    /// Its private key
    #[arg(long, value_name = "PEM", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Certificate of the CA that signs for all nodes
    #[arg(long, value_name = "PEM", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,
    /// Node that may connect; every one with a certificate when left out
    #[arg(long, value_name = "NAME", requires = "tls_cert")]
    allow: Vec<String>,
}

/// This node's identity, and whom it trusts.
pub(crate) struct Tls {
    cert: PathBuf,
    key: PathBuf,
    ca: PathBuf,
    allow: Vec<String>,
    current: Mutex<Current>,
}

#[derive(Clone)]
struct Current {
    stamp: Stamp,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

/// When the three files were changed.
type Stamp = [SystemTime; 3];

impl Tls {
    /// Reads the files, if there are any.
    pub(crate) fn open(files: &Files) -> anyhow::Result<Option<Arc<Self>>> {
        let (Some(cert), Some(key), Some(ca)) = (&files.tls_cert, &files.tls_key, &files.tls_ca)
        else {
            return Ok(None);
        };
        let current = Mutex::new(load(cert, key, ca)?);
        let allow = files.allow.clone();
        let (cert, key, ca) = (cert.clone(), key.clone(), ca.clone());
        Ok(Some(Arc::new(Self { cert, key, ca, allow, current })))
    }

    /// Speaks TLS with a client and learns which node it is.
    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<(Box<dyn Stream>, String)> {
        let stream = TlsAcceptor::from(self.current().server).accept(stream).await?;
        let (_, session) = stream.get_ref();
        let shown = session.peer_certificates().and_then(<[_]>::first);
        let node = shown
            .and_then(common_name)
            .ok_or_else(|| io::Error::other("the client's certificate does not name a node"))?;
        if !self.allow.is_empty() && !self.allow.contains(&node) {
            return Err(io::Error::other(format!("node {node} is not allowed here")));
        }
        Ok((Box::new(stream), node))
    }

    /// What the files hold now; what they held before while they do not parse.
    fn current(&self) -> Current {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        match stamp(&self.cert, &self.key, &self.ca) {
            Ok(stamp) if stamp == current.stamp => {}
            _ => match load(&self.cert, &self.key, &self.ca) {
                Ok(read) => {
                    tracing::info!(cert = %self.cert.display(), "certificate read again");
                    *current = read;
                }
                Err(err) => tracing::error!("the certificate in use stays: {err:#}"),
            },
        }
        current.clone()
    }
}

impl Encrypt for Tls {
    fn encrypt(&self, host: String, stream: TcpStream) -> Encrypting {
        let client = self.current().client;
        Box::pin(async move {
            let name = ServerName::try_from(host).map_err(io::Error::other)?;
            let stream = TlsConnector::from(client).connect(name, stream).await?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

fn stamp(cert: &Path, key: &Path, ca: &Path) -> io::Result<Stamp> {
    let changed = |path: &Path| fs::metadata(path)?.modified();
    Ok([changed(cert)?, changed(key)?, changed(ca)?])
}

fn load(cert: &Path, key: &Path, ca: &Path) -> anyhow::Result<Current> {
    let stamp = stamp(cert, key, ca).context("cannot see the certificate files")?;
    let chain = certificates(cert)?;
    let read_key = || {
        PrivateKeyDer::from_pem_file(key)
            .with_context(|| format!("cannot read the key {}", key.display()))
    };
    let mut roots = RootCertStore::empty();
    for root in certificates(ca)? {
        roots.add(root).with_context(|| format!("{} is no CA", ca.display()))?;
    }
    let (roots, provider) = (Arc::new(roots), Arc::new(ring::default_provider()));
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain.clone(), read_key()?)
        .with_context(|| format!("{} does not fit its key", cert.display()))?;
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, read_key()?)
        .with_context(|| format!("{} does not fit its key", cert.display()))?;
    Ok(Current { stamp, server: Arc::new(server), client: Arc::new(client) })
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let failed = || format!("cannot read the certificate {}", path.display());
    let all = CertificateDer::pem_file_iter(path).with_context(failed)?;
    let all = all.collect::<Result<Vec<_>, _>>().with_context(failed)?;
    anyhow::ensure!(!all.is_empty(), "{} holds no certificate", path.display());
    Ok(all)
}

/// The common name of a certificate that was verified.
fn common_name(cert: &CertificateDer<'_>) -> Option<String> {
    let (_, cert) = x509_parser::parse_x509_certificate(cert).ok()?;
    let name = cert.subject().iter_common_name().next()?.as_str().ok()?;
    Some(name.to_owned())
}

/// Whether a name can stand in a certificate as that of a host.
pub(crate) fn is_host(name: &str) -> bool {
    name.parse::<IpAddr>().is_ok() || ServerName::try_from(name).is_ok()
}
