//! `checkpoint` and `restore` with runc's flags.

use std::fs;
use std::io::IoSlice;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use dunlin_checkpoint::image::{FILE_NAME, FileSink, ImageSink};
use serde_json::{Value, json};

use crate::bundle::{Bundle, needs_root, until};

/// A checkpoint directory with these records.
fn image(bundle: &Bundle, records: &[(u16, &[u8])]) {
    let dir = bundle.path("image");
    let mut sink = FileSink::create(&dir).unwrap();
    for (kind, body) in records {
        sink.put(*kind, &[IoSlice::new(body)]).unwrap();
    }
    sink.finish().unwrap();
    let manifest = json!({
        "version": 1, "dunlin": "test", "id": "c", "pre_dump": false, "clocks": null,
        "descriptors": ["", "", ""],
        "options": {
            "tcp": "keep", "file_locks": false, "external_unix": false, "shell_job": false,
        },
    });
    fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
}

fn restore<'a>(bundle: &'a Bundle, image: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["restore", "--bundle", bundle.dir(), "--image-path", image];
    args.extend(more);
    args.push("c");
    args
}

/// Counts in its memory and says how far it is.
const COUNT: &str = "n=0; while :; do n=$((n+1)); echo $n; done";

/// What it said first and last since its stdout was opened.
fn counted(bundle: &Bundle) -> Option<(u64, u64)> {
    let output = bundle.output_of("c");
    let whole = &output[..output.rfind('\n')?];
    let mut lines = whole.lines().map(|line| line.parse().unwrap());
    let first = lines.next()?;
    Some((first, lines.next_back().unwrap_or(first)))
}

fn last(bundle: &Bundle) -> u64 {
    counted(bundle).map_or(0, |(_, last)| last)
}

fn uptime(bundle: &Bundle) -> f64 {
    let text = bundle.ok(&["exec", "c", "cat", "/proc/uptime"]);
    text.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn a_container_goes_on_where_it_was() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", COUNT]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    let path = bundle.path("image");
    let path = path.to_str().unwrap();
    for _ in 0..3 {
        let start = last(&bundle);
        until("it counts", || start + 10 < last(&bundle));
        bundle.ok(&["checkpoint", "--image-path", path, "c"]);
        assert_eq!(bundle.leftovers(), Vec::<String>::new());
        let stopped = last(&bundle);
        bundle.ok(&restore(&bundle, path, &["--detach"]));
        assert_eq!(bundle.state("c")["status"], "running");
        until("it counts on", || stopped < last(&bundle));
        // It says so to its new stdout, leaves nothing out and says nothing twice.
        assert_eq!(counted(&bundle).map(|(first, _)| first), Some(stopped + 1));
        assert_eq!(bundle.ok(&["exec", "c", "cat", "/proc/1/comm"]), "sh\n");
    }
    let taken = bundle.fails(&restore(&bundle, path, &["--detach"]));
    assert!(taken.contains("container c already exists"), "{taken}");
    bundle.ok(&["kill", "c", "KILL"]);
    until("it ends", || bundle.state("c")["status"] == "stopped");
}

#[test]
fn what_exec_left_running_moves_too() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", COUNT]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    let path = bundle.path("image");
    let path = path.to_str().unwrap();
    let quiet = "</dev/null >/dev/null 2>&1";
    // Its session is led by a shell that has ended.
    let orphan = bundle.ok(&["exec", "c", "sh", "-c", &format!("sleep 600 {quiet} & echo $!")]);
    for _ in 0..2 {
        bundle.ok(&["checkpoint", "--image-path", path, "c"]);
        bundle.ok(&restore(&bundle, path, &["--detach"]));
        let stat = format!("/proc/{}/stat", orphan.trim());
        let stat = bundle.ok(&["exec", "c", "cat", &stat]);
        assert!(stat.contains("(sleep) S 1 "), "{stat}");
    }
}

#[test]
fn callers_find_a_log_in_the_work_directory() {
    if needs_root() {
        return;
    }
    let config = tempfile::NamedTempFile::new().unwrap();
    fs::write(config.path(), "tcp-close\nlog-file=own.log\n").unwrap();
    for (annotations, names) in [
        (json!({}), ["dump.log", "restore.log"]),
        (json!({ "org.criu.config": config.path() }), ["own.log", "own.log"]),
    ] {
        let bundle = Bundle::with(&["sh", "-c", COUNT], |spec| spec["annotations"] = annotations);
        bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
        let (image, work) = (bundle.path("image"), bundle.path("work"));
        let (image, work) = (image.to_str().unwrap(), work.to_str().unwrap());
        let flags = ["--image-path", image, "--work-path", work, "c"];
        let read = |name: &str| -> Value {
            let path = bundle.path("work").join(name);
            let log = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            fs::remove_file(path).unwrap();
            log
        };
        bundle.ok(&[&["checkpoint"], flags.as_slice()].concat());
        assert_eq!(read(names[0])["report"]["processes"], 1);
        bundle.ok(&restore(&bundle, image, &["--detach", "--work-path", work]));
        assert_eq!(read(names[1])["report"]["processes"], 1);
        bundle.fails(&restore(&bundle, image, &["--work-path", work]));
        let error = read(names[1])["error"].to_string();
        assert!(error.contains("already exists"), "{error}");
    }
}

