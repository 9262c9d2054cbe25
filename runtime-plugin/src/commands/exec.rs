//! `exec`: one more process in a running container.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use libcgroups::common::CgroupConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::notify_socket::{NotifyListener, NotifySocket};
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::container_main_process;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::tty;
use liboci_cli::Exec;
use nix::fcntl::OFlag;
use nix::sys::prctl;
use nix::unistd::{Pid, pipe2};
use oci_spec::runtime::{
    Capabilities, Capability, LinuxBuilder, LinuxCapabilities, LinuxCapabilitiesBuilder,
    LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, Process,
};

use crate::console::{Console, Terminal};
use crate::container::Root;
use crate::create::end_children;
use crate::foreground::Signals;
use crate::program::Program;
use crate::spec;

/// Runs a program inside the container; unless detached, waits for it.
pub(crate) fn exec(root: &Root, args: &Exec) -> Result<u8> {
    if args.process_label.is_some() {
        bail!("--process-label is not supported: dunlin has no SELinux");
    }
    let container = root.load(&args.container_id)?;
    match container.status() {
        ContainerStatus::Created | ContainerStatus::Running => {}
        ContainerStatus::Paused if args.ignore_paused => {}
        status => {
            let status = status.to_string().to_lowercase();
            bail!("cannot exec in {}: it is {status}", args.container_id)
        }
    }
    let joined = join(root, &container, args).inspect_err(|_| {
        if let Err(err) = end_children() {
            tracing::warn!("{err:#}");
        }
    });
    let Joined { pid, terminal, signals } =
        joined.with_context(|| format!("cannot exec in {}", args.container_id))?;
    signals.map_or(Ok(0), |signals| signals.pass_to(pid, terminal))
}

/// A process that runs its program inside the container.
struct Joined {
    pid: Pid,
    /// Its terminal, when that is ours to serve.
    terminal: Option<Terminal>,
    /// What we hold back for it, unless it is left alone.
    signals: Option<Signals>,
}

/// Starts the process and returns when it runs its program.
fn join(root: &Root, container: &Container, args: &Exec) -> Result<Joined> {
    let mut spec = spec::load(container.bundle(), root, container.id(), container.systemd())?;
    let process = match &args.process {
        Some(path) => {
            let file =
                File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            serde_json::from_reader(BufReader::new(file))
                .with_context(|| format!("cannot read {}", path.display()))?
        }
        None => process_from_flags(spec::process(&spec)?, args)?,
    };
    let given = args.console_socket.as_deref();
    let own = Console::if_needed(root, &process, args.detach, given)?;
    let own_path = own.as_ref().map(Console::path);
    let console_socket = own_path.as_deref().or(given);
    spec::check_terminal(&process, console_socket)?;
    let init = container.pid().context("the container has no init")?;
    let linux = spec.linux().as_ref().context("the specification has no linux section")?;
    let mut inside = LinuxBuilder::default().build()?;
    inside
        .set_namespaces(Some(namespaces(init)?))
        .set_cgroups_path(linux.cgroups_path().clone())
        .set_personality(linux.personality().clone())
        .set_seccomp(linux.seccomp().clone())
        .set_masked_paths(None)
        .set_readonly_paths(None)
        .set_resources(None);
    let rootfs = spec.root().as_ref().context("the specification has no root")?.path().clone();
    spec.set_process(Some(process)).set_linux(Some(inside)).set_hooks(None);

    let scratch = Scratch::new(container)?;
    let notify = scratch.0.join("notify.sock");
    let console: Option<OwnedFd> = match console_socket {
        Some(path) => {
            let path = path.canonicalize().context("cannot find the console socket")?;
            Some(tty::setup_console_socket(&scratch.0, &path, "console.sock")?)
        }
        None => None,
    };
    // Closed by the kernel when the program runs, written to when it cannot.
    let (failure, report) = pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
    prctl::set_dumpable(false).context("cannot become undumpable")?;
    let process = ContainerArgs {
        container_type: ContainerType::TenantContainer { exec_notify_fd: report.as_raw_fd() },
        syscall: SyscallType::default(),
        rootfs,
        console_socket: console.as_ref().map(AsRawFd::as_raw_fd),
        notify_listener: NotifyListener::new(&notify)?,
        preserve_fds: args.preserve_fds,
        container: Some(container.clone()),
        user_ns_config: None,
        cgroup_config: CgroupConfig {
            cgroup_path: sub_cgroup(container.spec()?.cgroup_path, args.cgroup.as_deref())?,
            systemd_cgroup: container.systemd(),
            container_name: container.id().to_owned(),
        },
        detached: args.detach,
        executor: Box::new(Program),
        no_pivot: false,
        stdin: None,
        stdout: None,
        stderr: None,
        as_sibling: false,
        pid_file: args.pid_file.clone(),
        spec: Rc::new(spec),
    };
    let pid = container_main_process(&process)?;
    let terminal = own.map(Console::accept).transpose()?;
    let signals = (!args.detach).then(Signals::hold).transpose()?;
    NotifySocket::new(notify).notify_container_start()?;
    drop(report);
    let mut text = String::new();
    File::from(failure).read_to_string(&mut text).context("cannot hear from the process")?;
    if !text.is_empty() {
        bail!(text);
    }
    Ok(Joined { pid, terminal, signals })
}

