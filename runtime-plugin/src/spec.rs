//! A bundle's `config.json`, loaded and judged before anything is made from it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::validator::Validator;
use libcontainer::{apparmor, utils};
use nix::unistd::geteuid;
use oci_spec::runtime::{Process, Spec};

use crate::container::Root;

/// Loads the specification of `bundle` and refuses what we cannot run.
///
/// The result has an absolute root path and a cgroup path.
pub(crate) fn load(bundle: &Path, root: &Root, id: &str, systemd: bool) -> Result<Spec> {
    let path = bundle.join("config.json");
    let mut spec = Spec::load(&path).with_context(|| format!("cannot load {}", path.display()))?;
    judge(&spec).with_context(|| format!("{} is not usable", path.display()))?;
    spec.canonicalize_rootfs(bundle).context("cannot find the root filesystem")?;
    if let Some(linux) = spec.linux_mut()
        && linux.cgroups_path().is_none()
    {
        linux.set_cgroups_path(Some(default_cgroup(root, id, systemd)));
    }
    Ok(spec)
}

/// The process of a specification that [`load`] accepted.
pub(crate) fn process(spec: &Spec) -> Result<&Process> {
    spec.process().as_ref().context("the specification has no process")
}

/// Whether the process wants a terminal.
pub(crate) fn has_terminal(process: &Process) -> bool {
    process.terminal().unwrap_or(false)
}

/// Refuses a terminal that nobody takes and a taker without a terminal.
pub(crate) fn check_terminal(process: &Process, console_socket: Option<&Path>) -> Result<()> {
    match (has_terminal(process), console_socket) {
        (true, None) => bail!("a process with a terminal needs --console-socket"),
        (false, Some(_)) => bail!("--console-socket is given but the process has no terminal"),
        _ => Ok(()),
    }
}

fn judge(spec: &Spec) -> Result<()> {
    if !spec.version().starts_with("1.") {
        bail!("runtime specification {} is not 1.x", spec.version());
    }
    Validator::validate_spec(spec)?;
    let process = process(spec)?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        bail!("process.args is empty");
    }
    if process.apparmor_profile().is_some() && !apparmor::is_enabled()? {
        bail!("process.apparmorProfile is set but this host has no AppArmor");
    }
    if process.selinux_label().is_some() && Path::new("/sys/fs/selinux/enforce").exists() {
        bail!("process.selinuxLabel is set but dunlin does not support SELinux");
    }
    for mount in spec.mounts().iter().flatten() {
        let idmap = |option: &String| option == "idmap" || option == "ridmap";
        if mount.uid_mappings().is_some()
            || mount.gid_mappings().is_some()
            || mount.options().iter().flatten().any(idmap)
        {
            bail!("mount {} is id-mapped, which is not supported", mount.destination().display());
        }
    }
    utils::validate_mount_options(spec.mounts().as_deref().unwrap_or_default())?;
    let syscall = create_syscall();
    utils::validate_spec_for_new_user_ns(spec, &*syscall)?;
    utils::validate_spec_for_net_devices(spec, &*syscall)?;
    Ok(())
}

/// The cgroup of a container whose specification names none.
///
/// Containers of one id under different roots must not share it: deleting one
/// would kill the other.
fn default_cgroup(root: &Root, id: &str, systemd: bool) -> PathBuf {
    if systemd || !geteuid().is_root() {
        return format!(":dunlin:{id}").into();
    }
    if root.is_default() {
        return format!("/dunlin-{id}").into();
    }
    let mut hasher = DefaultHasher::new();
    root.path().hash(&mut hasher);
    format!("/dunlin-{:08x}-{id}", hasher.finish() >> 32).into()
}
