//! Containers on a bridge. The host is a network namespace that a process of
//! ours keeps open, and a container of this bundle is the neighbour.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};

use crate::bundle::{Bundle, needs_root, until};

/// A host with a bridge `br0`: a network namespace that ends with its keeper.
struct Host {
    keeper: Child,
}

impl Host {
    fn new() -> Self {
        let script = "echo 1 > /proc/sys/net/ipv4/conf/all/arp_accept && ip link set lo up && ip link add br0 type bridge && \
             ip addr add 10.77.0.1/24 dev br0 && ip addr add fd77::1/64 dev br0 nodad && \
             ip link set br0 up && echo ready && exec cat";
        let mut keeper = Command::new("unshare")
            .args(["--net", "sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(keeper.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { keeper }
    }

    /// A command that runs on this host.
    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.keeper.id())).arg(program).args(args);
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, program: &str, args: &[&str]) -> Output {
        self.command(program, args).output().unwrap()
    }

    /// `dunlin` on this host; a container that stays writes nowhere.
    #[track_caller]
    fn dunlin(&self, bundle: &Bundle, args: &[&str]) -> Output {
        let root = bundle.path("state");
        let root = ["--root", root.to_str().unwrap()];
        let mut command = self.command(env!("CARGO_BIN_EXE_dunlin"), &[&root, args].concat());
        if args.contains(&"--detach") {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        }
        command.output().unwrap()
    }

    fn links(&self) -> String {
        String::from_utf8(self.run("ip", &["-o", "link"]).stdout).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.keeper.kill().unwrap();
        self.keeper.wait().unwrap();
    }
}

fn annotated(annotations: Value) -> Bundle {
    Bundle::with(&["sleep", "600"], |spec| spec["annotations"] = annotations)
}

#[test]
fn a_container_gets_its_interface_and_loses_it() {
    if needs_root() {
        return;
    }
    let host = Host::new();
    let bundle = annotated(json!({
        "dunlin.network.bridge": "br0",
        "dunlin.network.address": "10.77.0.2/24,fd77::2/64",
        "dunlin.network.gateway": "10.77.0.1",
        "dunlin.network.mac": "02:00:00:00:00:2a",
    }));
    let run = host.dunlin(&bundle, &["run", "--bundle", bundle.dir(), "--detach", "c"]);
    assert!(run.status.success(), "{run:?}");

    let inside = bundle.ok(&["exec", "c", "ip", "addr", "show", "dev", "eth0"]);
    for part in ["02:00:00:00:00:2a", "10.77.0.2/24", "fd77::2/64"] {
        assert!(inside.contains(part), "{part}: {inside}");
    }
    assert!(inside.contains("UP"), "{inside}");
    let lo = bundle.ok(&["exec", "c", "ip", "addr", "show", "dev", "lo"]);
    assert!(lo.contains("127.0.0.1/8"), "{lo}");
    let routes = bundle.ok(&["exec", "c", "ip", "route"]);
    assert!(routes.contains("default via 10.77.0.1 dev eth0"), "{routes}");
    for address in ["10.77.0.2", "fd77::2"] {
        let ping = host.run("busybox", &["ping", "-c1", "-W5", address]);
        assert!(ping.status.success(), "{address}: {ping:?}");
    }

    assert!(host.links().contains("master br0"), "{}", host.links());
    let delete = host.dunlin(&bundle, &["delete", "--force", "c"]);
    assert!(delete.status.success(), "{delete:?}");
    assert!(!host.links().contains("master br0"), "{}", host.links());
    assert_eq!(bundle.leftovers(), Vec::<String>::new());
}

#[test]
fn macs_follow_the_id() {
    if needs_root() {
        return;
    }
    let macs = [0, 1].map(|_| {
        let host = Host::new();
        let bundle = annotated(json!({ "dunlin.network.bridge": "br0" }));
        let run = host.dunlin(&bundle, &["run", "--bundle", bundle.dir(), "--detach", "c"]);
        assert!(run.status.success(), "{run:?}");
        let text = bundle.ok(&["exec", "c", "cat", "/sys/class/net/eth0/address"]);
        assert!(host.dunlin(&bundle, &["delete", "--force", "c"]).status.success());
        text
    });
    assert_eq!(macs[0], macs[1]);
}

