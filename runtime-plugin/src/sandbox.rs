//! Where a container is restored: its namespaces, cgroup and mounts, made from
//! this host's own specification, with an init that is no program yet.
//!
//! What would narrow the tree before it is built (seccomp, capabilities, user,
//! security profile) is left out here and put back per task from the image.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use dunlin_checkpoint::skeleton;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::hooks::run_hooks;
use libcontainer::notify_socket::{NOTIFY_FILE, NotifySocket};
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::fcntl::OFlag;
use nix::sys::prctl;
use nix::unistd::{Pid, pipe2};
use oci_spec::runtime::{LinuxNamespaceBuilder, LinuxNamespaceType, Spec, UserBuilder};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::clocks::{Clocks, can_shift};
use crate::commands::kill;
use crate::create::{Created, Creation};
use crate::network::Muted;

/// A container whose init is a skeleton: dropping this deletes it.
#[must_use = "dropping it deletes the container"]
pub(crate) struct Sandbox {
    container: Option<Container>,
    init: Pid,
    pid_file: Option<PathBuf>,
    network: Option<Muted>,
}

impl Sandbox {
    /// Makes it; `clocks` is what the container's clocks are to show.
    ///
    /// The executor of `creation` is replaced, and its network cut off until
    /// [`Sandbox::unmute`].
    pub(crate) fn make(mut creation: Creation<'_>, clocks: Option<Clocks>) -> Result<Self> {
        widen(&mut creation.spec)?;
        if let Some(clocks) = clocks {
            shift(&mut creation.spec, clocks)?;
        }
        let (status, report) = pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
        creation.executor = Box::new(Skeleton { report: Arc::new(File::from(report)) });
        let pid_file = creation.pid_file.map(ToOwned::to_owned);
        creation.muted = true;
        let Created { container, muted } = creation.create()?;
        let init = container.pid().context("the container has no init")?;
        let sandbox = Self { container: Some(container), init, pid_file, network: muted };
        sandbox.start_skeleton(status)?;
        Ok(sandbox)
    }

    /// The pid of init in our pid namespace.
    pub(crate) fn init(&self) -> Pid {
        self.init
    }

    /// Init's stdin, stdout and stderr: what we were given ourselves, or the
    /// container's new terminal.
    pub(crate) fn stdio(&self) -> Result<[OwnedFd; 3]> {
        let pid = rustix::process::Pid::from_raw(self.init.as_raw()).context("init has no pid")?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("cannot open init")?;
        let take = |fd| {
            pidfd_getfd(pidfd.as_fd(), fd, PidfdGetfdFlags::empty())
                .with_context(|| format!("cannot take fd {fd} of init"))
        };
        Ok([take(0)?, take(1)?, take(2)?])
    }

    /// Calls it running, just before it may: if this process is killed then,
    /// the shim knows by init's life whether it ran.
    pub(crate) fn arm(&mut self) -> Result<()> {
        let container = self.container.as_mut().context("the sandbox was given up")?;
        Ok(container.set_status(ContainerStatus::Running).save()?)
    }

    /// Connects the container's network, the last step before its tree runs.
    pub(crate) fn unmute(&mut self) -> Result<()> {
        self.network.as_mut().map_or(Ok(()), Muted::unmute)
    }

    /// The container's program runs again: says so to whoever asks, and to the
    /// poststart hooks, which cannot change that.
    pub(crate) fn commit(mut self) -> Result<Container> {
        let mut container = self.container.take().context("the sandbox was given up")?;
        if let Some(network) = self.network.take()
            && let Err(err) = network.settle()
        {
            tracing::warn!("{err:#}");
        }
        container.set_status(ContainerStatus::Running).save()?;
        let hooks = container.spec()?.hooks;
        let poststart = hooks.as_ref().and_then(|hooks| hooks.poststart().as_ref());
        let (state, dir) = (Some(&container.state), Some(container.root.as_path()));
        if let Err(err) = run_hooks(poststart, state, dir, None, None) {
            tracing::warn!(%err, "a poststart hook failed");
        }
        Ok(container)
    }

    /// Lets init become a skeleton; the state stays `created`.
    fn start_skeleton(&self, status: OwnedFd) -> Result<()> {
        let container = self.container.as_ref().context("the sandbox was given up")?;
        NotifySocket::new(container.root.join(NOTIFY_FILE)).notify_container_start()?;
        // Ends without a word when the exec closes the other end.
        let mut text = String::new();
        File::from(status).read_to_string(&mut text).context("cannot hear from init")?;
        if !text.is_empty() {
            bail!("init did not become a skeleton: {text}");
        }
        Ok(())
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let Some(container) = self.container.take() else { return };
        if let Err(err) = kill::remove(container, true) {
            tracing::error!("cannot clear a sandbox: {err:#}");
        }
        if let Some(pid_file) = &self.pid_file
            && let Err(err) = fs::remove_file(pid_file)
            && err.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%err, pid_file = %pid_file.display(), "cannot remove the pid file");
        }
    }
}

/// Takes out of a specification what a tree under construction must not have.
fn widen(spec: &mut Spec) -> Result<()> {
    let process = spec.process_mut().as_mut().context("the specification has no process")?;
    process
        .set_user(UserBuilder::default().uid(0_u32).gid(0_u32).build()?)
        .set_capabilities(None)
        .set_no_new_privileges(None)
        .set_apparmor_profile(None)
        .set_selinux_label(None)
        .set_scheduler(None)
        .set_io_priority(None)
        .set_args(Some(vec!["skeleton".into()]));
    let linux = spec.linux_mut().as_mut().context("the specification has no linux section")?;
    linux.set_seccomp(None);
    // It belongs in front of a program that starts; this one already runs.
    if let Some(hooks) = spec.hooks_mut() {
        hooks.set_start_container(None);
    }
    Ok(())
}

/// Asks for a time namespace that shows `clocks`, where the kernel has one.
fn shift(spec: &mut Spec, clocks: Clocks) -> Result<()> {
    if !can_shift() {
        tracing::warn!("this kernel has no time namespaces: the container's clocks will jump");
        return Ok(());
    }
    let linux = spec.linux_mut().as_mut().context("the specification has no linux section")?;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Time);
    namespaces.push(LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Time).build()?);
    linux.set_namespaces(Some(namespaces)).set_time_offsets(Some(clocks.offsets()?.to_spec()?));
    Ok(())
}

/// Becomes the engine's skeleton instead of a program.
#[derive(Clone)]
struct Skeleton {
    report: Arc<File>,
}

impl Executor for Skeleton {
    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        // libcontainer cleared it, and the engine could not seize us.
        let err = match prctl::set_dumpable(true) {
            Ok(()) => skeleton::exec(),
            Err(err) => err.into(),
        };
        if let Err(err) = write!(&*self.report, "{err}") {
            tracing::error!(%err, "cannot report");
        }
        Err(ExecutorError::Execution(err.into()))
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }
}
