//! Commands of the OCI command line.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use serde_json::json;

use crate::bundle::{Bundle, needs_root, until};

/// A program that runs until it is told to end, with exit code 7.
const LOOP: &str = "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done";

#[test]
fn lifecycle() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", LOOP]);
    let pid_file = bundle.path("pid");
    bundle.ok(&["create", "--bundle", bundle.dir(), "--pid-file", pid_file.to_str().unwrap(), "c"]);
    let state = bundle.state("c");
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], "c");
    assert_eq!(state["bundle"], bundle.dir());
    assert_eq!(state["pid"].to_string(), fs::read_to_string(pid_file).unwrap());
    assert_eq!(bundle.output_of("c"), "", "nothing of the program ran before start");

    bundle.ok(&["start", "c"]);
    until("the program runs", || bundle.output_of("c") == "up\n");
    assert_eq!(bundle.state("c")["status"], "running");

    let again = bundle.fails(&["start", "c"]);
    assert!(again.contains("cannot start c: it is running"), "{again}");
    let early = bundle.fails(&["delete", "c"]);
    assert!(early.contains("cannot delete c"), "{early}");

    bundle.ok(&["kill", "c", "0"]);
    bundle.ok(&["kill", "c", "TERM"]);
    until("it ends", || bundle.state("c")["status"] == "stopped");
    let late = bundle.fails(&["kill", "c", "TERM"]);
    assert!(late.contains("container not running"), "{late}");
    bundle.ok(&["delete", "c"]);
    let gone = bundle.fails(&["state", "c"]);
    assert!(gone.contains("container c does not exist"), "{gone}");
    assert_eq!(bundle.leftovers(), Vec::<String>::new());
}

#[test]
fn run_gives_the_exit_code_and_leaves_nothing() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", "exit 42"]);
    let run = bundle.run(&["run", "--bundle", bundle.dir(), "c"]);
    assert_eq!(run.status.code(), Some(42));
    assert_eq!(bundle.leftovers(), Vec::<String>::new());

    let bundle = Bundle::new(&["sh", "-c", "kill -KILL $$; sleep 60"]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    assert_eq!(bundle.state("c")["status"], "running", "pid 1 is immune to its own signals");
    bundle.ok(&["kill", "c", "KILL"]);
}

#[test]
fn delete_by_force_needs_no_readable_state() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", LOOP]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    let pid = bundle.state("c")["pid"].to_string();
    // As a runtime leaves it that is killed while it writes.
    fs::write(bundle.path("state/c/state.json"), "").unwrap();
    let unreadable = bundle.fails(&["delete", "c"]);
    assert!(unreadable.contains("cannot read the state"), "{unreadable}");
    bundle.ok(&["delete", "--force", "c"]);
    assert_eq!(bundle.leftovers(), Vec::<String>::new());
    let gone = || fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().is_empty();
    until("init has ended", gone);
}

#[test]
fn run_passes_signals_on() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", LOOP]);
    let mut run = bundle.command(&["run", "--bundle", bundle.dir(), "c"]);
    let mut run = run.stdout(bundle.output_file("c")).spawn().unwrap();
    until("the program runs", || bundle.output_of("c") == "up\n");
    let pid = nix::unistd::Pid::from_raw(run.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(7));
    assert_eq!(bundle.leftovers(), Vec::<String>::new());
}

