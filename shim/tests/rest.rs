//! The REST API of a running shim whose runtime has no containers: what is
//! asked wrongly is refused by name, and nothing is disturbed.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic like the tests")]

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use dunlin_api::{
    ErrorCode, Problem,
    client::{Client, Endpoint},
    rest::{
        CanAccept, CheckpointRequest, ContainerId, DrainRequest, DrainState, HookState,
        MigrateRequest, Migration, Origin, RestoreRequest, Status,
    },
    wire::{Bundle, Hello, Kind, MAGIC, Message, Needs, PREFIX, Prefix},
};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tempfile::TempDir;
use uuid::Uuid;

/// How long anything that should happen at once may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A shim in a directory of its own.
struct Shim {
    dir: TempDir,
    child: Child,
    port: u16,
    runtime: tokio::runtime::Runtime,
}

impl Shim {
    fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), &[])
    }

    fn start_in(dir: TempDir, flags: &[&str]) -> Self {
        // A runtime without containers, which notes what it is asked.
        let runtime = dir.path().join("runtime");
        let script = "#!/bin/sh\necho \"$@\" >> \"${0%/*}/asked\"\n\
                      case \"$*\" in *list*) echo '[]';; esac\n";
        fs::write(&runtime, script).unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_dunlin-shim"))
            .args(["--node", "here", "--insecure-listen", "127.0.0.1:0", "--silence-ms", "400"])
            .arg("--socket")
            .arg(dir.path().join("sock"))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .arg("--runtime-root")
            .arg(dir.path().join("root"))
            .arg("--runtime")
            .arg(&runtime)
            .args(flags)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let async_runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut shim = Self { dir, child, port: 0, runtime: async_runtime };
        until(|| shim.ask(async |client| client.node().await).is_ok());
        let log = shim.log();
        let (_, port) = log.split_once("address=127.0.0.1:").unwrap();
        shim.port = port.split_whitespace().next().unwrap().parse().unwrap();
        shim
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    fn ask<T>(
        &self,
        question: impl AsyncFnOnce(&Client) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let client = Client::new(Endpoint::Unix(self.socket()));
        self.runtime.block_on(question(&client))
    }

    /// The code that a question is refused with.
    fn refuses<T: std::fmt::Debug>(
        &self,
        question: impl AsyncFnOnce(&Client) -> Result<T, Problem>,
    ) -> ErrorCode {
        self.ask(question).unwrap_err().code
    }

    /// What comes back for bytes on the local socket.
    fn raw(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // A request that is refused early need not be read to its end.
        stream.write_all(request.as_bytes()).ok();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok();
        answer
    }

    fn post(&self, path: &str, body: &str) -> String {
        self.raw(&format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    }

    /// A connection turned into a migration's stream.
    fn stream(&self) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = "POST /v1/peer/migrations HTTP/1.1\r\nHost: x\r\n\
                       Connection: upgrade\r\nUpgrade: dunlin-migrate/1\r\n\r\n";
        stream.write_all(request.as_bytes()).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        stream
    }

    /// Migrates a process of the test's and gives the migration when it is over.
    fn migrate(&self, id: &ContainerId, request: &MigrateRequest) -> Migration {
        self.ask(async |client| {
            let migration = client.migrate(id, request).await?;
            let mut events = client.events(migration.id).await?;
            let mut last = migration;
            while let Some(event) = events.next().await? {
                last = event;
            }
            Ok(last)
        })
        .unwrap()
    }

    /// Lets a process of the test's pass for a container of another runtime.
    fn register(&self, id: &ContainerId, pid: u32) {
        let state = hook_state(id, pid, self.dir.path());
        self.ask(async |client| client.register(&state).await).unwrap();
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A child of the test that is ended with it.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        // Whoever runs the tests may have left pipes open, which do not move.
        for fd in fs::read_dir("/proc/self/fd").unwrap() {
            let fd: i32 = fd.unwrap().file_name().to_str().unwrap().parse().unwrap();
            if 2 < fd {
                fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok();
            }
        }
        let mut command = Command::new("setsid");
        command.args(["sleep", "1000"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        // Until the exec is through it is a copy of the test.
        until(|| fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap() == "sleep\n");
        Self(child)
    }

    /// Neither ended nor stopped nor traced.
    fn sleeps(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        status.contains("State:\tS") && status.contains("TracerPid:\t0")
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

fn id(text: &str) -> ContainerId {
    text.parse().unwrap()
}

fn hook_state(id: &ContainerId, pid: u32, bundle: &Path) -> HookState {
    HookState {
        id: id.clone(),
        status: Status::Running,
        pid: Some(pid.try_into().unwrap()),
        bundle: bundle.to_str().unwrap().into(),
        annotations: [("k".into(), "v".into())].into(),
        runtime: bundle.join("runtime").to_str().unwrap().into(),
        root: None,
    }
}

#[test]
fn what_is_not_there_is_said_to_be_missing() {
    let shim = Shim::start();
    let web = id("web-1");
    assert_eq!(shim.refuses(async |c| c.container(&web).await), ErrorCode::UnknownContainer);
    let request = MigrateRequest::to("http://127.0.0.1:1");
    let code = shim.refuses(async |c| c.migrate(&web, &request).await);
    assert_eq!(code, ErrorCode::UnknownContainer);
    let code = shim.refuses(async |c| c.can_migrate(&web, &request).await);
    assert_eq!(code, ErrorCode::UnknownContainer);
    let none = Uuid::new_v4();
    assert_eq!(shim.refuses(async |c| c.migration(none).await), ErrorCode::UnknownMigration);
    assert_eq!(shim.refuses(async |c| c.cancel(none).await), ErrorCode::UnknownMigration);
    assert_eq!(shim.refuses(async |c| c.unregister(&web).await), ErrorCode::UnknownContainer);
    let answer = shim.raw("GET /v1/nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert!(answer.contains("application/problem+json") && answer.contains(r#""no-route""#));
    let answer = shim.raw("PUT /v1/node HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.contains(r#""no-route""#), "{answer}");
}

#[test]
fn what_does_not_parse_is_refused_by_name() {
    let shim = Shim::start();
    for (path, body) in [
        ("/v1/containers/web-1/migrate", "{"),
        ("/v1/containers/web-1/migrate", "{}"),
        ("/v1/containers/web-1/migrate", r#"{"to":"http://a:1","tpc":"keep"}"#),
        ("/v1/containers/web-1/migrate", r#"{"to":"http://a:1","bundle":"../x"}"#),
        ("/v1/containers/..%2f..%2fetc/migrate", r#"{"to":"http://a:1"}"#),
        ("/v1/restore", r#"{"id":"a/b","path":"/x","bundle":"/y"}"#),
        ("/v1/restore", r#"{"id":"a","path":"x","bundle":"/y"}"#),
        ("/v1/node/drain", "{}"),
        ("/v1/peer/can-accept", "[]"),
    ] {
        let answer = shim.post(path, body);
        assert!(answer.starts_with("HTTP/1.1 400"), "{path} {body}: {answer}");
        assert!(answer.contains(r#""code":"bad-request""#), "{path} {body}: {answer}");
    }
    let bad = shim.raw("GET /v1/migrations/xyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(bad.contains(r#""code":"bad-request""#), "{bad}");
}

#[test]
fn sizes_are_bounded() {
    let shim = Shim::start();
    let longest = dunlin_api::rest::MAX_REQUEST;
    let answer = shim.post("/v1/restore", &" ".repeat(longest + 1));
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let answer = shim.post("/v1/restore", &" ".repeat(longest));
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let headers: String = (0..100).map(|n| format!("X-{n}: y\r\n")).collect();
    let answer = shim.raw(&format!("GET /v1/node HTTP/1.1\r\nHost: x\r\n{headers}\r\n"));
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let long = "y".repeat(64 << 10);
    let answer = shim.raw(&format!("GET /v1/node HTTP/1.1\r\nHost: x\r\nX: {long}\r\n\r\n"));
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    shim.ask(async |client| client.node().await).unwrap();
}

#[test]
fn the_socket_is_for_root_alone_and_goes_with_the_shim() {
    let mut shim = Shim::start();
    let meta = fs::metadata(shim.socket()).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    assert!(shim.log().contains("WITHOUT ENCRYPTION"));
    let pid = nix::unistd::Pid::from_raw(shim.child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(shim.child.wait().unwrap().success());
    assert!(!shim.socket().exists());
}

#[test]
fn the_document_names_every_path() {
    let shim = Shim::start();
    let request = "GET /v1/openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let answer = shim.raw(request);
    for path in [
        "/v1/node",
        "/v1/node/drain",
        "/v1/containers/{id}/can-migrate",
        "/v1/containers/{id}/migrate",
        "/v1/containers/{id}/checkpoint",
        "/v1/restore",
        "/v1/migrations/{id}/events",
        "/v1/peer/can-accept",
        "/metrics",
    ] {
        assert!(answer.contains(&format!("\"{path}\"")), "{path} is missing");
    }
    let figures = shim.raw("GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(figures.contains("dunlin_migrations_running 0"), "{figures}");
}

#[test]
fn a_hooked_container_is_listed_until_it_is_gone() {
    let shim = Shim::start();
    let (web, sleeper) = (id("web-1"), Sleeper::start());
    shim.register(&web, sleeper.0.id());
    let container = shim.ask(async |c| c.container(&web).await).unwrap();
    assert_eq!(container.status, Status::Running);
    assert_eq!(container.annotations["k"], "v");
    assert!(matches!(container.origin, Origin::Hook { .. }));
    let path = shim.dir.path().to_str().unwrap().to_owned();
    let request: CheckpointRequest =
        serde_json::from_str(&format!(r#"{{"path":"{path}/image"}}"#)).unwrap();
    let code = shim.refuses(async |c| c.checkpoint(&web, &request).await);
    assert_eq!(code, ErrorCode::NotSupported);
    let restore = RestoreRequest { id: web.clone(), path: path.clone(), bundle: path };
    let code = shim.refuses(async |c| c.restore(&restore).await);
    assert_eq!(code, ErrorCode::IdTaken);

    drop(sleeper);
    let container = shim.ask(async |c| c.container(&web).await).unwrap();
    assert_eq!((container.status, container.pid), (Status::Stopped, None));
    let request = MigrateRequest::to("http://127.0.0.1:1");
    let code = shim.refuses(async |c| c.migrate(&web, &request).await);
    assert_eq!(code, ErrorCode::NotRunning);
    shim.ask(async |c| c.unregister(&web).await).unwrap();
    assert_eq!(shim.refuses(async |c| c.container(&web).await), ErrorCode::UnknownContainer);
}

#[test]
fn the_spool_and_the_journal_outlive_the_shim() {
    let mut shim = Shim::start();
    let (web, db, sleeper) = (id("web-1"), id("db-1"), Sleeper::start());
    shim.register(&web, sleeper.0.id());
    shim.child.kill().unwrap();
    shim.child.wait().unwrap();
    // While nobody listens one container goes and another comes.
    let spool = shim.dir.path().join("state/spool");
    let state = hook_state(&db, sleeper.0.id(), shim.dir.path());
    let state = serde_json::to_string(&state).unwrap();
    fs::write(spool.join("1.json"), format!(r#"{{"register":{state}}}"#)).unwrap();
    fs::write(spool.join("2.json"), r#"{"unregister":"web-1"}"#).unwrap();
    fs::write(spool.join("3.json"), "garbage").unwrap();
    fs::write(spool.join("4.part"), "half a fi").unwrap();

    let dir = std::mem::replace(&mut shim.dir, tempfile::tempdir().unwrap());
    let shim = Shim::start_in(dir, &[]);
    until(|| shim.ask(async |c| c.container(&db).await).is_ok());
    until(|| shim.ask(async |c| c.container(&web).await).is_err());
    until(|| !spool.join("3.json").exists());
    assert!(spool.join("4.part").exists());
}

#[test]
fn a_migration_that_cannot_be_leaves_the_process_alone() {
    let shim = Shim::start();
    let (web, sleeper) = (id("web-1"), Sleeper::start());
    shim.register(&web, sleeper.0.id());
    for (to, code) in [
        ("http://127.0.0.1:1", ErrorCode::PeerUnreachable),
        ("https://127.0.0.1:1", ErrorCode::PeerUnreachable),
    ] {
        let migration = shim.migrate(&web, &MigrateRequest::to(to));
        let problem = migration.error.unwrap();
        assert_eq!(problem.code, code, "{to}: {problem}");
        assert!(!migration.state.is_success());
        assert!(sleeper.sleeps(), "{to}");
    }
    for to in ["nobody", "ftp://a:1", ""] {
        let request = MigrateRequest::to(to);
        assert_eq!(shim.refuses(async |c| c.migrate(&web, &request).await), ErrorCode::BadRequest);
    }
    // To itself: the id is taken there, and so is the bundle missing.
    let itself = MigrateRequest::to(format!("http://127.0.0.1:{}", shim.port));
    let verdict = shim.ask(async |c| c.can_migrate(&web, &itself).await).unwrap();
    assert!(!verdict.movable);
    let codes: Vec<_> = verdict.findings.iter().map(|finding| finding.code).collect();
    assert!(codes.contains(&ErrorCode::IdTaken), "{codes:?}");
    assert!(codes.contains(&ErrorCode::BundleMissing), "{codes:?}");
    assert!(sleeper.sleeps());
    let all = shim.ask(async |c| c.migrations().await).unwrap();
    assert_eq!(all.len(), 2);
}

#[test]
fn a_destination_says_all_that_speaks_against_it() {
    let shim = Shim::start();
    let asked = CanAccept {
        node: "there".into(),
        container: id("web-1"),
        bundle: Bundle { source: "/nowhere".into(), destination: None },
        needs: Needs {
            arch: "x86_64".into(),
            kernel: "6.7.0".into(),
            cpu_features: vec!["time_travel".into()],
            memory: 1 << 60,
            processes: 1,
            image_version: 77,
        },
        wire_versions: vec![77],
    };
    let answer = shim.ask(async |c| c.can_accept(&asked).await).unwrap();
    assert_eq!(answer.instance.node, "here");
    let codes: Vec<_> = answer.findings.iter().map(|finding| finding.code).collect();
    for code in [
        ErrorCode::VersionMismatch,
        ErrorCode::BundleMissing,
        ErrorCode::CpuMismatch,
        ErrorCode::NoRoom,
    ] {
        assert!(codes.contains(&code), "{code} is missing in {codes:?}");
    }
    let lacks = answer.findings.iter().find(|f| f.code == ErrorCode::CpuMismatch).unwrap();
    assert!(lacks.reason.contains("time_travel"), "{}", lacks.reason);
}

#[test]
fn a_stream_is_judged_from_its_first_byte() {
    let shim = Shim::start();
    let without = shim.post("/v1/peer/migrations", "");
    assert!(without.contains(r#""code":"version-mismatch""#), "{without}");

    // Versions that nobody speaks are refused with ours.
    let mut stream = shim.stream();
    let hello = Message::Hello(Hello { magic: MAGIC, versions: vec![77] }).encode().unwrap();
    stream.write_all(&Prefix::of(Kind::Hello, &[&hello]).unwrap().encode()).unwrap();
    stream.write_all(&hello).unwrap();
    let mut raw = [0; PREFIX];
    stream.read_exact(&mut raw).unwrap();
    let header = Prefix::decode(raw).unwrap().header;
    let mut body = vec![0; header.len as usize];
    stream.read_exact(&mut body).unwrap();
    let Message::Refused(problem) = Message::decode(header.kind, &body).unwrap() else {
        panic!("{header:?}")
    };
    assert_eq!(problem.code, ErrorCode::VersionMismatch);

    // Garbage, half a frame, a length beyond all bounds, and silence are all
    // answered by the end of the connection.
    let hello = Message::Hello(Hello { magic: MAGIC, versions: vec![1] }).encode().unwrap();
    let good = [&Prefix::of(Kind::Hello, &[&hello]).unwrap().encode()[..], &hello].concat();
    let mut altered = good.clone();
    *altered.last_mut().unwrap() ^= 1;
    let mut endless = good.clone();
    endless[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &good[..7], &altered, &endless, b""] {
        let mut stream = shim.stream();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // A reset is an end, too.
        stream.read_to_end(&mut answer).ok();
        assert!(answer.is_empty(), "{answer:?}");
    }
    assert_eq!(shim.ask(async |c| c.migrations().await).unwrap(), []);
}

#[test]
fn a_drain_closes_the_node_and_can_be_undone() {
    let shim = Shim::start();
    let request = DrainRequest {
        to: vec!["http://127.0.0.1:1".into()],
        parallel: None,
        tcp: dunlin_api::rest::TcpPolicy::Refuse,
    };
    let (web, sleeper) = (id("web-1"), Sleeper::start());
    shim.register(&web, sleeper.0.id());
    shim.ask(async |c| c.drain(&request).await).unwrap();
    until(|| shim.ask(async |c| c.drain_state().await).unwrap().state == DrainState::Drained);
    let drain = shim.ask(async |c| c.drain_state().await).unwrap();
    assert_eq!((drain.total, drain.moved, drain.stayed), (1, 0, 1));
    assert!(sleeper.sleeps());
    assert!(shim.ask(async |c| c.node().await).unwrap().draining);
    shim.ask(async |c| c.undrain().await).unwrap();
    assert!(!shim.ask(async |c| c.node().await).unwrap().draining);
}
