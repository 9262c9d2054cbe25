//! Programs as Debian ships them move between two hosts while they work, five
//! times in a row, and find by their own checks that nothing is missing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may panic like the tests")]

use std::{
    fs::{self, Permissions},
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use dunlin_api::rest::{MigrateRequest, TcpPolicy};
use dunlin_tests::{
    bundle::Bundle,
    hosts::Hosts,
    node::{self, Node},
};
use tempfile::TempDir;

const NAMES: [&str; 2] = ["a", "b"];
const ID: &str = "program";
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 71, 0, 100);

/// How often it moves.
const MOVES: usize = 5;

/// How long may take whatever must happen some time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A refusal that passes: the peer is about to accept.
const PASSES: &str = "has sent on a unix connection that nobody has accepted yet";

/// Two nodes, a client's host and a folder that both nodes have.
struct Stage {
    nodes: [Node; 2],
    hosts: Hosts,
    shared: TempDir,
}

impl Stage {
    /// Makes the hosts and gives both the bundle; `fill` what is in the folder.
    fn set(
        args: &[&str],
        user: (u32, u32),
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Self> {
        let hosts = Hosts::new(&[NAMES[0], NAMES[1], "client"])?;
        let shared = TempDir::with_prefix("dunlin-programs-")?;
        for folder in [shared.path().to_owned(), shared.path().join("tmp")] {
            fs::create_dir_all(&folder)?;
            fs::set_permissions(folder, Permissions::from_mode(0o777))?;
        }
        fill(shared.path())?;
        for name in NAMES {
            let mut bundle = Bundle::on(&hosts[name], ID)?;
            bundle.machine()?.volume(shared.path(), "/shared")?;
            bundle.volume(&shared.path().join("tmp"), "/tmp")?;
            bundle.args(args.iter().copied()).user(user.0, user.1).address(ADDRESS).save()?;
        }
        let nodes = [Node::start(&hosts[NAMES[0]])?, Node::start(&hosts[NAMES[1]])?];
        node::run_container(&hosts[NAMES[0]], ID)?;
        Ok(Self { nodes, hosts, shared })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.shared.path().join(name)
    }

    /// Waits until `done` gives something, for as long as the program works.
    fn until<T>(&self, what: &str, mut done: impl FnMut() -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = done() {
                return Ok(found);
            }
            if Instant::now() > deadline {
                let verdict = fs::read_to_string(self.file("verdict"));
                bail!("no {what}; its verdict: {verdict:?}\n{}", self.said());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Moves it to the other node and back, five times in all; `work` counts
    /// what is done, and more is done before each move and after the last.
    fn tour(&self, work: impl Fn() -> u64) -> Result<()> {
        for time in 0..MOVES {
            self.goes_on(&work)?;
            self.move_on(time % 2).with_context(|| format!("move {}", time + 1))?;
        }
        self.goes_on(&work)
    }

    fn goes_on(&self, work: impl Fn() -> u64) -> Result<()> {
        let before = work();
        self.until("work is done", || {
            (before + 3 <= work() || self.file("verdict").exists()).then_some(())
        })?;
        let early = fs::read_to_string(self.file("verdict")).ok();
        ensure!(early.is_none(), "it ended: {}\n{}", early.unwrap_or_default(), self.said());
        Ok(())
    }

    fn move_on(&self, from: usize) -> Result<()> {
        let mut request = MigrateRequest::to(self.nodes[1 - from].url());
        request.tcp = TcpPolicy::Keep;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let moved = self.nodes[from].migrate(ID, &request, |_| {});
            let problem = match moved {
                Ok(migration) => migration.error.map(anyhow::Error::from),
                Err(err) => Some(err),
            };
            match problem {
                None => return Ok(()),
                Some(err) if format!("{err:#}").contains(PASSES) && Instant::now() < deadline => {}
                Some(err) => return Err(err.context(self.said())),
            }
        }
    }

    /// Tells the program to come to an end and wants it to be content.
    fn content(&self) -> Result<()> {
        fs::write(self.file("stop"), "")?;
        let verdict = self.until("verdict", || fs::read_to_string(self.file("verdict")).ok())?;
        ensure!(verdict == "ok", "it says: {verdict}\n{}", self.said());
        Ok(())
    }

    /// What was said by nodes and program.
    fn said(&self) -> String {
        let mut text = String::new();
        for name in NAMES {
            for file in ["shim.log", &format!("{ID}.log")] {
                let said = fs::read(self.hosts[name].folder().join(file)).unwrap_or_default();
                text += &format!("--- {file} of {name}\n{}\n", String::from_utf8_lossy(&said));
            }
        }
        text
    }
}

/// A program that counts its rounds in a file and says in another whether all
/// is well.
fn moves(args: &[&str], user: (u32, u32), fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let stage = Stage::set(args, user, fill)?;
    stage.tour(|| fs::metadata(stage.file("rounds")).map_or(0, |file| file.len()))?;
    stage.content()
}

/// Our file `name` for the program.
fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(name)
}

fn copy(name: &str, folder: &Path) -> Result<()> {
    fs::copy(source(name), folder.join(name)).context("cannot copy")?;
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn python() -> Result<()> {
    moves(&["/usr/bin/python3", "/shared/python.py"], (0, 0), |to| copy("python.py", to))
}

#[test]
fn sqlite() -> Result<()> {
    moves(&["/usr/bin/python3", "/shared/sqlite.py"], (0, 0), |to| copy("sqlite.py", to))
}

#[test]
fn nodejs() -> Result<()> {
    moves(&["/usr/bin/node", "/shared/node.js"], (0, 0), |to| copy("node.js", to))
}

#[test]
fn java() -> Result<()> {
    moves(&["/usr/bin/java", "-Xmx256m", "-cp", "/shared", "Load"], (0, 0), |to| {
        run(Command::new("/usr/bin/javac").arg("-d").arg(to).arg(source("Load.java")))
    })
}

#[test]
fn postgresql() -> Result<()> {
    let passwd = fs::read_to_string("/etc/passwd")?;
    let line = passwd.lines().find_map(|line| line.strip_prefix("postgres:x:"));
    let mut ids = line.context("no user postgres")?.split(':').map(str::parse::<u32>);
    let user = (ids.next().context("no uid")??, ids.next().context("no gid")??);
    let programs = fs::read_dir("/usr/lib/postgresql")?.next().context("no PostgreSQL")??;
    let programs = programs.path().join("bin");
    let start = format!("PATH=$PATH:{}; exec /bin/bash /shared/postgres.sh", programs.display());
    moves(&["/bin/bash", "-c", &start], user, |to| {
        copy("postgres.sh", to)?;
        let data = to.join("data");
        let mut initdb = Command::new(programs.join("initdb"));
        initdb.arg("-D").arg(&data).args(["--no-sync", "--auth=trust"]);
        run(initdb.uid(user.0).gid(user.1).current_dir(to))?;
        let mut conf = fs::File::options().append(true).open(data.join("postgresql.conf"))?;
        conf.write_all(
            b"listen_addresses = ''\nunix_socket_directories = '/tmp'\nfsync = off\n\
              dynamic_shared_memory_type = mmap\nshared_buffers = 16MB\n",
        )?;
        Ok(())
    })
}

/// What nginx serves under this number.
fn page(n: u64) -> String {
    format!("page {n}\n").repeat(1000 + usize::try_from(n).unwrap())
}

const PAGES: u64 = 5;

#[test]
fn nginx() -> Result<()> {
    let args = ["/usr/sbin/nginx", "-c", "/shared/nginx.conf"];
    let stage = Stage::set(&args, (1000, 1000), |to| {
        copy("nginx.conf", to)?;
        let pages = to.join("www");
        fs::create_dir(&pages)?;
        (0..PAGES).try_for_each(|n| fs::write(pages.join(n.to_string()), page(n)))?;
        Ok(())
    })?;
    let (served, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let counters = (Arc::clone(&served), Arc::clone(&stop));
    let client = stage.hosts["client"].thread(move || browse(&counters.0, &counters.1))?;
    // Rounds are short ones here.
    let toured = stage.tour(|| served.load(Ordering::Relaxed) / 20);
    stop.store(true, Ordering::Relaxed);
    let browsed = client.join().unwrap()?;
    toured?;
    browsed
}

/// Fetches page after page; a connection that ends is made anew.
fn browse(served: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    let address = SocketAddr::from((ADDRESS, 8080));
    let mut connection = None;
    while !stop.load(Ordering::Relaxed) {
        let n = served.load(Ordering::Relaxed) % PAGES;
        let Some(open) = connection.as_mut() else {
            if let Ok(made) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
                // Longer than any move takes.
                made.set_read_timeout(Some(Duration::from_secs(2)))?;
                connection = Some(BufReader::new(made));
            }
            continue;
        };
        match fetch(open, n)? {
            Some(body) => {
                ensure!(body == page(n).as_bytes(), "page {n} came as {} other bytes", body.len());
                served.fetch_add(1, Ordering::Relaxed);
            }
            None => connection = None,
        }
    }
    Ok(())
}

/// One page; nothing when the connection ended first.
fn fetch(connection: &mut BufReader<TcpStream>, n: u64) -> Result<Option<Vec<u8>>> {
    let request = format!("GET /{n} HTTP/1.1\r\nHost: nginx\r\n\r\n");
    if connection.get_mut().write_all(request.as_bytes()).is_err() {
        return Ok(None);
    }
    let mut len = None;
    let mut is_first = true;
    loop {
        let mut line = String::new();
        match connection.read_line(&mut line) {
            Ok(0) | Err(_) => return Ok(None),
            Ok(_) if line == "\r\n" => break,
            Ok(_) if is_first => ensure!(line.starts_with("HTTP/1.1 200 "), "nginx says {line:?}"),
            Ok(_) => {
                if let Some(value) = line.strip_prefix("Content-Length: ") {
                    len = Some(value.trim().parse::<usize>()?);
                }
            }
        }
        is_first = false;
    }
    let mut body = vec![0; len.context("no length")?];
    Ok(connection.read_exact(&mut body).is_ok().then_some(body))
}
