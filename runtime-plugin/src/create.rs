//! Makes the init process of a container, up to the point where only the word
//! to start is missing.
//!
//! Calls libcontainer's process code directly instead of its builder: the
//! specification is passed in memory, so what is created may differ from what
//! the bundle says (a sandbox for a restore does), and a failure leaves
//! nothing behind.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use libcgroups::common::{CgroupConfig, CgroupManager, create_cgroup_manager};
use libcontainer::config::YoukiConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::notify_socket::{NOTIFY_FILE, NotifyListener};
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::container_main_process;
use libcontainer::process::intel_rdt::setup_intel_rdt;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::tty;
use libcontainer::user_ns::UserNamespaceConfig;
use libcontainer::workload::Executor;
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, geteuid, gettid};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::container::{Record, Root, start_time};
use crate::network::{self, Muted, Network};
use crate::spec;

/// A container to be made.
pub(crate) struct Creation<'a> {
    /// Where its state goes.
    pub(crate) root: &'a Root,
    /// Its name.
    pub(crate) id: &'a str,
    /// Directory with its `config.json`.
    pub(crate) bundle: &'a Path,
    /// What to make, as [`spec::load`] gave it or changed from that.
    pub(crate) spec: Spec,
    /// File to write the pid of init to.
    pub(crate) pid_file: Option<&'a Path>,
    /// Unix socket that receives the terminal.
    pub(crate) console_socket: Option<&'a Path>,
    /// How many descriptors from 3 on are passed on.
    pub(crate) preserve_fds: i32,
    /// `chroot` instead of `pivot_root`.
    pub(crate) no_pivot: bool,
    /// Cgroups by systemd.
    pub(crate) systemd: bool,
    /// What init becomes at start.
    pub(crate) executor: Box<dyn Executor>,
    /// Whether its network is cut off at first.
    pub(crate) muted: bool,
}

/// A container that was made.
pub(crate) struct Created {
    pub(crate) container: Container,
    /// Its network, when it was to be cut off at first.
    pub(crate) muted: Option<Muted>,
}

impl Creation<'_> {
    /// Makes namespaces, cgroup, mounts and init, which then waits for
    /// [`Container::start`].
    pub(crate) fn create(self) -> Result<Created> {
        spec::check_terminal(spec::process(&self.spec)?, self.console_socket)?;
        let dir = self.root.dir(self.id)?;
        match fs::create_dir(&dir) {
            Ok(()) => {}
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
                bail!("container {} already exists", self.id)
            }
            Err(err) => return Err(err).with_context(|| format!("cannot make {}", dir.display())),
        }
        let pid_file = self.pid_file.map(Path::to_owned);
        let remains = Remains { dir, pid_file, cgroup: None, veth: None };
        self.create_in(remains)
    }

    fn create_in(self, mut remains: Remains) -> Result<Created> {
        let dir = remains.dir.clone();
        let network = Network::of(&self.spec, self.id)?;
        let systemd = self.systemd || !geteuid().is_root();
        let mut container =
            Container::new(self.id, ContainerStatus::Creating, None, self.bundle, &dir)?;
        container.set_systemd(systemd).set_annotations(self.spec.annotations().clone()).save()?;
        let config = YoukiConfig::from_spec(&self.spec, self.id)?;
        config.save(&dir)?;

        let cgroup = CgroupConfig {
            cgroup_path: config.cgroup_path,
            systemd_cgroup: systemd,
            container_name: self.id.to_owned(),
        };
        refuse_taken_cgroup(&cgroup)?;
        remains.cgroup = Some(cgroup.clone());

        let console: Option<OwnedFd> = match self.console_socket {
            Some(path) => {
                let path = path.canonicalize().context("cannot find the console socket")?;
                Some(tty::setup_console_socket(&dir, &path, "console-socket")?)
            }
            None => None,
        };
        let listener = NotifyListener::new(&dir.join(NOTIFY_FILE))?;
        let rootfs = self.spec.root().as_ref().context("the specification has no root")?.path();
        let rootfs = rootfs
            .canonicalize()
            .with_context(|| format!("cannot find the root filesystem {}", rootfs.display()))?;
        inherit_by_init(&self.spec)?;

        let args = ContainerArgs {
            container_type: ContainerType::InitContainer,
            syscall: SyscallType::default(),
            rootfs,
            console_socket: console.as_ref().map(AsRawFd::as_raw_fd),
            notify_listener: listener,
            preserve_fds: self.preserve_fds,
            container: Some(container.clone()),
            user_ns_config: UserNamespaceConfig::new(&self.spec)?,
            cgroup_config: cgroup,
            detached: true,
            executor: self.executor,
            no_pivot: self.no_pivot,
            stdin: None,
            stdout: None,
            stderr: None,
            as_sibling: false,
            pid_file: self.pid_file.map(Path::to_owned),
            spec: Rc::new(self.spec),
        };
        let init = container_main_process(&args)?;

        let rdt = args.spec.linux().as_ref().and_then(|linux| linux.intel_rdt().as_ref());
        if let Some(rdt) = rdt {
            let (dir, monitoring) = setup_intel_rdt(Some(self.id), &init, rdt)?;
            container.set_intel_rdt_dir(dir).set_intel_rdt_monitoring_dir(monitoring);
        }
        container
            .set_status(ContainerStatus::Created)
            .set_creator(geteuid().as_raw())
            .set_pid(init.as_raw())
            .save()?;
        let init_start = start_time(init).context("init of the container has ended")?;
        remains.veth = network.is_some().then(|| network::veth_name(&dir));
        Record { init_start, veth: remains.veth.clone() }.save(&container)?;
        let mut muted = if self.muted { network::mute(init)? } else { None };
        if !self.muted && joins_network(&args.spec) {
            network::release(init)?;
        }
        if let (Some(network), Some(veth)) = (network, &remains.veth) {
            network::attach(&network, veth, init)
                .context("cannot attach the container to its network")?;
        }
        if let Some(muted) = &mut muted {
            muted.prepare().context("cannot prepare the announcement of its addresses")?;
        }
        remains.keep();
        Ok(Created { container, muted })
    }
}

