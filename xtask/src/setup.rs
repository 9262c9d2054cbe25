//! What a fresh Debian machine lacks, installed by apt.

use std::{
    ffi::OsString,
    fmt::Display,
    fs,
    io::{self, Write},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::root;

/// Packages that the build needs.
pub(crate) const BUILD: &[&str] = &["gcc", "libc6-dev", "libseccomp-dev", "pkg-config"];

/// Packages that the demo needs on top.
///
/// `redis-tools` holds the server's program too (under the name
/// `redis-check-rdb`); unlike `redis-server` it installs no service.
pub(crate) const DEMO: &[&str] = &["busybox-static", "iproute2", "redis-tools", "util-linux"];

/// Packages that the tests need on top.
///
/// podman asks CRIU for its version before it lets a runtime checkpoint; nothing
/// of ours runs it.
pub(crate) const TEST: &[&str] = &[
    "criu",
    "curl",
    "nftables",
    "nginx-light",
    "nodejs",
    "openjdk-17-jdk-headless",
    "podman",
    "postgresql",
    "procps",
    "python3",
    "runc",
];

/// Installs those of `packages` that are missing.
pub(crate) fn install(packages: &[&[&str]]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .flat_map(|list| *list)
        .copied()
        .filter(|name| !is_installed(name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing {}", missing.join(" "));
    if apt_install(&missing).is_err() {
        // The package lists are missing or older than the mirror.
        apt(&["update"])?;
        apt_install(&missing)?;
    }
    Ok(())
}

fn is_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|out| out.stdout == b"installed")
}

fn apt_install(packages: &[&str]) -> Result<()> {
    let _no_services = NoServices::decree()?;
    apt(&[&["install", "--yes", "--no-install-recommends"], packages].concat())
}

/// While it lives, packages start no services: tests start what they need
/// themselves, where it disturbs nobody.
struct NoServices {
    /// Not where the machine has a policy of its own.
    path: Option<&'static str>,
}

/// Asked by `invoke-rc.d(8)` and systemd's helpers before they start anything.
const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn decree() -> Result<Self> {
        let mut options = fs::OpenOptions::new();
        match options.write(true).create_new(true).mode(0o755).open(POLICY) {
            Ok(mut policy) => {
                policy.write_all(b"#!/bin/sh\nexit 101\n")?;
                Ok(Self { path: Some(POLICY) })
            }
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Ok(Self { path: None }),
            Err(err) => Err(err).context(format!("cannot write {POLICY}")),
        }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(Err(err)) = self.path.map(fs::remove_file) {
            println!("{POLICY} is left: {err}");
        }
    }
}

fn apt(args: &[&str]) -> Result<()> {
    run(Command::new("apt-get")
        .arg("--quiet=2")
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive"))
}

/// This cargo, in the project's root.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(program());
    cargo.current_dir(root());
    cargo
}

fn program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Installs what the demo needs, builds the programs that it runs, and makes
/// sure that this program is a release build, by becoming one.
pub(crate) fn for_speed() -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    install(&[BUILD, DEMO])?;
    run(cargo().args(["build", "--quiet", "--release", "--workspace", "--bins"]))?;
    let own = std::env::current_exe()?;
    let target = own.ancestors().nth(2).context("this program lies in no target directory")?;
    let mut xtask = Command::new(target.join("release/xtask"));
    Err(xtask.args(std::env::args_os().skip(1)).exec()).context("cannot become a release build")
}

/// Runs `command` to its end and wants it to succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let name = describe(command);
    let status =
        command.stdin(Stdio::null()).status().with_context(|| format!("cannot run `{name}`"))?;
    ensure!(status.success(), "`{name}` failed: {status}");
    Ok(())
}

fn describe(command: &Command) -> impl Display + use<> {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