/// The container's own process, changed as the flags say.
fn process_from_flags(process: &Process, args: &Exec) -> Result<Process> {
    if args.command.is_empty() {
        bail!("no command was given");
    }
    let mut process = process.clone();
    process.set_args(Some(args.command.clone())).set_terminal(Some(args.tty));
    if let Some(cwd) = &args.cwd {
        if !cwd.is_absolute() {
            bail!("--cwd {} is not absolute", cwd.display());
        }
        process.set_cwd(cwd.clone());
    }
    let mut env = process.env().clone().unwrap_or_default();
    env.retain(|var| {
        let name = var.split('=').next().unwrap_or(var);
        !args.env.iter().any(|(given, _)| given == name)
    });
    env.extend(args.env.iter().map(|(name, value)| format!("{name}={value}")));
    process.set_env(Some(env));
    if let Some(profile) = &args.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    if args.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if let Some((uid, gid)) = args.user {
        process.user_mut().set_uid(uid);
        if let Some(gid) = gid {
            process.user_mut().set_gid(gid);
        }
    }
    if !args.additional_gids.is_empty() {
        let mut gids = process.user().additional_gids().clone().unwrap_or_default();
        gids.extend(&args.additional_gids);
        process.user_mut().set_additional_gids(Some(gids));
    }
    if !args.cap.is_empty() {
        let more = args.cap.iter().map(|name| capability(name)).collect::<Result<Vec<_>>>()?;
        let caps = with_more(process.capabilities().as_ref(), &more)?;
        process.set_capabilities(Some(caps));
    }
    Ok(process)
}

fn capability(name: &str) -> Result<Capability> {
    let name = name.to_ascii_uppercase();
    let short = name.strip_prefix("CAP_").unwrap_or(&name);
    short.parse().ok().with_context(|| format!("unknown capability {name}"))
}

/// Adds capabilities to every set; to the ambient one only where the container
/// has an inheritable set, which ambient capabilities depend on.
fn with_more(caps: Option<&LinuxCapabilities>, more: &[Capability]) -> Result<LinuxCapabilities> {
    let mut caps = match caps {
        Some(caps) => caps.clone(),
        None => {
            let mut caps = LinuxCapabilitiesBuilder::default().build()?;
            caps.set_bounding(None)
                .set_effective(None)
                .set_permitted(None)
                .set_inheritable(None)
                .set_ambient(None);
            caps
        }
    };
    let add = |set: &Option<Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(more.iter().copied());
        Some(set)
    };
    let (bounding, effective, permitted) =
        (add(caps.bounding()), add(caps.effective()), add(caps.permitted()));
    let ambient = if caps.inheritable().is_some() { add(caps.ambient()) } else { None };
    caps.set_bounding(bounding)
        .set_effective(effective)
        .set_permitted(permitted)
        .set_ambient(ambient);
    Ok(caps)
}

/// The namespaces that the container's init does not share with us.
///
/// They are asked of the kernel, not of the specification: a restored container
/// has a time namespace that its bundle does not mention.
fn namespaces(init: Pid) -> Result<Vec<LinuxNamespace>> {
    let kinds = [
        // The first one makes us root in the others.
        (LinuxNamespaceType::User, "user"),
        (LinuxNamespaceType::Cgroup, "cgroup"),
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Mount, "mnt"),
        (LinuxNamespaceType::Network, "net"),
        (LinuxNamespaceType::Pid, "pid"),
        (LinuxNamespaceType::Time, "time"),
        (LinuxNamespaceType::Uts, "uts"),
    ];
    let mut foreign = Vec::new();
    for (kind, file) in kinds {
        let path = format!("/proc/{init}/ns/{file}");
        let theirs = match fs::read_link(&path) {
            Ok(link) => link,
            // Its kernel does not have this kind.
            Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
            Err(err) => return Err(err).with_context(|| format!("cannot read {path}")),
        };
        if fs::read_link(format!("/proc/self/ns/{file}"))? != theirs {
            foreign.push(LinuxNamespaceBuilder::default().typ(kind).path(path).build()?);
        }
    }
    Ok(foreign)
}

/// The container's cgroup or one below it.
fn sub_cgroup(cgroup: PathBuf, sub: Option<&str>) -> Result<PathBuf> {
    let Some(sub) = sub else { return Ok(cgroup) };
    if sub.contains(':') {
        bail!("--cgroup {sub}: a cgroup per controller is not supported");
    }
    let sub = Path::new(sub.trim_start_matches('/'));
    if sub.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
        bail!("--cgroup {} leads out of the container's cgroup", sub.display());
    }
    Ok(cgroup.join(sub))
}

/// Directory for the sockets of one exec, gone when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(container: &Container) -> Result<Self> {
        let dir = container.root.join(format!("exec-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(err) = fs::remove_dir_all(&self.0) {
            tracing::warn!(%err, dir = %self.0.display(), "cannot remove");
        }
    }
}