#[test]
fn a_network_that_cannot_be_made_leaves_nothing() {
    if needs_root() {
        return;
    }
    let host = Host::new();
    let names = || -> Vec<String> {
        host.links().lines().map(|line| line.split(": ").nth(1).unwrap().to_owned()).collect()
    };
    let before = names();
    for (annotations, reason) in [
        (json!({ "dunlin.network.bridge": "br9" }), "there is no interface br9"),
        (json!({ "dunlin.network.bridge": "br0", "dunlin.network.address": "x" }), "no prefix"),
        (
            json!({ "dunlin.network.bridge": "br0", "dunlin.network.gateway": "10.99.0.1" }),
            "cannot route through 10.99.0.1",
        ),
        (json!({ "dunlin.network.address": "10.77.0.2/24" }), "dunlin.network.bridge is missing"),
    ] {
        let bundle = annotated(annotations);
        let create = host.dunlin(&bundle, &["create", "--bundle", bundle.dir(), "c"]);
        assert_eq!(create.status.code(), Some(1));
        let text = String::from_utf8_lossy(&create.stderr).into_owned();
        assert!(text.contains(reason), "{reason}: {text}");
        assert_eq!(bundle.leftovers(), Vec::<String>::new(), "{reason}");
        until("interfaces are gone", || names() == before);
    }
    let bundle = Bundle::with(&["sleep", "600"], |spec| {
        spec["annotations"] = json!({ "dunlin.network.bridge": "br0" });
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
    });
    let create = host.dunlin(&bundle, &["create", "--bundle", bundle.dir(), "c"]);
    let text = String::from_utf8_lossy(&create.stderr).into_owned();
    assert!(text.contains("no network namespace of its own"), "{text}");
}

#[test]
fn an_address_moves_with_its_container() {
    if needs_root() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let bundle = annotated(json!({
        "dunlin.network.bridge": "br0",
        "dunlin.network.address": "10.77.0.2/24,fd77::2/64",
    }));
    let run = here.dunlin(&bundle, &["run", "--bundle", bundle.dir(), "--detach", "c"]);
    assert!(run.status.success(), "{run:?}");
    let mac = bundle.ok(&["exec", "c", "cat", "/sys/class/net/eth0/address"]);
    let image = bundle.path("image");
    let image = image.to_str().unwrap();
    let checkpoint = ["checkpoint", "--tcp-established", "--image-path", image, "c"];
    let checkpoint = here.dunlin(&bundle, &checkpoint);
    assert!(checkpoint.status.success(), "{checkpoint:?}");
    assert!(!here.links().contains("master br0"), "{}", here.links());

    let restore = ["restore", "--bundle", bundle.dir(), "--image-path", image, "--detach", "c"];
    let restore = there.dunlin(&bundle, &restore);
    assert!(restore.status.success(), "{restore:?}");
    assert_eq!(bundle.ok(&["exec", "c", "cat", "/sys/class/net/eth0/address"]), mac);
    let knob = bundle.ok(&["exec", "c", "cat", "/proc/sys/net/ipv4/conf/eth0/arp_notify"]);
    assert_eq!(knob, "0\n", "what announced the address is not left behind");
    // The host learnt the address from the announcement alone.
    let neighbours = there.run("ip", &["neigh", "show", "10.77.0.2"]);
    let neighbours = String::from_utf8_lossy(&neighbours.stdout).into_owned();
    assert!(neighbours.contains(mac.trim()), "{neighbours}");
    for address in ["10.77.0.2", "fd77::2"] {
        let ping = there.run("busybox", &["ping", "-c1", "-W5", address]);
        assert!(ping.status.success(), "{address}: {ping:?}");
    }
}
