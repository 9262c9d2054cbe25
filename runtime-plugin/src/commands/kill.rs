//! `kill` and `delete`.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use libcgroups::common::{CgroupConfig, CgroupManager, create_cgroup_manager};
use libcontainer::config::YoukiConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::signal::Signal;
use liboci_cli::{Delete, Kill};
use nix::sys::signal;
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, pidfd_open};

use crate::container::{Record, Root, start_time};
use crate::network;

/// How long `delete` waits for an init that may be ending.
const GRACE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// How long a killed init may stay a zombie: its parent may be slow.
const COLLECTED: Duration = Duration::from_secs(2);

/// Sends a signal to init or to every process of a container.
pub(crate) fn kill(root: &Root, args: &Kill) -> Result<u8> {
    let mut container = root.load(&args.container_id)?;
    let before = container.status();
    if before == ContainerStatus::Stopped && !args.all {
        // containerd and podman know these words.
        bail!("cannot kill {}: container not running", args.container_id);
    }
    if args.signal == "0" {
        return probe(&container);
    }
    let signal = Signal::try_from(args.signal.as_str())?;
    container
        .kill(signal, args.all)
        .with_context(|| format!("cannot kill {}", args.container_id))?;
    // libcontainer notes any signal as the end; whether it was one is seen at
    // the next load.
    container.set_status(before).save()?;
    Ok(0)
}

/// Removes a container and all that was made for it.
pub(crate) fn delete(root: &Root, args: &Delete) -> Result<u8> {
    let id = &args.container_id;
    if args.force && !root.dir(id)?.exists() {
        return Ok(0);
    }
    match root.load(id) {
        Ok(container) => remove(container, args.force)?,
        Err(err) if args.force => {
            tracing::warn!("clearing what is left of a broken container: {err:#}");
            clear(&root.dir(id)?)?;
        }
        Err(err) => return Err(err),
    }
    Ok(0)
}

/// Removes a container whose state cannot be read: its writer was killed.
fn clear(dir: &Path) -> Result<()> {
    if let Ok(config) = YoukiConfig::load(dir) {
        let cgroup = CgroupConfig {
            cgroup_path: config.cgroup_path,
            systemd_cgroup: false,
            container_name: String::new(),
        };
        // Ends what still runs in it.
        create_cgroup_manager(cgroup)?.remove().context("cannot remove the cgroup")?;
    }
    network::detach(&network::veth_name(dir))?;
    fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}

/// Removes a loaded container; one that runs only by `force`.
pub(crate) fn remove(mut container: Container, force: bool) -> Result<()> {
    let id = container.id().to_owned();
    if container.status() == ContainerStatus::Running && !force {
        await_end(&container)?;
    }
    let veth = Record::load(&container)?.and_then(|record| record.veth);
    container.delete(force).with_context(|| format!("cannot delete {id}"))?;
    veth.map_or(Ok(()), |veth| network::detach(&veth))
}

/// Gives an init that has just been killed, or is about to exit, the time to.
fn await_end(container: &Container) -> Result<()> {
    let pid = container.pid().map(Pid::as_raw).and_then(rustix::process::Pid::from_raw);
    let pid = pid.context("the container has no init")?;
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(()),
        Err(err) => return Err(err).context("cannot open init"),
    };
    let ends = &mut [PollFd::new(&pidfd, PollFlags::IN)];
    poll(ends, Some(&GRACE)).context("cannot wait for init")?;
    Ok(())
}

/// Gives whoever is the parent of an init that was killed the time to collect
/// it, so that callers find its pid gone: the kernel tells nobody else of that.
pub(crate) fn await_reaped(container: &Container) {
    let started = Instant::now();
    while container.pid().and_then(start_time).is_some() && started.elapsed() < COLLECTED {
        thread::sleep(Duration::from_millis(1));
    }
}

/// Signal 0: only asks whether init is there.
fn probe(container: &Container) -> Result<u8> {
    let pid = container.pid().context("the container has no init")?;
    signal::kill(pid, None).with_context(|| format!("cannot reach pid {pid}"))?;
    Ok(0)
}