#[test]
fn an_image_can_be_restored_beside_the_original() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", COUNT]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    until("it counts", || 10 < last(&bundle));
    let path = bundle.path("image");
    let path = path.to_str().unwrap();
    // Often, because nothing of one may stay and be in the way of the next.
    for _ in 0..20 {
        bundle.ok(&["checkpoint", "--leave-running", "--image-path", path, "c"]);
    }
    let then = last(&bundle);
    until("it counts on", || then < last(&bundle));
    for _ in 0..2 {
        let other = Bundle::new(&["false"]);
        other.ok(&restore(&other, path, &["--detach"]));
        until("the copy counts", || counted(&other).is_some());
        assert!(10 < counted(&other).unwrap().0, "it began anew");
    }
}

#[test]
fn a_user_namespace_moves_with_its_ids() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::with(&["sh", "-c", COUNT], |spec| {
        let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "user" }));
        spec["process"]["user"] = json!({ "uid": 7, "gid": 8, "additionalGids": [9] });
    });
    fs::set_permissions(bundle.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut own = Command::new("chown");
    let own = own.args(["-R", "100000:100000"]).arg(bundle.path("rootfs")).status().unwrap();
    assert!(own.success());
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    let ids = || bundle.ok(&["exec", "c", "grep", "-E", "^([UG]id|Groups|Cap)", "/proc/1/status"]);
    until("it counts", || 10 < last(&bundle));
    let before = ids();
    assert!(before.contains("Uid:\t7\t7\t7\t7\nGid:\t8\t8\t8\t8\nGroups:\t9"), "{before}");
    let path = bundle.path("image");
    let path = path.to_str().unwrap();
    bundle.ok(&["checkpoint", "--image-path", path, "c"]);
    bundle.ok(&restore(&bundle, path, &["--detach"]));
    until("it counts on", || counted(&bundle).is_some());
    assert_eq!(ids(), before);
}

#[test]
fn a_tree_that_forks_without_pause_moves() {
    if needs_root() {
        return;
    }
    let program = "echo up; while :; do /bin/true; /bin/true & wait; done";
    let bundle = Bundle::new(&["sh", "-c", program]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    until("it runs", || bundle.output_of("c") == "up\n");
    let path = bundle.path("image");
    let path = path.to_str().unwrap();
    for _ in 0..20 {
        bundle.ok(&["checkpoint", "--leave-running", "--image-path", path, "c"]);
    }
    for _ in 0..5 {
        bundle.ok(&["checkpoint", "--image-path", path, "c"]);
        bundle.ok(&restore(&bundle, path, &["--detach"]));
    }
}

#[test]
fn killed_checkpoints_are_not_in_the_way_of_the_next() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", COUNT]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    let path = bundle.path("image");
    let path = path.to_str().unwrap();
    for instant in 0..60 {
        let flags = ["checkpoint", "--leave-running", "--image-path", path, "c"];
        let mut killed = bundle.command(&flags);
        let mut killed = killed.stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(instant % 20));
        killed.kill().unwrap();
        killed.wait().unwrap();
    }
    let before = last(&bundle);
    until("it counts on", || before + 10 < last(&bundle));
    bundle.ok(&["checkpoint", "--leave-running", "--image-path", path, "c"]);
}

#[test]
fn a_pre_dump_judges_and_the_dump_after_it_is_whole() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", COUNT]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    until("it counts", || 10 < last(&bundle));
    let (first, second) = (bundle.path("first"), bundle.path("second"));
    let (first, second) = (first.to_str().unwrap(), second.to_str().unwrap());
    bundle.ok(&["checkpoint", "--pre-dump", "--image-path", first, "c"]);
    assert_eq!(bundle.state("c")["status"], "running");
    fs::create_dir(second).unwrap();
    bundle.ok(&["checkpoint", "--parent-path", "../first", "--image-path", second, "c"]);
    let link = fs::read_link(bundle.path("second/parent")).unwrap();
    assert_eq!(link.to_str(), Some("../first"));
    let rehearsal = bundle.fails(&restore(&bundle, first, &[]));
    assert!(rehearsal.contains("pre-dump"), "{rehearsal}");
    fs::remove_dir_all(first).unwrap();
    bundle.ok(&restore(&bundle, second, &["--detach"]));
    assert_eq!(bundle.state("c")["status"], "running");
}

