//! `dunlin-shim pki`: a CA and node certificates for those who have none.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};

use crate::tls::is_host;

/// What to make.
#[derive(Debug, Subcommand)]
pub(crate) enum Pki {
    /// Makes a CA: ca.pem, which every node gets, and ca-key.pem, which stays here
    Init {
        /// Directory for both
        #[arg(long)]
        dir: PathBuf,
    },
    /// Makes a node's certificate and key: NAME.pem and NAME-key.pem
    Issue {
        /// Directory of the CA
        #[arg(long)]
        dir: PathBuf,
        /// The node's name, as its --node
        #[arg(long)]
        name: String,
        /// Address or host name under which peers reach it; may be repeated
        #[arg(long, required = true)]
        address: Vec<String>,
        /// Directory for the certificate and the key; the CA's when left out
        #[arg(long)]
        out: Option<PathBuf>,
    },
}

/// Makes it.
pub(crate) fn run(command: &Pki) -> Result<()> {
    match command {
        Pki::Init { dir } => init(dir),
        Pki::Issue { dir, name, address, out } => {
            issue(dir, name, address, out.as_deref().unwrap_or(dir))
        }
    }
}

fn init(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut params = named("dunlin CA")?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let cert = params.self_signed(&key)?;
    write(&dir.join("ca-key.pem"), &key.serialize_pem(), 0o600)?;
    write(&dir.join("ca.pem"), &cert.pem(), 0o644)
}

fn issue(dir: &Path, name: &str, addresses: &[String], out: &Path) -> Result<()> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
    ensure!(
        name != "ca" && !name.starts_with('.') && !name.is_empty() && name.bytes().all(fits),
        "{name:?} cannot name a node: letters, digits, - and . can"
    );
    for address in addresses {
        ensure!(is_host(address), "{address:?} is neither an address nor a host name");
    }
    let read = |file: &str| {
        let path = dir.join(file);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let ca_key = KeyPair::from_pem(&read("ca-key.pem")?).context("ca-key.pem is no key")?;
    let ca = Issuer::from_ca_cert_pem(&read("ca.pem")?, ca_key).context("ca.pem is no CA")?;
    let mut params = named(name)?;
    params.subject_alt_names = CertificateParams::new(addresses)?.subject_alt_names;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate()?;
    let cert = params.signed_by(&key, &ca)?;
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    write(&out.join(format!("{name}-key.pem")), &key.serialize_pem(), 0o600)?;
    write(&out.join(format!("{name}.pem")), &cert.pem(), 0o644)
}

fn named(name: &str) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}

/// Never over a file that is there: a CA that is lost by mistake costs every node.
fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        })
        .with_context(|| format!("cannot write {}", path.display()))
}
