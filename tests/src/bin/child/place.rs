//! Where in the file system a process stands, and what it calls itself.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use nix::sys::stat::{Mode, umask};

use crate::world::{self, Scenario, dir};

/// Working directory and umask.
pub(crate) fn place_directory() -> Result<Scenario> {
    let deep = dir().join("a/b");
    fs::create_dir_all(&deep)?;
    nix::unistd::chdir(&deep)?;
    umask(Mode::from_bits_truncate(0o027));
    fs::write("file", "here")?;
    let check = |_: &mut ()| {
        let text = fs::read_to_string("file").context("not where it was")?;
        ensure!(text == "here");
        let mask = umask(Mode::empty());
        ensure!(mask.bits() == 0o027, "the umask is {mask:?}");
        Ok(())
    };
    Scenario::new((), check, |_| Ok(nix::unistd::chdir("..")?))
}

/// A root directory of its own.
pub(crate) fn place_root() -> Result<Scenario> {
    fs::create_dir(dir().join("inner"))?;
    fs::write(dir().join("inner/file"), "inside")?;
    nix::unistd::chroot(&dir())?;
    nix::unistd::chdir("/inner")?;
    world::set_dir("/".into());
    let check = |_: &mut ()| {
        ensure!(fs::read_to_string("/inner/file")? == "inside");
        ensure!(fs::read_to_string("../../../inner/file")? == "inside", "the root can be left");
        ensure!(std::env::current_dir()?.to_str() == Some("/inner"));
        Ok(())
    };
    Scenario::new((), check, |_| Ok(nix::unistd::chdir("/")?))
}

/// The name of the thread, and a command line written over as servers do.
pub(crate) fn place_names() -> Result<Scenario> {
    nix::sys::prctl::set_name(c"a (new) name")?;
    let start = Stat::read()?;
    File::options()
        .write(true)
        .open("/proc/self/mem")?
        .write_all_at(b"child: standing by\0\0", start.arguments)?;
    let read =
        || Ok((fs::read("/proc/self/comm")?, fs::read("/proc/self/cmdline")?, Stat::read()?));
    let check = |(read, before): &mut (fn() -> Result<Names>, Names)| {
        let after = read()?;
        ensure!(*before == after, "{before:?} became {after:?}");
        ensure!(after.1.starts_with(b"child: standing by"), "it was not written");
        Ok(())
    };
    let spoil = |_: &mut (fn() -> Result<Names>, Names)| Ok(nix::sys::prctl::set_name(c"other")?);
    Scenario::new((read as fn() -> Result<Names>, read()?), check, spoil)
}

type Names = (Vec<u8>, Vec<u8>, Stat);

/// Where the kernel thinks that arguments and environment are.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    arguments: u64,
    environment: u64,
}

impl Stat {
    fn read() -> Result<Self> {
        let stat = dunlin_tests::proc::Stat::read("/proc/self")?;
        Ok(Self { arguments: stat.field(48).parse()?, environment: stat.field(50).parse()? })
    }
}
