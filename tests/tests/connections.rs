//! Open connections survive moves, and failed ones, without a reset, a byte
//! lost, doubled or out of order; and nobody claims the address of another.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests may do what tests may"
)]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use dunlin_api::rest::{
    DestinationState, MigrateRequest, Migration, MigrationState, Phase, TcpPolicy,
};
use dunlin_checkpoint::Hold;
use dunlin_tests::{
    bundle::Bundle,
    capture::{Capture, What, claimants},
    echo::Echoes,
    hosts::{Host, Hosts},
    node::{self, Node},
    worker::program,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const ID: &str = "echo";
const NAMES: [&str; 2] = ["a", "b"];
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 71, 0, 100);
const PORT: u16 = 7;
const PATIENCE: Duration = Duration::from_secs(60);

/// Which engine is killed.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Source,
    Destination,
}

/// Two nodes, an echo server on the first, and a client's host.
struct Stage {
    nodes: [Node; 2],
    hosts: Hosts,
    capture: Capture,
}

/// Who makes the container's network.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Network {
    /// We do, on a bridge.
    Bridge,
    /// Somebody else did, on both hosts.
    External,
}

/// Where a host has a namespace made by somebody else.
const EXTERNAL: &str = "/run/netns/external";

impl Stage {
    fn set() -> Self {
        Self::with(Network::Bridge)
    }

    fn with(network: Network) -> Self {
        let hosts = Hosts::new(&["a", "b", "client"]).unwrap();
        for name in NAMES {
            let bundle = bundle(&hosts[name], ID, network);
            bundle.save().unwrap();
        }
        if network == Network::External {
            NAMES.iter().for_each(|name| make_external(&hosts[name], *name != "a"));
        }
        let capture = Capture::start(&hosts, ADDRESS).unwrap();
        let nodes = NAMES.map(|name| Node::start(&hosts[name]).unwrap());
        node::run_container(&hosts["a"], ID).unwrap();
        Self { nodes, hosts, capture }
    }

    fn connect(&self, count: usize) -> Echoes {
        let address = SocketAddr::from((ADDRESS, PORT));
        // Refused until it listens.
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Echoes::start(&self.hosts["client"], address, count) {
                Ok(echoes) => {
                    // Of the refusals.
                    self.capture.frames().unwrap();
                    return echoes;
                }
                Err(err) => assert!(Instant::now() < deadline, "{err:#}"),
            }
        }
    }

    fn request(&self, from: usize) -> MigrateRequest {
        let mut request = MigrateRequest::to(self.nodes[1 - from].url());
        request.tcp = TcpPolicy::Keep;
        request
    }

    fn hand_over(&self, from: usize) {
        let migration = self.nodes[from].migrate(ID, &self.request(from), |_| {}).unwrap();
        if let Some(problem) = migration.error {
            panic!("{problem}: {}", self.said());
        }
    }

    /// Tries to move it away from `from` and kills one of the two engines, when
    /// the destination's is ready or as soon as it is there.
    ///
    /// The source may not commit meanwhile: its shim stands still. So it runs
    /// where it ran.
    fn fail(&self, from: usize, ready: bool, victim: Victim) {
        let to = 1 - from;
        let (at, word) = match victim {
            Victim::Source => (from, "source-worker"),
            Victim::Destination => (to, "receive"),
        };
        let signal = |pid: u32, signal| kill(Pid::from_raw(pid.try_into().unwrap()), signal);
        let mut killed = false;
        let watch = |migration: &Migration| {
            if killed || migration.progress.phase != Phase::Preparing {
                return;
            }
            killed = true;
            signal(self.nodes[from].pid(), Signal::SIGSTOP).unwrap();
            let there = self.nodes[to].pid();
            self.until("the destination begins", || !workers(there, "receive").is_empty());
            if ready {
                self.until("the destination is ready", || self.is_ready(to, migration));
            }
            for pid in workers(self.nodes[at].pid(), word) {
                signal(pid, Signal::SIGKILL).unwrap();
            }
            signal(self.nodes[from].pid(), Signal::SIGCONT).unwrap();
        };
        let migration = self.nodes[from].migrate(ID, &self.request(from), watch).unwrap();
        assert!(migration.error.is_some(), "{migration:?}");
        assert!(killed, "{migration:?}");
        self.until("nothing is left of it", || {
            let all = self.nodes[to].ask(async |client| client.migrations().await).unwrap();
            all.iter().any(|found| found.id == migration.id && found.state.is_final())
        });
    }

    fn is_ready(&self, at: usize, migration: &Migration) -> bool {
        // The caller drives another node's runtime, beside which none can run.
        let ask = || self.nodes[at].ask(async |client| client.migrations().await).unwrap();
        let all = thread::scope(|scope| scope.spawn(ask).join().unwrap());
        all.iter().any(|found| {
            found.id == migration.id && found.state == MigrationState::In(DestinationState::Ready)
        })
    }

    fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < deadline, "not so: {what}: {}", self.said());
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn said(&self) -> String {
        let logs = NAMES.map(|name| {
            let log = fs::read_to_string(self.hosts[name].folder().join("shim.log"));
            format!("{name}:\n{}", log.unwrap_or_default())
        });
        logs.join("\n")
    }

    /// Wants nothing but claims, and those by these hosts in turn.
    fn judge(&self, hosts: &[&str]) {
        let frames = self.capture.frames().unwrap();
        let stray: Vec<_> = frames.iter().filter(|f| f.what != What::Claim).collect();
        assert!(stray.is_empty(), "{} of {frames:?}", stray.len());
        assert_eq!(claimants(&frames), hosts, "{frames:?}");
    }
}