#[test]
fn exec_joins_the_container() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", LOOP]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    let text = bundle.ok(&[
        "exec",
        "--env",
        "A=b",
        "--cwd",
        "/tmp",
        "c",
        "sh",
        "-c",
        "echo $A $PWD; cat /proc/1/comm",
    ]);
    assert_eq!(text, "b /tmp\nsh\n");
    let ids = bundle.ok(&["exec", "--user", "12:34", "c", "id"]);
    assert!(ids.starts_with("uid=12 gid=34"), "{ids}");
    let code = bundle.run(&["exec", "c", "sh", "-c", "exit 9"]);
    assert_eq!(code.status.code(), Some(9));
    let signalled = bundle.run(&["exec", "c", "sh", "-c", "kill -KILL $$"]);
    assert_eq!(signalled.status.code(), Some(137));

    let missing = bundle.run(&["exec", "c", "no-such-program"]);
    assert_eq!(missing.status.code(), Some(255));
    let text = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(text.contains("executable file not found in $PATH"), "{text}");
    let label = bundle.run(&["exec", "--process-label", "x", "c", "true"]);
    assert_eq!(label.status.code(), Some(255), "a label that is not applied is refused");

    // A failed exec must not keep the container from ending.
    bundle.ok(&["kill", "c", "TERM"]);
    until("it ends", || bundle.state("c")["status"] == "stopped");
}

#[test]
fn exec_takes_a_process_file() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", LOOP]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    let process = json!({
        "user": { "uid": 5, "gid": 6 }, "cwd": "/", "env": ["PATH=/bin"], "args": ["id"],
    });
    let file = bundle.path("process.json");
    fs::write(&file, process.to_string()).unwrap();
    let ids = bundle.ok(&["exec", "--process", file.to_str().unwrap(), "c"]);
    assert!(ids.starts_with("uid=5 gid=6"), "{ids}");
}

#[test]
fn programs_find_sigpipe_at_its_default() {
    if needs_root() {
        return;
    }
    let show = "grep SigIgn /proc/self/status";
    let bundle = Bundle::new(&["sh", "-c", &format!("{show}; {LOOP}")]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    until("the program runs", || bundle.output_of("c").ends_with("up\n"));
    for text in [bundle.output_of("c"), bundle.ok(&["exec", "c", "sh", "-c", show])] {
        let mask = text.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
        let mask = u64::from_str_radix(mask, 16).unwrap();
        assert_eq!(mask & (1 << (nix::libc::SIGPIPE - 1)), 0, "{text}");
    }
}

#[test]
fn seccomp_holds_for_init_and_exec() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::with(&["sh", "-c", &format!("mkdir /tmp/init; {LOOP}")], |spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 },
            ],
        });
    });
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    until("the program runs", || bundle.output_of("c").ends_with("up\n"));
    let exec = bundle.run(&["exec", "c", "mkdir", "/tmp/exec"]);
    assert_eq!(exec.status.code(), Some(1), "{exec:?}");
    let mode = bundle.ok(&["exec", "c", "grep", "Seccomp:", "/proc/1/status"]);
    assert_eq!(mode, "Seccomp:\t2\n");
    assert_eq!(bundle.ok(&["exec", "c", "ls", "/tmp"]), "");
}

#[test]
fn pause_stops_and_resume_continues() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", "while :; do echo x; sleep 0.01; done"]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    until("the program runs", || !bundle.output_of("c").is_empty());
    bundle.ok(&["pause", "c"]);
    assert_eq!(bundle.state("c")["status"], "paused");
    let paused = bundle.output_of("c");
    let refused = bundle.run(&["exec", "c", "true"]);
    assert_eq!(refused.status.code(), Some(255), "exec in a paused container would hang");
    assert_eq!(bundle.output_of("c"), paused);
    bundle.ok(&["resume", "c"]);
    assert_eq!(bundle.state("c")["status"], "running");
    until("the program goes on", || paused.len() < bundle.output_of("c").len());
    bundle.ok(&["pause", "c"]);
    bundle.ok(&["delete", "--force", "c"]);
    assert_eq!(bundle.leftovers(), Vec::<String>::new());
}

