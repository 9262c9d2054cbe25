//! Fds held by another process are dumped, made again here, and compared.
//!
//! The holder is this test binary once more, in a network namespace of its
//! own: it runs only [`holder`], which sets up one world and waits.

mod basics;
mod epolls;
mod ghosts;
mod kernel;
mod pipes;
mod sockets;
mod tcp;
mod unix;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    env, fs,
    io::{self, BufRead, BufReader, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
};

use nix::{
    sched::CloneFlags,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::{self, Pid},
};
use proptest::prelude::*;
use rustix::fs::{Mode, OFlags};

use super::{
    Assembly, Connections, Context, Fd, Image, Opened, TableRef, Target, dump, fdinfo::FdInfo,
    inspect, open,
};
use crate::{
    DumpError, Finding, Judgement, Options, RestoreError,
    image::{self, ImageSink},
    resource::{
        pages::{Runs, decode_runs},
        shared::{Created, Objects},
    },
};

const WORLD: &str = "DUNLIN_TEST_WORLD";
const WORLD_DIR: &str = "DUNLIN_TEST_DIR";

/// What a holder can be asked to set up.
const WORLDS: &[(&str, fn())] = &[
    ("regular", basics::regular),
    ("devices", basics::devices),
    ("counters", basics::counters),
    ("shared", basics::shared),
    ("many", basics::many),
    ("ghosts", ghosts::ghosts),
    ("unmovable", basics::unmovable),
    ("terminals", kernel::terminals),
    ("inotify", kernel::inotify),
    ("pidfd", kernel::pidfd),
    ("netlink", kernel::netlink),
    ("locks", basics::locks),
    ("owners", basics::owners),
    ("pipes", pipes::pipes),
    ("outside_pipe", pipes::outside_pipe),
    ("epoll", epolls::epolls),
    ("inet", sockets::inet),
    ("established", sockets::established),
    ("connections", tcp::connections),
    ("odd_sockets", sockets::odd),
    ("unix_pairs", unix::pairs),
    ("unix_listening", unix::listening),
    ("unix_named", unix::named),
    ("unix_datagrams", unix::datagrams),
    ("unix_in_flight", unix::in_flight),
    ("unix_outside", unix::outside),
];

/// Sets up the world that the parent asks for and waits until it is gone.
#[test]
#[ignore = "is run by the other tests"]
fn holder() {
    let Ok(world) = env::var(WORLD) else { return };
    let (_, set_up) = WORLDS.iter().find(|(name, _)| *name == world).unwrap();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    // Whoever runs the tests may have fds open that are none of ours.
    let numbers: Vec<RawFd> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        unistd::close(number).ok();
    }
    set_up();
    println!("ready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
}

/// Puts a description under a number of the holder, for good.
fn put(fd: impl Into<OwnedFd>, number: RawFd) {
    let fd = fd.into();
    assert_ne!(fd.as_raw_fd(), number);
    unistd::dup2(fd.as_raw_fd(), number).unwrap();
}

/// The directory that holder and test share.
fn dir() -> String {
    env::var(WORLD_DIR).unwrap()
}

/// A process that holds fds.
struct Holder {
    child: Child,
    dir: tempfile::TempDir,
    connections: RefCell<Connections>,
    stdout: BufReader<ChildStdout>,
}

impl Holder {
    /// Starts one, or says why it cannot.
    fn start(world: &str) -> Option<Self> {
        Self::start_with(world, &[])
    }

    fn start_with(world: &str, more: &[(&str, &std::path::Path)]) -> Option<Self> {
        let mut holder = Self::spawn(world, more)?;
        holder.wait_for("ready");
        Some(holder)
    }

    /// Starts one that waits for [`say`](Self::say) in the middle.
    fn start_silent(world: &str) -> Option<Self> {
        let mut holder = Self::spawn(world, &[])?;
        holder.wait_for("waiting");
        Some(holder)
    }

