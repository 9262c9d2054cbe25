//! Hosts are apart, reach each other, and leave nothing behind.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::hosts::{FOLDER, Hosts};

#[test]
fn hosts_reach_each_other() {
    let hosts = Hosts::new(&["a", "b"]).unwrap();
    let (a, b) = (&hosts["a"], &hosts["b"]);
    let listener = b.with(|| TcpListener::bind((b.address(), 80))).unwrap().unwrap();
    let said = thread::spawn(move || {
        let mut said = String::new();
        listener.accept().unwrap().0.read_to_string(&mut said).unwrap();
        said
    });
    a.with(|| TcpStream::connect((b.address(), 80)).unwrap().write_all(b"hello").unwrap()).unwrap();
    assert_eq!(said.join().unwrap(), "hello");
}

#[test]
fn hosts_have_folders_pids_and_names_of_their_own() {
    let hosts = Hosts::new(&["a", "b"]).unwrap();
    assert_eq!(hosts["a"].run(&mut Command::new("hostname")).unwrap(), "a\n");
    hosts["a"].run(Command::new("touch").arg(format!("{FOLDER}/mark"))).unwrap();
    assert!(hosts["a"].folder().join("mark").exists());
    assert!(hosts["a"].outside(FOLDER).join("mark").exists());
    assert!(!hosts["b"].outside(FOLDER).join("mark").exists());
    assert_eq!(hosts["b"].run(Command::new("pidof").arg("bash")).unwrap(), "1\n");
}

#[test]
fn all_is_gone_after_drop() {
    let hosts = Hosts::new(&["a"]).unwrap();
    let folder = hosts["a"].folder().to_owned();
    let cgroup = format!("/sys/fs/cgroup/pids{}/inner", hosts["a"].cgroup());
    if let Err(err) = fs::create_dir_all(&cgroup) {
        return dunlin_tests::skip(&format!("needs a v1 pids cgroup: {err}"));
    }
    let mut sleep = hosts["a"].spawn(Command::new("sleep").arg("1000")).unwrap();
    drop(hosts);
    assert!(!sleep.wait().unwrap().success());
    assert!(!folder.parent().unwrap().exists());
    assert!(!fs::exists(cgroup).unwrap());
}

#[test]
fn all_is_gone_after_the_driver_is_killed() {
    const DRIVER: &str = "DUNLIN_TEST_DRIVER";
    if env::var_os(DRIVER).is_some() {
        let hosts = Hosts::new(&["a"]).unwrap();
        println!("folder {}", hosts["a"].folder().display());
        loop {
            thread::park();
        }
    }
    let mut driver = Command::new(env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "all_is_gone_after_the_driver_is_killed"])
        .env(DRIVER, "")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let folder = BufReader::new(driver.stdout.take().unwrap())
        .lines()
        .find_map(|line| Some(line.unwrap().split_once("folder ")?.1.to_owned()))
        .unwrap();
    assert!(fs::exists(&folder).unwrap());
    driver.kill().unwrap();
    driver.wait().unwrap();
    let patience = Instant::now() + Duration::from_secs(10);
    while fs::exists(&folder).unwrap() {
        assert!(Instant::now() < patience, "{folder} is still there");
        thread::sleep(Duration::from_millis(5));
    }
}