#[test]
fn ps_list_and_events_show_the_container() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", LOOP]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    let pid = bundle.state("c")["pid"].as_i64().unwrap();
    let pids: Vec<i64> =
        serde_json::from_str(&bundle.ok(&["ps", "--format", "json", "c"])).unwrap();
    assert!(pids.contains(&pid), "{pids:?}");
    assert!(bundle.ok(&["ps", "c"]).contains("while :"));
    assert_eq!(bundle.ok(&["list", "--quiet"]), "c\n");
    assert!(bundle.ok(&["list"]).contains("running"));
    let list: serde_json::Value =
        serde_json::from_str(&bundle.ok(&["list", "--format", "json"])).unwrap();
    assert_eq!(list[0]["pid"], pid);
    let event: serde_json::Value =
        serde_json::from_str(&bundle.ok(&["events", "--stats", "c"])).unwrap();
    assert_eq!(event["type"], "stats");
    assert!(event["data"]["cpu"]["usage"]["total"].as_u64().is_some(), "{event}");
}

#[test]
fn update_changes_a_limit() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", LOOP]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    bundle.ok(&["update", "--pids-limit", "17", "c"]);
    let event: serde_json::Value =
        serde_json::from_str(&bundle.ok(&["events", "--stats", "c"])).unwrap();
    assert_eq!(event["data"]["pids"]["limit"], 17);
    let refused = bundle.fails(&["update", "--l3-cache-schema", "x", "c"]);
    assert!(refused.contains("--l3-cache-schema is not supported"), "{refused}");
}

#[test]
fn failed_create_leaves_nothing() {
    if needs_root() {
        return;
    }
    type Change = fn(&mut serde_json::Value);
    let cases: [(&str, Change); 5] = [
        ("executable file not found", |spec| spec["process"]["args"] = json!(["no-such-program"])),
        ("root filesystem", |spec| spec["root"]["path"] = json!("nowhere")),
        ("hook", |spec| spec["hooks"] = json!({ "createRuntime": [{ "path": "/bin/false" }] })),
        ("no-such-source", |spec| {
            let mount = json!({ "destination": "/x", "type": "bind", "source": "/no-such-source",
                "options": ["bind"] });
            spec["mounts"].as_array_mut().unwrap().push(mount);
        }),
        ("id-mapped", |spec| {
            let mount = json!({ "destination": "/x", "type": "bind", "source": "/tmp",
                "options": ["bind", "idmap"] });
            spec["mounts"].as_array_mut().unwrap().push(mount);
        }),
    ];
    for (reason, change) in cases {
        let bundle = Bundle::with(&["sh", "-c", LOOP], change);
        let pid_file = bundle.path("pid");
        let text = bundle.fails(&[
            "create",
            "--bundle",
            bundle.dir(),
            "--pid-file",
            pid_file.to_str().unwrap(),
            "c",
        ]);
        assert!(text.contains("cannot create c"), "{reason}: {text}");
        assert!(text.to_lowercase().contains(reason), "{reason}: {text}");
        assert!(text.ends_with("nothing was created\n"), "{reason}: {text}");
        assert_eq!(bundle.leftovers(), Vec::<String>::new(), "{reason}");
        assert!(!pid_file.exists(), "{reason}");
    }
}

#[test]
fn an_id_is_taken_once() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", LOOP]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    let taken = bundle.fails(&["create", "--bundle", bundle.dir(), "c"]);
    assert!(taken.contains("container c already exists"), "{taken}");
    assert_eq!(bundle.state("c")["status"], "running", "the first one is untouched");
    let outside = bundle.fails(&["create", "--bundle", bundle.dir(), "../c"]);
    assert!(outside.contains("invalid container id"), "{outside}");
}

#[test]
fn the_default_cgroup_is_one_per_state_directory() {
    if needs_root() {
        return;
    }
    let drop_path = |spec: &mut serde_json::Value| {
        spec["linux"].as_object_mut().unwrap().remove("cgroupsPath");
    };
    let one = Bundle::with(&["sh", "-c", LOOP], drop_path);
    let other = Bundle::with(&["sh", "-c", LOOP], drop_path);
    one.ok(&["run", "--bundle", one.dir(), "--detach", "c"]);
    other.ok(&["run", "--bundle", other.dir(), "--detach", "c"]);
    let pids = |bundle: &Bundle| bundle.ok(&["exec", "c", "cat", "/proc/1/cgroup"]);
    assert!(pids(&one).contains(":/"), "{}", pids(&one));
    one.ok(&["delete", "--force", "c"]);
    assert_eq!(other.state("c")["status"], "running", "the other one is untouched");
}

