//! File descriptors of files and devices, and how they are shared.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::libc;

use crate::fork::{Fork, fork, on_question};
use crate::sys::call;
use crate::world::{Scenario, dir};

fn flags(fd: BorrowedFd<'_>) -> Result<(OFlag, FdFlag)> {
    let status = OFlag::from_bits_retain(fcntl(fd.as_raw_fd(), FcntlArg::F_GETFL)?);
    Ok((status, FdFlag::from_bits_retain(fcntl(fd.as_raw_fd(), FcntlArg::F_GETFD)?)))
}

fn position(mut file: &File) -> Result<u64> {
    Ok(file.stream_position()?)
}

/// Files and directories with offset and flags.
pub(crate) fn fds_files() -> Result<Scenario> {
    let path = dir().join("file");
    fs::write(&path, "0123456789")?;
    let open = || File::options().clone();
    let mut read = open().read(true).open(&path)?;
    read.seek(SeekFrom::Start(4))?;
    let append = open().read(true).append(true).open(&path)?;
    let both = open()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOATIME)
        .open(&path)?;
    (&both).seek(SeekFrom::Start(1 << 40))?;
    let handle = open().read(true).custom_flags(libc::O_PATH).open(&path)?;
    let directory = open().read(true).custom_flags(libc::O_DIRECTORY).open(dir())?;
    fcntl(append.as_raw_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
    let files = [read, append, both, handle, directory];
    let before = files.iter().map(|file| flags(file.as_fd())).collect::<Result<Vec<_>>>()?;
    let check = |(files, before): &mut ([File; 5], Vec<(OFlag, FdFlag)>)| {
        for (file, before) in files.iter().zip(before) {
            let after = flags(file.as_fd())?;
            ensure!(*before == after, "fd {file:?}: {before:?} became {after:?}");
        }
        let [read, append, both, handle, directory] = files;
        ensure!(position(read)? == 4 && position(both)? == 1 << 40, "an offset changed");
        append.write_all(b"ab")?;
        let mut rest = String::new();
        read.read_to_string(&mut rest)?;
        ensure!(rest == "456789ab", "read {rest:?} from offset 4");
        ensure!(handle.metadata()?.len() == 12, "O_PATH leads elsewhere");
        let inside = fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
        ensure!(inside.count() == 2, "the directory leads elsewhere");
        Ok(())
    };
    let spoil = |(files, _): &mut ([File; 5], Vec<(OFlag, FdFlag)>)| {
        Ok(files[0].seek(SeekFrom::Start(3)).map(drop)?)
    };
    Scenario::new((files, before), check, spoil)
}

/// Devices that can be opened again.
pub(crate) fn fds_devices() -> Result<Scenario> {
    let open = |name: &str| File::options().read(true).write(true).open(format!("/dev/{name}"));
    let devices = [open("null")?, open("zero")?, open("full")?, open("random")?, open("urandom")?];
    let check = |[null, zero, full, random, urandom]: &mut [File; 5]| {
        let mut buffer = [1; 8];
        ensure!(null.read(&mut buffer)? == 0 && null.write(&buffer)? == 8, "null");
        zero.read_exact(&mut buffer)?;
        ensure!(buffer == [0; 8], "zero");
        ensure!(full.write(&buffer).is_err(), "full");
        random.read_exact(&mut buffer)?;
        ensure!(buffer != [0; 8], "random");
        urandom.read_exact(&mut buffer)?;
        ensure!(buffer != [0; 8], "urandom");
        Ok(())
    };
    let spoil = |devices: &mut [File; 5]| Ok(devices.swap(0, 1));
    Scenario::new(devices, check, spoil)
}

/// One description behind several descriptors, here and in a child, beside
/// another one of the same file; gaps and high numbers.
pub(crate) fn fds_shared() -> Result<Scenario> {
    let path = dir().join("file");
    fs::write(&path, "0123456789")?;
    let file = File::open(&path)?;
    let other = File::open(&path)?;
    let twin = file.try_clone()?;
    call(libc::SYS_dup2, [usize::try_from(file.as_raw_fd())?, 700, 0, 0, 0, 0])?;
    let in_child = file.try_clone()?;
    let child =
        fork(move || on_question(|| Ok((&in_child).seek(SeekFrom::Current(3)).map(drop)?)))?;
    let state = (file, twin, other, child);
    let check = |(file, twin, other, child): &mut (File, File, File, Fork)| {
        file.seek(SeekFrom::Start(2))?;
        ensure!(position(twin)? == 2, "a duplicate has an offset of its own");
        child.ask()?;
        ensure!(position(file)? == 5, "the child's has an offset of its own");
        ensure!(position(other)? == 0, "another description shares the offset");
        let high = fs::read_to_string("/proc/self/fdinfo/700").context("no fd 700")?;
        ensure!(high.starts_with("pos:\t5\n"), "fd 700: {high}");
        ensure!(!flags(file.as_fd())?.1.is_empty(), "FD_CLOEXEC was lost");
        Ok(())
    };
    let spoil = |state: &mut (File, File, File, Fork)| {
        // As if each had been opened for itself.
        state.1 = File::open(dir().join("file"))?;
        Ok(())
    };
    Scenario::new(state, check, spoil)
}

