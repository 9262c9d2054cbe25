//! Two shims that trust one CA, and those whom they turn away.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic like the tests")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use dunlin_api::{
    Problem,
    client::{Client, Endpoint},
    rest::{HookState, MigrateRequest, Status, Verdict},
};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dunlin-shim");
const PATIENCE: Duration = Duration::from_secs(20);

struct Shim {
    dir: TempDir,
    child: Child,
}

impl Shim {
    fn start(name: &str, pki: &Path, flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = dir.path().join("runtime");
        fs::write(&runtime, "#!/bin/sh\ncase \"$*\" in *list*) echo '[]';; esac\n").unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).unwrap();
        let pem = |file: String| pki.join(file).into_os_string().into_string().unwrap();
        let child = Command::new(PROGRAM)
            .args(["--node", name, "--listen", "127.0.0.1:0"])
            .arg("--socket")
            .arg(dir.path().join("sock"))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .arg("--runtime")
            .arg(&runtime)
            .args(["--tls-cert", &pem(format!("{name}.pem"))])
            .args(["--tls-key", &pem(format!("{name}-key.pem"))])
            .args(["--tls-ca", &pem("ca.pem".into())])
            .args(flags)
            .stdin(Stdio::null())
            .stderr(File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let shim = Self { dir, child };
        until(|| shim.ask(async |client| client.node().await).is_ok());
        shim
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    fn port(&self) -> String {
        let log = self.log();
        let (_, port) = log.split_once("address=127.0.0.1:").unwrap();
        port.split_whitespace().next().unwrap().to_owned()
    }

    fn ask<T>(
        &self,
        question: impl AsyncFnOnce(&Client) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let client = Client::new(Endpoint::Unix(self.dir.path().join("sock")));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(question(&client))
    }

    /// What the other says to a container of ours: it needs no more than an
    /// answer to a question over TLS.
    fn asks(&self, other: &Self) -> Result<Verdict, Problem> {
        let sleep = Sleeper::start();
        let state = HookState {
            id: "web-1".parse().unwrap(),
            status: Status::Running,
            pid: Some(sleep.0.id().try_into().unwrap()),
            bundle: "/nowhere".into(),
            annotations: std::collections::BTreeMap::new(),
            runtime: "/bin/true".into(),
            root: None,
        };
        let request = MigrateRequest::to(format!("https://127.0.0.1:{}", other.port()));
        self.ask(async |client| {
            client.register(&state).await?;
            client.can_migrate(&state.id, &request).await
        })
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        Self(Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn until(mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline, "did not happen in time");
        thread::yield_now();
    }
}

fn pki(args: &[&str]) -> Output {
    Command::new(PROGRAM).arg("pki").args(args).output().unwrap()
}

/// A CA in a directory, with certificates for `names`.
fn authority(names: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    assert!(pki(&["init", "--dir", path]).status.success());
    for name in names {
        let made = pki(&["issue", "--dir", path, "--name", name, "--address", "127.0.0.1"]);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    dir
}

#[test]
fn nodes_of_one_authority_trust_each_other() {
    let ca = authority(&["a", "b"]);
    let (a, b) = (Shim::start("a", ca.path(), &[]), Shim::start("b", ca.path(), &[]));
    let verdict = a.asks(&b).unwrap();
    assert!(verdict.findings.iter().any(|finding| finding.node == "b"), "{verdict:?}");
}

#[test]
fn strangers_are_turned_away() {
    let (ours, theirs) = (authority(&["a", "b"]), authority(&["a"]));
    let b = Shim::start("b", ours.path(), &["--allow", "c"]);
    // Signed by somebody else.
    let stranger = Shim::start("a", theirs.path(), &[]);
    assert!(stranger.asks(&b).is_err());
    // Signed by ours, and not on the list.
    let unlisted = Shim::start("a", ours.path(), &[]);
    assert!(unlisted.asks(&b).is_err());
    until(|| b.log().contains("node a is not allowed here"));
    // Without encryption.
    let mut plain = TcpStream::connect(format!("127.0.0.1:{}", b.port())).unwrap();
    plain.set_read_timeout(Some(PATIENCE)).unwrap();
    plain.write_all(b"GET /v1/node HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    // A reset is an end, too.
    plain.read_to_end(&mut answer).ok();
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP/1.1"));
}

#[test]
fn renewed_certificates_are_used_without_a_restart() {
    let (old, new) = (authority(&["a", "b"]), authority(&["a", "b"]));
    let (a, b) = (Shim::start("a", old.path(), &[]), Shim::start("b", old.path(), &[]));
    a.asks(&b).unwrap();
    for file in ["ca.pem", "a.pem", "a-key.pem", "b.pem", "b-key.pem"] {
        let next = old.path().join("next");
        fs::copy(new.path().join(file), &next).unwrap();
        fs::rename(next, old.path().join(file)).unwrap();
    }
    let third = Shim::start("b", new.path(), &[]);
    a.asks(&third).unwrap();
    a.asks(&b).unwrap();
    assert!(a.log().contains("certificate read again"), "{}", a.log());
}

#[test]
fn keys_are_private_and_never_overwritten() {
    let ca = authority(&["a"]);
    for file in ["ca-key.pem", "a-key.pem"] {
        let mode = fs::metadata(ca.path().join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    let path = ca.path().to_str().unwrap();
    let before = fs::read(ca.path().join("ca-key.pem")).unwrap();
    assert!(!pki(&["init", "--dir", path]).status.success());
    assert_eq!(fs::read(ca.path().join("ca-key.pem")).unwrap(), before);
    for name in ["../x", "ca", "", ".hidden", "a b"] {
        let made = pki(&["issue", "--dir", path, "--name", name, "--address", "127.0.0.1"]);
        assert!(!made.status.success(), "{name:?}");
    }
}
