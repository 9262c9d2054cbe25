//! A Redis under a writing client moves between two hosts: by us, and by runc
//! with CRIU.
//!
//! Every repetition has new hosts and a new Redis, so that both ways find the
//! same: nothing was moved before and the other host has only the bundle.

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Result, bail, ensure};
use dunlin_tests::{
    bundle::{self, Bundle},
    hosts::{BRIDGE, FOLDER, Host, Hosts, PREFIX},
    stage::{ADDRESS, ID, PATIENCE, Stage},
    writer::{self, PATIENT, Writer},
};
use tempfile::TempDir;

use super::{Bench, Sample, milliseconds};

const WAYS: [&str; 2] = ["dunlin", "runc+criu"];

/// One size; the second way only when it works here.
pub(super) struct Redis {
    mib: usize,
    with_criu: bool,
}

pub(super) fn benches(with_criu: bool) -> impl Iterator<Item = Box<dyn Bench>> {
    [0, 256, 1024].into_iter().map(move |mib| Box::new(Redis { mib, with_criu }) as Box<dyn Bench>)
}

impl Bench for Redis {
    fn name(&self) -> String {
        format!("redis-{}", self.mib)
    }

    fn ways(&self) -> Vec<&'static str> {
        WAYS[..if self.with_criu { 2 } else { 1 }].to_vec()
    }

    fn measure(&mut self, way: usize) -> Result<Vec<Sample>> {
        if way == 0 { self.by_us() } else { self.by_criu() }
    }
}

impl Redis {
    fn by_us(&self) -> Result<Vec<Sample>> {
        let stage = Stage::set()?;
        stage.start_redis(self.mib)?;
        let writer = stage.start_writer()?;
        let round = stage.move_redis(0, &writer, |_| {})?;
        verify(writer, stage.client())?;
        Ok(vec![
            milliseconds("downtime", round.downtime),
            milliseconds("freeze", round.frozen),
            milliseconds("total", round.total),
        ])
    }

    fn by_criu(&self) -> Result<Vec<Sample>> {
        let hosts = Hosts::new(&["a", "b", "client"])?;
        let (a, b, client) = (&hosts["a"], &hosts["b"], &hosts["client"]);
        let image = TempDir::with_prefix_in("dunlin-bench-", "/dev/shm")?;
        for host in [a, b] {
            prepare(host)?;
        }
        plug(a, "up")?;
        quietly(a, runc(&["run", "--detach", "--bundle"]).arg(Bundle::on_host(ID)).arg(ID))?;
        let mut connection = writer::connect(client, ADDRESS, PATIENCE)?;
        writer::fill(&mut connection, self.mib << 20)?;
        drop(connection);
        // CRIU keeps connections, and refuses while one waits to be accepted:
        // a client that lost patience would end the dump.
        let writer = Writer::start(client, ADDRESS, PATIENT)?;
        writer.next_acknowledgement(Instant::now(), PATIENCE)?;
        let start = Instant::now();
        quietly(a, runc(&["checkpoint", "--tcp-established"]).args(image_path(&image)).arg(ID))?;
        let stopped = start.elapsed();
        plug(a, "down")?;
        plug(b, "up")?;
        let mut restore = runc(&["restore", "--detach", "--tcp-established", "--bundle"]);
        quietly(b, restore.arg(Bundle::on_host(ID)).args(image_path(&image)).arg(ID))?;
        let total = start.elapsed();
        writer.next_acknowledgement(Instant::now(), PATIENCE)?;
        let downtime = writer.seen(start).gap;
        verify(writer, client)?;
        // runc does not say when its container stood still: CRIU's own
        // statistics would, but the two runs of it are what its user waits for.
        ensure!(stopped < total, "restored before it was stopped");
        Ok(vec![milliseconds("downtime", downtime), milliseconds("total", total)])
    }
}

fn verify(writer: Writer, client: &Host) -> Result<()> {
    let book = writer.stop()?;
    let mut connection = writer::connect(client, ADDRESS, PATIENCE)?;
    let missing = book.missing(&mut connection)?;
    ensure!(missing.is_empty(), "{} acknowledged writes are lost", missing.len());
    Ok(())
}

/// Makes Redis' bundle on a host, and a network namespace with the container's
/// address, since runc itself does not make one.
fn prepare(host: &Host) -> Result<()> {
    let mut bundle = Bundle::on(host, ID)?;
    bundle::redis(&mut bundle)?;
    bundle.netns("/run/netns/redis").save()?;
    let [a, b, c, d] = ADDRESS.octets();
    let lines = format!(
        "set -e\n\
         ip netns add redis\n\
         ip link add plug type veth peer name eth0 netns redis\n\
         ip link set plug master {BRIDGE}\n\
         ip netns exec redis sysctl -qw net.ipv4.conf.all.arp_notify=1 net.ipv4.conf.default.arp_notify=1 net.ipv4.conf.eth0.arp_notify=1\n\
         ip -n redis link set eth0 address 02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}\n\
         ip -n redis address add {ADDRESS}/{PREFIX} dev eth0\n\
         ip -n redis link set eth0 up\n\
         ip -n redis link set lo up\n"
    );
    host.run(Command::new("sh").args(["-c", &lines])).map(drop)
}

/// Connects the container's namespace with the bridge, or cuts it off.
fn plug(host: &Host, state: &str) -> Result<()> {
    host.run(Command::new("ip").args(["link", "set", "plug", state])).map(drop)
}

fn runc(args: &[&str]) -> Command {
    let mut runc = Command::new("runc");
    runc.args(["--root", "/run/runc", "--log", &format!("{FOLDER}/runc.log")]).args(args);
    runc
}

fn image_path(image: &TempDir) -> [&Path; 2] {
    [Path::new("--image-path"), image.path()]
}

/// Runs a command whose container keeps its stdio, so that must be nobody's.
fn quietly(host: &Host, command: &mut Command) -> Result<()> {
    let null = || File::options().read(true).write(true).open("/dev/null");
    command.stdin(null()?).stdout(null()?).stderr(null()?);
    let status = host.spawn(command)?.wait()?;
    if !status.success() {
        let log = fs::read_to_string(host.folder().join("runc.log"))?;
        bail!("{command:?} on host {}: {status}: {}", host.name(), log.trim());
    }
    Ok(())
}

/// Why runc and CRIU cannot be measured here, if they cannot.
pub(super) fn criu_lacks() -> Option<String> {
    for program in ["runc", "criu"] {
        let found = Command::new(program)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !found.is_ok_and(|status| status.success()) {
            return Some(format!("{program} is not on PATH"));
        }
    }
    let check = Command::new("criu").arg("check").output().ok()?;
    if check.status.success() {
        return None;
    }
    let said = String::from_utf8_lossy(&check.stderr).into_owned();
    let why = said.lines().next().unwrap_or("it says nothing").to_owned();
    Some(format!("`criu check` fails: {why}"))
}
