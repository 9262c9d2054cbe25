//! podman with `--runtime dunlin`, where podman is installed.

use std::process::{Command, Stdio};

use crate::bundle::{Bundle, needs_root, until};

/// Runs podman with a store of its own; wants success and returns its stdout.
#[track_caller]
fn podman(bundle: &Bundle, args: &[&str]) -> String {
    let output = command(bundle, args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn command(bundle: &Bundle, args: &[&str]) -> Command {
    let mut command = Command::new("podman");
    command.arg("--root").arg(bundle.path("store")).arg("--runroot").arg(bundle.path("run"));
    command.args(["--cgroup-manager=cgroupfs", "--storage-driver=vfs", "--events-backend=none"]);
    command.args(["--runtime", env!("CARGO_BIN_EXE_dunlin")]).args(args).stdin(Stdio::null());
    command
}

/// Removes the container whatever becomes of the test.
struct Removed<'b>(&'b Bundle);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        let removed = command(self.0, &["rm", "--force", "--time=0", "c"]).output().unwrap();
        println!("podman rm: {removed:?}");
    }
}

#[test]
fn podman_runs_checkpoints_and_restores() {
    if needs_root() {
        return;
    }
    if Command::new("podman").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped: needs podman");
        return;
    }
    let bundle = Bundle::new(&["true"]);
    let rootfs = bundle.path("rootfs");
    // podman asks for more open files than a root without CAP_SYS_RESOURCE may.
    let limits = ["--ulimit=nofile=512:512", "--ulimit=nproc=512:512", "--network=none"];
    let program = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done";
    let run = [["run", "--detach", "--name=c"].as_slice(), &limits, &["--rootfs"]].concat();
    let run = [run.as_slice(), &[rootfs.to_str().unwrap(), "sh", "-c", program]].concat();
    let _removed = Removed(&bundle);
    podman(&bundle, &run);
    let logs = || podman(&bundle, &["logs", "c"]);
    until("it counts", || 10 < logs().lines().count());
    assert_eq!(podman(&bundle, &["exec", "c", "cat", "/proc/1/comm"]), "sh\n");

    podman(&bundle, &["container", "checkpoint", "c"]);
    let before = logs().lines().count();
    podman(&bundle, &["container", "restore", "c"]);
    until("it counts on", || before + 10 < logs().lines().count());
    let counted: Vec<usize> = logs().lines().map(|line| line.parse().unwrap()).collect();
    let expected: Vec<usize> = (1..=counted.len()).collect();
    assert_eq!(counted, expected, "every line once and in order");
}