#[test]
fn clocks_go_on() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", COUNT]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    let dir = bundle.path("image");
    let path = dir.to_str().unwrap();
    let before = uptime(&bundle);
    bundle.ok(&["checkpoint", "--image-path", path, "c"]);
    let file = dir.join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    for clock in ["monotonic_ns", "boottime_ns"] {
        let time = manifest["clocks"][clock].as_i64().unwrap();
        manifest["clocks"][clock] = json!(time + 1_000_000_000_000);
    }
    fs::write(&file, manifest.to_string()).unwrap();
    bundle.ok(&restore(&bundle, path, &["--detach"]));
    let after = uptime(&bundle);
    assert!((before + 1000.0..before + 1100.0).contains(&after), "{before} {after}");
}

#[test]
fn restore_in_the_foreground_gives_the_exit_code() {
    if needs_root() {
        return;
    }
    let program = "while [ ! -e /tmp/end ]; do echo > /tmp/up; done; exit 42";
    let bundle = Bundle::new(&["sh", "-c", program]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    until("it runs", || bundle.path("rootfs/tmp/up").exists());
    let path = bundle.path("image");
    let path = path.to_str().unwrap();
    bundle.ok(&["checkpoint", "--image-path", path, "c"]);
    fs::write(bundle.path("rootfs/tmp/end"), "").unwrap();
    let run = bundle.run(&restore(&bundle, path, &[]));
    assert_eq!(run.status.code(), Some(42), "{run:?}");
    assert_eq!(bundle.leftovers(), Vec::<String>::new());
}

#[test]
fn callers_find_the_words_they_look_for() {
    let bundle = Bundle::new(&["true"]);
    bundle.ok(&["checkpoint", "--help"]);
    let probe = bundle.fails(&["restore", "--lsm-mount-context"]);
    assert!(probe.contains("flag needs an argument"), "{probe}");
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sleep", "60"]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    for flags in [
        ["--lazy-pages"].as_slice(),
        &["--page-server", "localhost:1"],
        &["--empty-ns", "mount"],
        &["--parent-path", "../nowhere"],
    ] {
        let args = [&["checkpoint"], flags, &["c"]].concat();
        let text = bundle.fails(&args);
        assert!(text.contains(&format!("cannot checkpoint c: {}", flags[0])), "{text}");
        assert!(text.ends_with("c is running; no image was written\n"), "{text}");
    }
    image(&bundle, &[]);
    let path = bundle.path("image");
    let path = path.to_str().unwrap();
    for flags in [
        ["--lazy-pages"].as_slice(),
        &["--lsm-profile", "apparmor:x"],
        &["--lsm-mount-context", "x"],
        &["--empty-ns", "mount"],
        &["--tcp-close"],
    ] {
        let text = bundle.fails(&restore(&bundle, path, flags));
        assert!(text.contains(&format!("cannot restore c: {}", flags[0])), "{text}");
        assert!(text.contains("nothing was created"), "{text}");
    }
    assert_eq!(bundle.state("c")["status"], "running");
}

#[test]
fn only_what_runs_can_be_checkpointed() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sleep", "60"]);
    let text = bundle.fails(&["checkpoint", "c"]);
    assert_eq!(text, "error: container c does not exist\n");
    bundle.ok(&["create", "--bundle", bundle.dir(), "c"]);
    let text = bundle.fails(&["checkpoint", "c"]);
    assert_eq!(
        text,
        "error: cannot checkpoint c: it is created, not running\nc is created as before\n"
    );
    bundle.ok(&["start", "c"]);
    bundle.ok(&["pause", "c"]);
    let text = bundle.fails(&["checkpoint", "c"]);
    assert_eq!(
        text,
        "error: cannot checkpoint c: it is paused; resume it first\nc is paused as before\n"
    );
}

#[test]
fn a_bad_image_leaves_nothing_behind() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sleep", "60"]);
    let dir = bundle.path("image");
    let path = dir.to_str().unwrap();
    let refused = |what: &str| {
        let pid_file = bundle.path("pid");
        let flags = ["--detach", "--pid-file", pid_file.to_str().unwrap()];
        let text = bundle.fails(&restore(&bundle, path, &flags));
        assert!(text.starts_with("error: cannot restore c: "), "{what}: {text}");
        assert_eq!(bundle.leftovers(), Vec::<String>::new(), "{what}");
        assert!(!pid_file.exists(), "{what}");
    };
    refused("no image");
    image(&bundle, &[]);
    refused("no records");
    image(&bundle, &[(u16::MAX, b"?")]);
    refused("an unknown record");
    let file = dir.join(FILE_NAME);
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    refused("cut short");
    let mut altered = bytes.clone();
    altered[0] ^= 1;
    fs::write(&file, altered).unwrap();
    refused("altered");
    image(&bundle, &[]);
    let manifest = dir.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"version\":1", "\"version\":2")).unwrap();
    refused("a later version");
}