#[test]
fn a_taken_cgroup_is_refused() {
    if needs_root() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", LOOP]);
    bundle.ok(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    let taken = bundle.fails(&["create", "--bundle", bundle.dir(), "d"]);
    assert!(taken.contains("already holds pid"), "{taken}");
    assert_eq!(bundle.state("c")["status"], "running", "the first one is untouched");
}

#[test]
fn an_unknown_id_is_an_error() {
    let bundle = Bundle::new(&["true"]);
    for command in ["start", "state", "pause", "resume", "delete", "ps", "events"] {
        let text = bundle.fails(&[command, "nobody"]);
        assert_eq!(text, "error: container nobody does not exist\n", "{command}");
    }
    bundle.ok(&["delete", "--force", "nobody"]);
}

#[test]
fn json_log_tells_the_caller_why() {
    let bundle = Bundle::new(&["true"]);
    let log = bundle.path("log.json");
    let flags = ["--log", log.to_str().unwrap(), "--log-format", "json", "state", "nobody"];
    let text = bundle.fails(&flags);
    assert_eq!(text, "error: container nobody does not exist\n");
    let line: serde_json::Value = serde_json::from_slice(&fs::read(log).unwrap()).unwrap();
    assert_eq!(line["level"], "error");
    assert_eq!(line["msg"], "container nobody does not exist");
    assert!(line["time"].as_str().unwrap().ends_with('Z'), "{line}");
}

#[test]
fn features_and_version_are_parseable() {
    let bundle = Bundle::new(&["true"]);
    let features: serde_json::Value = serde_json::from_str(&bundle.ok(&["features"])).unwrap();
    assert_eq!(features["linux"]["seccomp"]["enabled"], true);
    assert!(features["hooks"].as_array().unwrap().contains(&json!("poststop")));
    assert!(bundle.ok(&["--version"]).starts_with("dunlin version "));
    assert!(bundle.ok(&["info"]).contains("Kernel"));
    assert!(bundle.ok(&["completion", "--shell", "bash"]).contains("_dunlin()"));
    let journal = bundle.fails(&["--systemd-log", "list"]);
    assert_eq!(journal, "error: --systemd-log is not supported\n");
    let usage = bundle.command(&["nonsense"]).stderr(Stdio::null()).status().unwrap();
    assert_eq!(usage.code(), Some(1));
}

#[test]
fn a_terminal_in_the_foreground_is_ours() {
    if needs_root() {
        return;
    }
    let program = "stty size; read word; echo got $word; tty; exit 5";
    let bundle = Bundle::with(&["sh", "-c", program], |spec| {
        spec["process"]["terminal"] = json!(true);
    });
    let size = nix::pty::Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 };
    let ours = nix::pty::openpty(Some(&size), None).unwrap();
    let mut run = bundle.command(&["run", "--bundle", bundle.dir(), "c"]);
    run.stdin(ours.slave).stdout(bundle.output_file("c"));
    let mut run = run.spawn().unwrap();
    let mut keys = fs::File::from(ours.master);
    until("it knows the size", || bundle.output_of("c").contains("33 77"));
    keys.write_all(b"hello\r").unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(5));
    let output = bundle.output_of("c");
    assert!(output.contains("got hello"), "{output}");
    assert!(output.contains("/dev/pts/0") || output.contains("/dev/console"), "{output}");
    assert_eq!(bundle.leftovers(), Vec::<String>::new());

    let detached = bundle.fails(&["run", "--bundle", bundle.dir(), "--detach", "c"]);
    assert!(detached.contains("needs --console-socket"), "{detached}");
    assert_eq!(bundle.leftovers(), Vec::<String>::new());
}