/// What a creation that failed half-way leaves behind: dropping this clears it.
struct Remains {
    dir: PathBuf,
    pid_file: Option<PathBuf>,
    cgroup: Option<CgroupConfig>,
    veth: Option<String>,
}

impl Remains {
    /// The creation went well: nothing is cleared.
    fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Remains {
    fn drop(&mut self) {
        if let Err(err) = end_children() {
            tracing::warn!("{err:#}");
        }
        if let Some(cgroup) = self.cgroup.take()
            && let Err(err) = remove_cgroup(cgroup)
        {
            tracing::warn!(%err, "cannot remove the cgroup of a container that was not created");
        }
        if let Some(veth) = &self.veth
            && let Err(err) = network::detach(veth)
        {
            tracing::warn!("{err:#}");
        }
        if let Err(err) = fs::remove_dir_all(&self.dir) {
            tracing::warn!(%err, dir = %self.dir.display(), "cannot remove the state directory");
        }
        if let Some(pid_file) = &self.pid_file
            && let Err(err) = fs::remove_file(pid_file)
            && err.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%err, pid_file = %pid_file.display(), "cannot remove the pid file");
        }
    }
}

/// Kills and reaps our children, which are processes that were to enter a
/// container and did not.
///
/// Left to the host's init they may stay zombies for seconds, and the init of a
/// pid namespace cannot end before every process in it has been reaped.
pub(crate) fn end_children() -> Result<()> {
    let children = fs::read_to_string(format!("/proc/self/task/{}/children", gettid()))
        .context("cannot list our children")?;
    for child in children.split_whitespace() {
        let child = Pid::from_raw(child.parse()?);
        kill(child, Signal::SIGKILL).with_context(|| format!("cannot kill pid {child}"))?;
        waitpid(child, None).with_context(|| format!("cannot reap pid {child}"))?;
    }
    Ok(())
}

fn remove_cgroup(config: CgroupConfig) -> Result<()> {
    create_cgroup_manager(config)?.remove()?;
    Ok(())
}

/// A cgroup that already holds processes belongs to somebody else, and
/// deleting this container would kill them.
fn refuse_taken_cgroup(config: &CgroupConfig) -> Result<()> {
    let manager = create_cgroup_manager(config.clone()).context("cannot open the cgroup")?;
    // A cgroup that is not there yet cannot be listed.
    let pids = manager.get_all_pids().unwrap_or_default();
    if let Some(pid) = pids.first() {
        bail!("cgroup {} already holds pid {pid}", config.cgroup_path.display());
    }
    Ok(())
}

fn joins_network(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_some()
    })
}

/// Sets on ourselves what init inherits over the fork.
fn inherit_by_init(spec: &Spec) -> Result<()> {
    if let Some(score) = spec::process(spec)?.oom_score_adj() {
        fs::write("/proc/self/oom_score_adj", score.to_string())
            .with_context(|| format!("cannot set oom_score_adj to {score}"))?;
    }
    // Processes in a namespace that we join must not reach us through ptrace.
    if spec.linux().as_ref().is_some_and(|linux| linux.namespaces().is_some()) {
        prctl::set_dumpable(false).context("cannot become undumpable")?;
    }
    Ok(())
}