/// A pipe, its two ends.
pub(crate) struct Pipe(pub(crate) OwnedFd, pub(crate) OwnedFd);

impl Pipe {
    fn new(flags: OFlag) -> Result<Self> {
        let (read, write) = nix::unistd::pipe2(flags)?;
        Ok(Self(read, write))
    }

    fn put(&self, bytes: &[u8]) -> Result<()> {
        ensure!(nix::unistd::write(&self.1, bytes)? == bytes.len(), "the pipe is full");
        Ok(())
    }
}

fn take(fd: &OwnedFd, most: usize) -> Result<Vec<u8>> {
    let mut buffer = vec![0; most];
    let n = nix::unistd::read(fd.as_raw_fd(), &mut buffer)?;
    buffer.truncate(n);
    Ok(buffer)
}

struct Pipes {
    short: Pipe,
    full: Pipe,
    grown: Pipe,
    packets: Pipe,
    no_writer: OwnedFd,
    no_reader: OwnedFd,
}

const GROWN: usize = 256 << 10;

/// Pipes with content, of another size, in packet mode, half closed.
pub(crate) fn fds_pipes() -> Result<Scenario> {
    let short = Pipe::new(OFlag::O_CLOEXEC)?;
    short.put(b"hello")?;
    let full = Pipe::new(OFlag::O_NONBLOCK)?;
    full.put(&vec![7; 64 << 10])?;
    let grown = Pipe::new(OFlag::empty())?;
    fcntl(grown.0.as_raw_fd(), FcntlArg::F_SETPIPE_SZ(i32::try_from(GROWN)?))?;
    grown.put(&vec![9; 200_000])?;
    let packets = Pipe::new(OFlag::O_DIRECT)?;
    packets.put(b"one")?;
    packets.put(b"three")?;
    let Pipe(no_writer, last) = Pipe::new(OFlag::empty())?;
    ensure!(nix::unistd::write(&last, b"end")? == 3);
    drop(last);
    let Pipe(_, no_reader) = Pipe::new(OFlag::empty())?;
    let check = |pipes: &mut Pipes| {
        ensure!(take(&pipes.short.0, 99)? == b"hello", "content of a pipe");
        pipes.short.put(b"again")?;
        ensure!(take(&pipes.short.0, 99)? == b"again", "what is written now");
        ensure!(nix::unistd::write(&pipes.full.1, b"x").is_err(), "the full pipe takes more");
        ensure!(take(&pipes.full.0, 1 << 20)? == vec![7; 64 << 10], "content of the full pipe");
        ensure!(take(&pipes.full.0, 1).is_err(), "O_NONBLOCK was lost");
        let size = fcntl(pipes.grown.1.as_raw_fd(), FcntlArg::F_GETPIPE_SZ)?;
        ensure!(usize::try_from(size)? == GROWN, "size of the grown pipe is {size}");
        ensure!(take(&pipes.grown.0, GROWN)? == vec![9; 200_000], "content of the grown pipe");
        ensure!(take(&pipes.packets.0, 99)? == b"one", "first packet");
        ensure!(take(&pipes.packets.0, 99)? == b"three", "second packet");
        ensure!(take(&pipes.no_writer, 99)? == b"end", "content without a writer");
        ensure!(take(&pipes.no_writer, 99)?.is_empty(), "no end of file");
        let written = nix::unistd::write(&pipes.no_reader, b"x");
        ensure!(written == Err(nix::errno::Errno::EPIPE), "no reader, but {written:?}");
        Ok(())
    };
    let spoil = |pipes: &mut Pipes| take(&pipes.packets.0, 1).map(drop);
    Scenario::new(Pipes { short, full, grown, packets, no_writer, no_reader }, check, spoil)
}