    fn spawn(world: &str, more: &[(&str, &std::path::Path)]) -> Option<Self> {
        if !unistd::geteuid().is_root() {
            eprintln!("skipped: needs CAP_SYS_ADMIN");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("unshare")
            .arg("--net")
            .arg(env::current_exe().unwrap())
            .args(["--exact", "resource::files::tests::holder", "--ignored", "--nocapture"])
            .env(WORLD, world)
            .env(WORLD_DIR, dir.path())
            .envs(more.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Some(Self { child, dir, connections: RefCell::default(), stdout })
    }

    /// Reads what the holder writes until it says `word`.
    fn wait_for(&mut self, word: &str) {
        let mut line = String::new();
        // libtest writes its own words before ours on the same line.
        while !line.trim_end().ends_with(word) {
            line.clear();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "{word} was not said");
        }
    }

    /// Lets the holder go on, up to where it says `word`.
    fn say(&mut self, word: &str) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        self.wait_for(word);
    }

    /// Runs a command in a network namespace.
    fn within(netns: &OwnedFd, line: &str) {
        let mut words = line.split(' ');
        let mut command = Command::new(words.next().unwrap());
        command.args(words);
        let status = super::in_netns(netns.as_fd(), || command.status()).unwrap();
        assert!(status.success(), "{line}");
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    fn tables(&self) -> Vec<TableRef> {
        let pid = self.pid();
        vec![TableRef { pid, ns_pid: pid.as_raw() }]
    }

    fn stop(&self) {
        let stat = || fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        if !stat().contains(") T ") {
            kill(self.pid(), Signal::SIGSTOP).unwrap();
            waitpid(self.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
        }
    }

    fn inspect(&self, options: &Options) -> Vec<Finding> {
        let tasks = [self.pid()];
        inspect(&self.tables(), &Context { options, init: self.pid(), tasks: &tasks }).unwrap()
    }

    fn dump(&self) -> Image {
        self.try_dump(&Options::default()).unwrap()
    }

    /// Stops the holder and dumps it; the image travels through its bytes.
    fn try_dump(&self, options: &Options) -> Result<Image, DumpError> {
        self.try_dump_with(options, &mut Objects::default())
    }

    fn try_dump_with(&self, options: &Options, objects: &mut Objects) -> Result<Image, DumpError> {
        self.stop();
        let tasks = [self.pid()];
        let ctx = Context { options, init: self.pid(), tasks: &tasks };
        let (image, connections) = dump(&self.tables(), &ctx, objects)?;
        let mut assembly = Assembly::default();
        let parts = image.parts().unwrap();
        let again = parts.iter().find_map(|part| assembly.take(part).unwrap());
        assert_eq!(again.as_ref(), Some(&image));
        *self.connections.borrow_mut() = connections;
        Ok(image)
    }

    /// Dumps the holder, ends it and makes its files here.
    fn migrate(&mut self) -> Restored {
        self.migrate_with(&Options::default())
    }

    fn migrate_with(&mut self, options: &Options) -> Restored {
        self.migrate_into(options, new_netns(), || ())
    }

    /// Migrates into a network namespace, which `connect` then lets speak.
    fn migrate_into(
        &mut self,
        options: &Options,
        netns: OwnedFd,
        connect: impl FnOnce(),
    ) -> Restored {
        let mut objects = Objects::default();
        let image = self.try_dump_with(options, &mut objects).unwrap();
        let mut records = Records::default();
        objects.dump(&mut records).unwrap();
        let flags = image.tables[0]
            .fds
            .iter()
            .map(|fd| (fd.fd, FdInfo::read(self.pid(), fd.fd).unwrap()))
            .collect();
        self.connections.borrow().silence().unwrap();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        Restored::new_in(image, flags, records.create(), netns, connect).unwrap()
    }
}

/// The records of the objects, as they travel.
#[derive(Default)]
struct Records(Vec<(u16, Vec<u8>)>);

impl ImageSink for Records {
    fn put(&mut self, kind: u16, parts: &[io::IoSlice<'_>]) -> io::Result<()> {
        self.0.push((kind, parts.iter().flat_map(|part| part.to_vec()).collect()));
        Ok(())
    }
}

impl Records {
    fn create(&self) -> Created {
        let mut created = Created::default();
        for (kind, body) in &self.0 {
            if *kind == image::Kind::Object as u16 {
                let object = postcard::from_bytes(body).unwrap();
                created.create(object, root().as_fd()).unwrap();
            } else {
                let Runs { owner, runs, data } = decode_runs(body).unwrap();
                created.fill(owner, &runs, data).unwrap();
            }
        }
        created
    }
}

fn root() -> OwnedFd {
    rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// What a holder had, made in the test process.
struct Restored {
    opened: Opened,
    /// What the source's kernel said about each fd.
    infos: BTreeMap<RawFd, FdInfo>,
    pid: i32,
    netns: OwnedFd,
    /// The other ends of what replaced stdin, stdout and stderr.
    stdio: [OwnedFd; 3],
}

impl Restored {
    fn new(
        image: Image,
        infos: BTreeMap<RawFd, FdInfo>,
        objects: Created,
    ) -> Result<Self, RestoreError> {
        Self::new_in(image, infos, objects, new_netns(), || ())
    }

    fn new_in(
        image: Image,
        infos: BTreeMap<RawFd, FdInfo>,
        objects: Created,
        netns: OwnedFd,
        connect: impl FnOnce(),
    ) -> Result<Self, RestoreError> {
        let root = root();
        let stdio: [OwnedFd; 3] = std::array::from_fn(|_| {
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
        });
        let target = Target {
            root: root.as_fd(),
            netns: netns.as_fd(),
            stdio: [stdio[0].as_fd(), stdio[1].as_fd(), stdio[2].as_fd()],
            objects: &objects,
            host: &|_| Some(Pid::this()),
        };
        let mut opened = open(&image, &target)?;
        objects.seal().unwrap();
        connect();
        opened.arm(&|_| Some(Pid::this()))?;
        let pid = image.tables[0].pid;
        Ok(Self { opened, infos, pid, netns, stdio })
    }

    fn fd(&self, number: RawFd) -> BorrowedFd<'_> {
        let table = self.opened.table(self.pid);
        table.into_iter().find(|(fd, _, _)| *fd == number).unwrap().1
    }

    fn info(&self, number: RawFd) -> FdInfo {
        FdInfo::read(Pid::this(), self.fd(number).as_raw_fd()).unwrap()
    }

    /// Flags, position and whatever else the kernel shows are as they were.
    fn assert_same(&self, numbers: impl IntoIterator<Item = RawFd>) {
        for number in numbers {
            let (was, is) = (&self.infos[&number], self.info(number));
            // An `open` adds this one by itself, as it does for every 64-bit program.
            let flags = |info: &FdInfo| info.oflags() - OFlags::LARGEFILE;
            assert_eq!(flags(was), flags(&is), "flags of fd {number}");
            assert_eq!(was.pos, is.pos, "position of fd {number}");
        }
    }
}

/// A network namespace with its loopback device up.
fn new_netns() -> OwnedFd {
    let make = || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(up.success());
        fs::File::open("/proc/thread-self/ns/net").unwrap().into()
    };
    thread::scope(|scope| scope.spawn(make).join().unwrap())
}

fn refusals(findings: &[Finding]) -> Vec<&Finding> {
    findings.iter().filter(|finding| finding.judgement == Judgement::Refused).collect()
}

proptest! {
    /// Whatever bytes decode to an image, opening it does not panic, and what
    /// decodes encodes back.
    #[test]
    fn any_bytes_are_an_image_or_none(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok((image, rest)) = postcard::take_from_bytes::<Image>(&bytes) {
            let again = postcard::to_stdvec(&image).unwrap();
            prop_assert_eq!(postcard::from_bytes::<Image>(&again).unwrap(), image);
            prop_assert!(again.len() <= bytes.len() - rest.len());
        }
    }

    #[test]
    fn fds_that_lead_nowhere_are_refused(fd in any::<i32>(), file in 0u32..9) {
        let fds = vec![Fd { fd, file, cloexec: false }];
        let image = Image { tables: vec![super::Table { pid: 1, fds, locks: Vec::new(), control: None }], ..Image::default() };
        prop_assert!(matches!(super::check(&image), Err(RestoreError::Image(_))));
    }
}
