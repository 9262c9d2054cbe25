//! A bundle with busybox in it, and `dunlin` with a state directory of its own.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "only tests use it"
)]

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Programs of busybox that the tests call by name.
const APPLETS: [&str; 16] = [
    "cat", "echo", "false", "grep", "hostname", "id", "ip", "kill", "ls", "mkdir", "mount", "sh",
    "sleep", "stty", "true", "tty",
];

/// Says so when we are not root.
pub(crate) fn needs_root() -> bool {
    let lacking = !nix::unistd::geteuid().is_root();
    if lacking {
        println!("skipped: needs root");
    }
    lacking
}

/// Waits until `condition` holds; panics when it does not within 20 s.
pub(crate) fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) struct Bundle {
    dir: TempDir,
}

impl Bundle {
    /// A container that runs `args`.
    pub(crate) fn new(args: &[&str]) -> Self {
        Self::with(args, |_| {})
    }

    /// The same with a changed specification.
    pub(crate) fn with(args: &[&str], change: impl FnOnce(&mut Value)) -> Self {
        let bundle = Self { dir: tempfile::tempdir().unwrap() };
        let rootfs = bundle.path("rootfs");
        for dir in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(dir)).unwrap();
        }
        fs::copy(busybox(), rootfs.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        bundle.ok(&["spec", "--bundle", bundle.dir()]);
        let config = bundle.path("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        spec["process"]["args"] = json!(args);
        spec["process"]["terminal"] = json!(false);
        spec["root"]["readonly"] = json!(false);
        let name = bundle.dir.path().file_name().unwrap().to_str().unwrap();
        spec["linux"]["cgroupsPath"] = json!(format!("/dunlin-test-{name}"));
        change(&mut spec);
        fs::write(&config, spec.to_string()).unwrap();
        bundle
    }

    pub(crate) fn dir(&self) -> &str {
        self.dir.path().to_str().unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `dunlin` with our state directory, without stdin.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dunlin"));
        command.arg("--root").arg(self.path("state")).args(args).stdin(Stdio::null());
        command
    }

    /// Runs it and returns what it gave.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs it, wants success and returns its stdout.
    ///
    /// A container that it leaves behind writes to [`Self::output_of`].
    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let stays = args[0] == "create" || args.contains(&"--detach");
        let mut command = self.command(args);
        let stderr = self.path("stderr");
        if stays {
            let id = args.last().unwrap();
            command.stdout(self.output_file(id));
        } else {
            command.stdout(Stdio::piped());
        }
        let child = command.stderr(File::create(&stderr).unwrap()).spawn().unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = fs::read_to_string(stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs it, wants exit code 1 and returns its stderr.
    #[track_caller]
    pub(crate) fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    #[track_caller]
    pub(crate) fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.ok(&["state", id])).unwrap()
    }

    /// Where a container's stdout goes.
    pub(crate) fn output_file(&self, id: &str) -> File {
        File::create(self.path(&format!("{id}.out"))).unwrap()
    }

    /// What a container wrote so far.
    pub(crate) fn output_of(&self, id: &str) -> String {
        fs::read_to_string(self.path(&format!("{id}.out"))).unwrap_or_default()
    }

    /// Everything that is still there of our containers: state and cgroups.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let name = |entry: fs::DirEntry| entry.path().display().to_string();
        let state = fs::read_dir(self.path("state")).unwrap().map(|entry| name(entry.unwrap()));
        let mounts: Vec<String> = fs::read_to_string("/proc/mounts")
            .unwrap()
            .lines()
            .filter(|line| line.contains(self.dir()))
            .map(str::to_owned)
            .collect();
        state.chain(self.cgroups()).chain(mounts).collect()
    }

    fn cgroups(&self) -> Vec<String> {
        let config: Value =
            serde_json::from_slice(&fs::read(self.path("config.json")).unwrap()).unwrap();
        let Some(cgroup) = config["linux"]["cgroupsPath"].as_str() else { return Vec::new() };
        let hierarchies = fs::read_dir("/sys/fs/cgroup").unwrap();
        let path = |dir: &Path| dir.join(cgroup.trim_start_matches('/'));
        hierarchies
            .map(|entry| path(&entry.unwrap().path()))
            .chain([path(Path::new("/sys/fs/cgroup"))])
            .filter(|dir| dir.exists())
            .map(|dir| dir.display().to_string())
            .collect()
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let list = self.run(&["list", "--quiet"]);
        for id in String::from_utf8_lossy(&list.stdout).lines() {
            let delete = self.run(&["delete", "--force", id]);
            if !delete.status.success() {
                println!("cannot delete {id}: {}", String::from_utf8_lossy(&delete.stderr));
            }
        }
    }
}

/// The static busybox of the distribution.
fn busybox() -> PathBuf {
    ["/bin/busybox", "/usr/bin/busybox"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.exists())
        .expect("busybox-static is installed")
}
