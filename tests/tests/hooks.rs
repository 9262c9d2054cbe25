//! A container of plain runc becomes known by our hooks, moves, and runs under
//! `dunlin` from then on.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may panic like the tests")]

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use dunlin_api::rest::{Container, MigrateRequest, Origin, Status};
use dunlin_tests::{
    bundle::Bundle,
    hosts::{Host, Hosts},
    node::{self, Node},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// A counting container in `host`'s bundle `id`, with our hooks if wanted.
fn bundle(host: &Host, id: &str, shared: &Path, hooks: bool) {
    let mut bundle = Bundle::on(host, id).unwrap();
    let count = "i=0; while :; do i=$((i+1)); echo $i >>/shared/log; sleep 0.01; done";
    bundle.busybox().unwrap().args(["sh", "-c", count]).save().unwrap();
    let config = bundle.folder().join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    spec["mounts"].as_array_mut().unwrap().push(serde_json::json!({
        "destination": "/shared", "type": "bind", "source": shared, "options": ["rbind", "rw"],
    }));
    if hooks {
        let program = node::dunlin(&[]).unwrap().get_program().to_owned();
        let hook = |stage| {
            let args = ["dunlin", "hook", stage];
            serde_json::json!([{ "path": program.to_str(), "args": args, "timeout": 10 }])
        };
        spec["hooks"] = serde_json::json!({
            "createRuntime": hook("createRuntime"),
            "poststart": hook("poststart"),
            "poststop": hook("poststop"),
        });
    }
    fs::write(config, serde_json::to_vec(&spec).unwrap()).unwrap();
}

fn runc(host: &Host, args: &[&str]) -> String {
    let said = fs::File::create(host.folder().join("runc.log")).unwrap();
    let mut command = Command::new("runc");
    // What a container writes to may not be a pipe of ours.
    command.args(["--root", "/run/runc-test"]).args(args).stdin(Stdio::null());
    command.stdout(said.try_clone().unwrap()).stderr(said);
    let status = host.spawn(&mut command).unwrap().wait().unwrap();
    let said = fs::read_to_string(host.folder().join("runc.log")).unwrap();
    assert!(status.success(), "runc {args:?}: {said}");
    said
}

fn find(node: &Node, id: &str) -> Option<Container> {
    let all = node.ask(async |client| client.containers().await).unwrap();
    all.into_iter().find(|container| container.id.as_str() == id)
}

fn until(mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline, "did not happen in time");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_container_of_runc_moves_and_leaves_nothing() {
    if Command::new("runc").arg("--version").output().is_err() {
        return dunlin_tests::skip("needs runc");
    }
    let hosts = Hosts::new(&["a", "b"]).unwrap();
    let shared = tempfile::tempdir().unwrap();
    let log = shared.path().join("log");
    let count = || fs::read_to_string(&log).unwrap_or_default().lines().count();
    let (a, b) = (&hosts["a"], &hosts["b"]);
    bundle(a, "web", shared.path(), true);
    bundle(b, "web", shared.path(), false);

    // No shim listens yet: the container starts all the same.
    let there = Bundle::on_host("web");
    runc(a, &["run", "--detach", "--bundle", there.to_str().unwrap(), "web"]);
    until(|| 3 < count());
    let (source, destination) = (Node::start(a).unwrap(), Node::start(b).unwrap());
    until(|| find(&source, "web").is_some_and(|found| found.status == Status::Running));
    let found = find(&source, "web").unwrap();
    let Origin::Hook { runtime, root } = &found.origin else { panic!("{found:?}") };
    assert!(runtime.ends_with("runc"), "{runtime}");
    assert_eq!(root.as_deref(), Some("/run/runc-test"));

    let request = MigrateRequest::to(destination.url());
    let verdict = source.ask(async |c| c.can_migrate(&found.id, &request).await).unwrap();
    assert!(verdict.movable, "{verdict:?}");
    let migration = source.migrate("web", &request, |_| {}).unwrap();
    assert!(migration.state.is_success(), "{migration:?}: {}", source.said().unwrap());

    let before = count();
    until(|| before + 3 < count());
    until(|| find(&destination, "web").is_some_and(|found| found.status == Status::Running));
    assert_eq!(find(&destination, "web").unwrap().origin, Origin::Dunlin);
    assert!(find(&source, "web").is_none());
    assert!(!runc(a, &["list", "--quiet"]).contains("web"));
    let numbers = fs::read_to_string(&log).unwrap();
    let numbers: Vec<u64> = numbers.lines().map_while(|line| line.parse().ok()).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "counted twice or skipped");
}

#[test]
fn a_container_that_ends_is_forgotten() {
    if Command::new("runc").arg("--version").output().is_err() {
        return dunlin_tests::skip("needs runc");
    }
    let hosts = Hosts::new(&["a"]).unwrap();
    let shared = tempfile::tempdir().unwrap();
    let a = &hosts["a"];
    bundle(a, "web", shared.path(), true);
    let node = Node::start(a).unwrap();
    let there = Bundle::on_host("web");
    runc(a, &["run", "--detach", "--bundle", there.to_str().unwrap(), "web"]);
    assert_eq!(find(&node, "web").unwrap().status, Status::Running);
    runc(a, &["delete", "--force", "web"]);
    assert!(find(&node, "web").is_none());
}
