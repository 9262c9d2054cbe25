//! Hosts for tests, demo and bench: network namespaces joined by a switch.
//!
//! A host has namespaces of its own for network, pids, mounts, name and System
//! V objects, an empty `/run`, and an interface `up0` in a bridge `br0` that
//! carries its address; what a container attaches to `br0` is on the same wire
//! as all the others. All hosts share this kernel, its cgroups and its files.
//!
//! Each is held by a process that waits for the end of its stdin. The other
//! end is ours, so whatever ends us, Ctrl-C and SIGKILL included, ends every
//! host with all that runs in it, its cgroups and its folder.

use std::{
    fs, io,
    io::{BufRead, BufReader, Write},
    net::Ipv4Addr,
    ops::Index,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};
use rustix::{
    process::{Pid, PidfdFlags, pidfd_open},
    system::sethostname,
};
use tempfile::TempDir;

/// Where a host finds its own folder.
pub const FOLDER: &str = "/run/host";

/// The bridge of every host.
pub const BRIDGE: &str = "br0";

/// Bits of the network part of every address.
pub const PREFIX: u8 = 24;

/// The namespaces that make a host.
const SPACES: CloneFlags = CloneFlags::CLONE_NEWNET
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWIPC);

/// First process of a host. Its arguments: the host's folder and its cgroup.
///
/// A v1 freezer shields its tasks from SIGKILL, so all are thawed first. What
/// the driver started stays a zombie until the driver looks, and keeps this
/// process from leaving; so it says when its work is done.
const INIT: &str = r#"
mount -t proc proc /proc || exit
echo ready
read -r
cgroups() {
    for top in /sys/fs/cgroup /sys/fs/cgroup/*; do
        if [ -d "$top$1" ]; then find "$top$@"; fi
    done
}
cgroups "$2" -name freezer.state -exec sh -c 'echo THAWED >"$0"' {} \;
kill -KILL -1
for try in {1..500}; do
    cgroups "$2" -depth -type d -exec rmdir {} +
    [ "$(cgroups "$2" -type d)" ] || break
    sleep 0.01
done
cgroups "${2%/*}" -maxdepth 0 -exec rmdir {} +
umount -l /run/host
rm -rf "$1"
rmdir "${1%/*}"
echo gone
"#;

/// Some hosts on one switch; dropping them removes them.
#[derive(Debug)]
pub struct Hosts {
    hosts: Vec<Host>,
    switch: Host,
    _folder: TempDir,
}

impl Hosts {
    /// Makes one host for each of `names`.
    pub fn new(names: &[&str]) -> Result<Self> {
        let folder = TempDir::with_prefix("dunlin-hosts-")?;
        let switch = Host::new("switch", folder.path(), Ipv4Addr::UNSPECIFIED)?;
        switch.ip("link add switch type bridge\nlink set switch up\n")?;
        let mut hosts = Vec::with_capacity(names.len());
        for (name, last) in names.iter().zip(1..=250) {
            let host = Host::new(name, folder.path(), Ipv4Addr::new(10, 71, 0, last))?;
            host.plug_into(&switch, last)?;
            hosts.push(host);
        }
        Ok(Self { hosts, switch, _folder: folder })
    }

    /// What joins them. Port `portN` leads to the Nth host.
    #[must_use]
    pub fn switch(&self) -> &Host {
        &self.switch
    }

    /// All hosts, in the order of their making.
    pub fn iter(&self) -> impl Iterator<Item = &Host> {
        self.hosts.iter()
    }
}

impl Index<&str> for Hosts {
    type Output = Host;

    fn index(&self, name: &str) -> &Host {
        self.iter().find(|host| host.name == name).expect("there is a host of that name")
    }
}

/// One host; dropping it ends all that runs in it.
#[derive(Debug)]
pub struct Host {
    name: String,
    address: Ipv4Addr,
    folder: PathBuf,
    cgroup: String,
    init: Option<Child>,
    says: BufReader<ChildStdout>,
    pid: Pid,
    pidfd: OwnedFd,
}

impl Host {
    fn new(name: &str, parent: &Path, address: Ipv4Addr) -> Result<Self> {
        let folder = parent.join(name);
        fs::create_dir(&folder)?;
        let group = parent.file_name().context("a temporary folder has a name")?;
        let cgroup = format!("/{}/{name}", group.to_string_lossy());
        let mut init = thread::scope(|scope| {
            scope
                .spawn(|| spawn_init(name, &folder, &cgroup))
                .join()
                .map_err(|_| anyhow!("panic"))?
        })
        .with_context(|| format!("cannot make host {name}"))?;
        let mut line = String::new();
        let mut says = BufReader::new(init.stdout.take().context("the host's init has no stdout")?);
        says.read_line(&mut line)?;
        ensure!(line == "ready\n", "host {name} did not come up");
        let pid = Pid::from_child(&init);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let init = Some(init);
        Ok(Self { name: name.to_owned(), address, folder, cgroup, init, says, pid, pidfd })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the switch.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its own folder, as seen from outside; inside it is [`FOLDER`].
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The cgroup below which its containers belong: the hosts share one tree
    /// of cgroups, so the same container must have two names in it.
    #[must_use]
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// How a file of this host is reached from outside.
    #[must_use]
    pub fn outside(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        Path::new("/proc")
            .join(self.pid.to_string())
            .join("root")
            .join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// Runs `work` in a thread inside this host.
    pub fn with<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let done = scope.spawn(|| enter(self.pidfd.as_fd()).map(|()| work())).join();
            done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs `work` in a thread of its own, which lives in this host but can
    /// start no thread more.
    pub fn thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<io::Result<T>>> {
        let pidfd = self.pidfd.try_clone()?;
        thread::Builder::new()
            .name(format!("on {}", self.name))
            .spawn(move || enter(pidfd.as_fd()).map(|()| work()))
    }

    /// Starts a program inside this host, out of reach of the terminal's Ctrl-C.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.with(|| command.process_group(0).spawn())?
    }

    /// Runs a program inside this host to its end.
    pub fn output(&self, command: &mut Command) -> io::Result<Output> {
        self.with(|| command.stdin(Stdio::null()).process_group(0).output())?
    }

    /// Runs a program inside this host, wants it to succeed and returns what
    /// it wrote.
    pub fn run(&self, command: &mut Command) -> Result<String> {
        let name = command.get_program().to_string_lossy().into_owned();
        let output = self
            .output(command)
            .with_context(|| format!("cannot run {name} on host {}", self.name))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            bail!("{name} on host {}: {}: {said}", self.name, output.status);
        }
        String::from_utf8(output.stdout).with_context(|| format!("what {name} wrote"))
    }

    /// Runs lines of `ip` commands in the network of this host, but among the
    /// pids of the caller.
    fn ip(&self, lines: &str) -> Result<()> {
        let output = thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(self.pidfd.as_fd(), CloneFlags::CLONE_NEWNET)?;
                    let mut ip = Command::new("ip")
                        .args(["-batch", "-"])
                        .stdin(Stdio::piped())
                        .stderr(Stdio::piped())
                        .spawn()?;
                    ip.stdin.take().map_or(Ok(()), |mut pipe| pipe.write_all(lines.as_bytes()))?;
                    ip.wait_with_output()
                })
                .join()
                .map_err(|_| anyhow!("panic"))?
                .context("cannot run ip")
        })?;
        ensure!(
            output.status.success(),
            "ip on host {}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    fn plug_into(&self, switch: &Host, port: u8) -> Result<()> {
        let (name, pid, address) = (&self.name, self.pid, self.address);
        switch.ip(&format!(
            "link add port{port} type veth peer name up0 netns {pid}\n\
             link set port{port} master switch up alias {name}\n"
        ))?;
        // A bridge without an address of its own takes that of its lowest port,
        // which would change whenever a container comes or goes.
        self.ip(&format!(
            "link set lo up\n\
             link add {BRIDGE} address 02:00:00:00:00:{port:02x} type bridge\n\
             link set up0 master {BRIDGE} up\n\
             address add {address}/{PREFIX} brd + dev {BRIDGE}\n\
             link set {BRIDGE} up\n"
        ))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let Some(mut init) = self.init.take() else { return };
        drop(init.stdin.take());
        // Its last word, or the end of its output: either way it did what it could.
        self.says.read_line(&mut String::new()).ok();
        thread::spawn(move || init.wait());
    }
}

/// Moves the calling thread into a host for good: its sockets and its child
/// processes are the host's from now on.
fn enter(host: BorrowedFd<'_>) -> io::Result<()> {
    // A mount namespace can be joined by a thread with a cwd of its own only.
    unshare(CloneFlags::CLONE_FS)?;
    setns(host, SPACES)?;
    Ok(())
}

/// Starts the first process of a host, from a thread that is of no use after.
fn spawn_init(name: &str, folder: &Path, cgroup: &str) -> Result<Child> {
    unshare(SPACES.union(CloneFlags::CLONE_FS)).context("cannot make namespaces")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, none)?;
    fs::create_dir(FOLDER)?;
    mount(Some(folder), FOLDER, none, MsFlags::MS_BIND, none)?;
    sethostname(name.as_bytes())?;
    Command::new("bash")
        .args(["-c", INIT, "host"])
        .arg(folder)
        .arg(cgroup)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("cannot run bash")
}