fn bundle(host: &Host, id: &str, network: Network) -> Bundle {
    let mut bundle = Bundle::on(host, id).unwrap();
    let server = program("echo").unwrap();
    bundle.program_as(&server, "/bin/echo".as_ref()).unwrap();
    bundle.args(["/bin/echo", &PORT.to_string()]);
    match network {
        Network::Bridge => bundle.address(ADDRESS),
        Network::External => bundle.netns(EXTERNAL),
    };
    bundle
}

/// Makes a namespace with the address; a mute one does not answer for it.
fn make_external(host: &Host, mute: bool) {
    let run = |program: &str, line: &str| {
        host.run(Command::new(program).args(line.split(' '))).unwrap();
    };
    run("ip", "netns add external");
    if mute {
        let mut inside = Command::new("ip");
        let command = inside.args(["netns", "exec", "external", "sleep", "60"]);
        let mut child = host.spawn(command).unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        let deadline = Instant::now() + PATIENCE;
        // Until then it is `ip`, on its way there.
        while !fs::read_link(format!("/proc/{pid}/exe")).unwrap().ends_with("sleep") {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(1));
        }
        Hold::of(pid).unwrap().unwrap().arrive().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
    run("ip", "link add outer type veth peer name eth0 netns external");
    run("ip", "link set outer master br0 up");
    run("ip", "-n external link set eth0 address 02:00:0a:47:00:64");
    run("ip", &format!("-n external address add {ADDRESS}/24 dev eth0"));
    run("ip", "-n external link set lo up");
    run("ip", "-n external link set eth0 up");
}

/// Processes below a shim with `word` among their arguments.
fn workers(shim: u32, word: &str) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{shim}/task")).unwrap().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let pids: Vec<u32> =
        lists.flat_map(|l| l.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
    let has = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|arg| arg == word.as_bytes())
    };
    pids.into_iter().filter(has).collect()
}

fn ten_moves(count: usize, network: Network) -> Stage {
    let stage = Stage::with(network);
    let mut echoes = stage.connect(count);
    echoes.catch_up(PATIENCE).unwrap();
    let mut longest = Duration::ZERO;
    for number in 0..10 {
        echoes.take_gap();
        stage.hand_over(number % 2);
        echoes.catch_up(PATIENCE).unwrap();
        longest = longest.max(echoes.take_gap());
        stage.judge(&[NAMES[(number + 1) % 2]]);
    }
    let bytes = echoes.stop().unwrap();
    println!("{count} connections: {bytes} bytes, longest gap {longest:?}");
    stage
}

#[test]
fn one_survives_ten_moves() {
    ten_moves(1, Network::Bridge);
}

#[test]
fn a_hundred_survive_ten_moves() {
    ten_moves(100, Network::Bridge);
}

#[test]
fn they_survive_in_a_namespace_of_somebody_else() {
    let stage = ten_moves(10, Network::External);
    // What was left there is mute, as its address is elsewhere, until the next
    // container comes.
    let tables = || {
        let mut nft = Command::new("ip");
        stage.hosts["b"].run(nft.args("netns exec external nft list tables".split(' '))).unwrap()
    };
    assert_eq!(tables(), "table inet dunlin-held\ntable arp dunlin-held\n");
    bundle(&stage.hosts["b"], "next", Network::External).save().unwrap();
    node::run_container(&stage.hosts["b"], "next").unwrap();
    assert_eq!(tables(), "");
}

#[test]
fn they_survive_moves_that_fail() {
    let stage = Stage::set();
    let mut echoes = stage.connect(10);
    echoes.catch_up(PATIENCE).unwrap();
    for ready in [false, true] {
        for victim in [Victim::Source, Victim::Destination] {
            stage.fail(0, ready, victim);
            echoes.catch_up(PATIENCE).unwrap();
        }
    }
    stage.judge(&[]);
    stage.hand_over(0);
    echoes.catch_up(PATIENCE).unwrap();
    stage.judge(&["b"]);
    echoes.stop().unwrap();
}

/// The end of a connection at the source would teach the switch that the address
/// is still there.
#[test]
fn the_source_is_silent_when_they_are_closed() {
    let stage = Stage::set();
    let mut echoes = stage.connect(5);
    echoes.catch_up(PATIENCE).unwrap();
    let request = MigrateRequest { tcp: TcpPolicy::Close, ..stage.request(0) };
    let migration = stage.nodes[0].migrate(ID, &request, |_| {}).unwrap();
    assert!(migration.error.is_none(), "{migration:?}");
    let frames = stage.capture.frames().unwrap();
    assert!(frames.iter().all(|frame| frame.host != "a"), "{frames:?}");
    assert_eq!(claimants(&frames), ["b"]);
    stage.connect(1).catch_up(PATIENCE).unwrap();
}
