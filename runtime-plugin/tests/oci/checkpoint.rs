//! `checkpoint` and `restore` with runc's flags.

use std::fs;
use std::io::IoSlice;

use dunlin_checkpoint::image::{FILE_NAME, FileSink, ImageSink};
use serde_json::json;

use crate::bundle::{Bundle, needs_root};

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
