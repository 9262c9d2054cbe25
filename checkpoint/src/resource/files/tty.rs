//! Pseudo terminals of the container (`pty(7)`), and who is controlled by one.
//!
//! A pair is one object with any number of ends. The container's own console
//! is no pair of it: its master is outside, so it is replaced like any other
//! standard stream. Which session a terminal controls only the session's
//! leader can say, so that is a step inside the task, for both kinds.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
};

use nix::unistd::Pid;
use rustix::fs::{Mode, OFlags, major, minor};
use serde::{Deserialize, Serialize};

use super::{
    Collector, Doing, Failure, File, Kind, Making, Refusal, Source, Target, root, set_status,
    table::Held,
};
use crate::{
    proc::{Stat, Status},
    stub::{Batch, Remote, Tracee, args},
    sys::tty,
};

/// The node that gives a new pair's master.
const MASTER: (u32, u32) = (5, 2);
/// The node that stands for the opener's controlling terminal.
const CONTROLLING: (u32, u32) = (5, 0);
/// Major number of the first 256 slaves.
const FIRST_SLAVE: u32 = 136;
const LAST_SLAVE: u32 = 143;
/// Most pairs that are made to get at one with a certain number.
const MOST: u32 = 4096;

/// A pair.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// The `N` of `/dev/pts/N`.
    number: u32,
    /// Path of the node that gave the master, from the container's root.
    path: Vec<u8>,
    /// `struct termios2`.
    settings: Vec<u8>,
    /// Rows, columns and pixels.
    size: [u8; 8],
    locked: u32,
    packets: u32,
    /// Mode and owner of the slave's node, if it is open.
    node: Option<(u32, u32, u32)>,
}

/// One side of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct End {
    /// Index of the pair.
    pub(super) pair: u32,
    pub(super) is_master: bool,
}

/// The terminal that controls a session, for its leader to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Control {
    /// An fd of the terminal in the leader's table.
    pub(crate) fd: RawFd,
    /// The process group in the foreground, in the container's numbering.
    pub(crate) foreground: i32,
}

fn device(held: &Held) -> (u32, u32) {
    (major(held.stat.st_rdev), minor(held.stat.st_rdev))
}

/// Whether the file is a side of some pair, or stands for one.
pub(super) fn is_terminal(held: &Held) -> bool {
    device(held) == MASTER || slave(held).is_some()
}

/// The pair a slave belongs to; behind `/dev/tty` it is the kernel who knows.
pub(super) fn slave(held: &Held) -> Option<u32> {
    let number = |(major, minor): (u32, u32)| {
        let major = (FIRST_SLAVE..=LAST_SLAVE).contains(&major).then_some(major)?;
        Some((major - FIRST_SLAVE) * 256 + minor)
    };
    if device(held) == CONTROLLING {
        let raw = tty::GET_DEVICE.number(held.fd.as_fd()).ok()?;
        return number((major(raw.into()), minor(raw.into())));
    }
    number(device(held))
}

fn master<'a>(number: u32, source: &'a Source<'_>) -> Option<&'a Held> {
    source.tables.held.iter().find(|held| {
        device(held) == MASTER && tty::GET_NUMBER.number(held.fd.as_fd()).is_ok_and(|n| n == number)
    })
}

/// Whether whoever shows the terminal is outside the tree.
pub(super) fn leads_out(held: &Held, source: &Source<'_>) -> bool {
    match slave(held) {
        Some(number) => master(number, source).is_none(),
        None => device(held) != MASTER && rustix::termios::isatty(&held.fd),
    }
}

pub(super) fn dump(
    held: &Held,
    source: &Source<'_>,
    out: &mut Collector<'_>,
) -> Result<End, Refusal> {
    let is_master = device(held) == MASTER;
    let number = if is_master {
        Some(tty::GET_NUMBER.number(held.fd.as_fd()).doing("tell its number")?)
    } else {
        slave(held)
    };
    let Some((number, master)) = number.and_then(|n| Some((n, master(n, source)?))) else {
        return Err(Refusal::unmovable(format!(
            "is {}, a terminal whose other side is outside the tree",
            held.link()
        )));
    };
    let queued = tty::GET_QUEUED.number(held.fd.as_fd()).doing("read the length of its queue")?;
    if queued > 0 {
        out.losses.push(format!("drops {queued} bytes of a terminal nobody has read yet"));
    }
    if let Some(pair) = out.ptys.iter().position(|pair| pair.number == number) {
        return Ok(End { pair: u32::try_from(pair).unwrap_or(u32::MAX), is_master });
    }
    let pair = dump_pair(number, master, source)?;
    out.ptys.push(pair);
    Ok(End { pair: u32::try_from(out.ptys.len() - 1).unwrap_or(u32::MAX), is_master })
}

fn dump_pair(number: u32, master: &Held, source: &Source<'_>) -> Result<Image, Refusal> {
    let Some(path) = source.root.path(master) else {
        return Err(Refusal::unmovable("is a pseudo terminal outside the container's mounts"));
    };
    let fd = master.fd.as_fd();
    let mut slaves = source.tables.held.iter().filter(|held| device(held).0 >= FIRST_SLAVE);
    let node = slaves.find(|held| slave(held) == Some(number)).map(|held| held.stat);
    Ok(Image {
        number,
        path: path.as_os_str().as_bytes().to_vec(),
        settings: tty::GET_SETTINGS.of(fd).doing("read the terminal's settings")?.to_vec(),
        size: tty::GET_SIZE.of(fd).doing("read the terminal's size")?,
        locked: tty::GET_LOCK.number(fd).doing("read the terminal's lock")?,
        packets: tty::GET_PACKETS.number(fd).doing("read the terminal's mode")?,
        node: node.map(|stat| (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid)),
    })
}

/// The terminal of the session that `leader` leads.
pub(super) fn control(leader: Pid, source: &Source<'_>) -> Option<Control> {
    let status = Status::of(leader).ok()?;
    let stat = Stat::of(leader).ok()?;
    if status.sid() != status.tgid() || stat.tty == 0 || stat.foreground <= 0 {
        return None;
    }
    // `stat` packs the device as system calls once did.
    let tty = stat.tty.cast_unsigned();
    let device = ((tty >> 8) & 0xfff, (tty & 0xff) | ((tty >> 12) & 0xf_ff00));
    let fd = source.tables.find_number(leader, |held| self::device(held) == device)?;
    // The group's leader may be gone, the group not.
    let foreground = source.ctx.tasks.iter().find_map(|task| {
        let status = Status::of(*task).ok()?;
        (status.ns_pgid.first() == Some(&stat.foreground)).then(|| status.pgid())
    })?;
    Some(Control { fd, foreground })
}

/// Lets a session's leader take its terminal and put a group in front.
pub(crate) fn take_control(control: Control, remote: &Remote, leader: &Tracee) -> io::Result<()> {
    let Control { fd, foreground } = control;
    let mut batch = Batch::new();
    let group = batch.bytes(&foreground.to_le_bytes());
    // Never by force: the stream that was given may be the terminal of the
    // shell from which the container is restored.
    batch.call(libc::SYS_ioctl, args![fd, libc::TIOCSCTTY, 0]);
    batch.call(libc::SYS_ioctl, args![fd, libc::TIOCSPGRP, group]);
    remote.run(leader, &batch).map(drop)
}

/// Makes every pair with all its ends.
pub(super) fn open(
    ptys: &[Image],
    files: &[File],
    target: &Target<'_>,
    made: &mut [Option<OwnedFd>],
) -> Result<(), (usize, Failure)> {
    for (index, pair) in ptys.iter().enumerate() {
        let mut ends = Vec::new();
        for (id, file) in files.iter().enumerate() {
            if let Kind::Pty(end) = &file.kind
                && end.pair as usize == index
            {
                ends.push((id, end.is_master, OFlags::from_bits_retain(file.flags)));
            }
        }
        let Some(&(first, ..)) = ends.first() else { continue };
        let master = create(pair, target).map_err(|err| (first, err))?;
        let mut master = Some(master);
        // Slaves first: the master itself goes to the last who has it.
        ends.sort_by_key(|(_, is_master, _)| *is_master);
        for (id, is_master, flags) in ends {
            let fd = match (is_master, &master) {
                (false, Some(master)) => open_slave(pair, master.as_fd(), flags),
                (true, Some(_)) => Ok(master.take().expect("was there")),
                // A master is one description by its nature.
                (_, None) => Err(Failure::Damaged("a terminal with two masters")),
            };
            let fd = fd.and_then(|fd| set_status(fd, flags)).map_err(|err| (id, err))?;
            made[id] = Some(fd);
        }
    }
    Ok(())
}

/// Makes pairs until one has the right number.
fn create(pair: &Image, target: &Target<'_>) -> Result<OwnedFd, Failure> {
    let missing = |reason: String| Failure::Missing {
        object: format!("terminal /dev/pts/{}", pair.number),
        reason,
    };
    let found = root::resolve(target.root, &pair.path, OFlags::PATH | OFlags::NOFOLLOW)
        .map_err(|err| missing(err.to_string()))?;
    let rdev = rustix::fs::fstat(&found).making("look at a terminal")?.st_rdev;
    if (major(rdev), minor(rdev)) != MASTER || pair.number >= MOST {
        return Err(Failure::Damaged("a terminal that is none"));
    }
    let mut below = Vec::new();
    loop {
        let master = root::resolve(target.root, &pair.path, OFlags::RDWR | OFlags::NOCTTY)
            .map_err(|err| missing(err.to_string()))?;
        let number = tty::GET_NUMBER.number(master.as_fd()).making("number a terminal")?;
        if number == pair.number {
            settle(pair, master.as_fd()).making("set up a terminal")?;
            return Ok(master);
        }
        if number > pair.number {
            return Err(missing("is in use here".to_owned()));
        }
        below.push(master);
    }
}

fn settle(pair: &Image, master: BorrowedFd<'_>) -> io::Result<()> {
    let Image { number: _, path: _, settings, size, locked, packets, node } = pair;
    let settings = settings[..].try_into().map_err(|_| io::ErrorKind::InvalidData)?;
    tty::SET_SETTINGS.to::<44>(master, settings)?;
    tty::SET_SIZE.to(master, *size)?;
    tty::SET_PACKETS.to(master, packets.to_ne_bytes())?;
    tty::SET_LOCK.to(master, 0u32.to_ne_bytes())?;
    if let Some((mode, uid, gid)) = node {
        let slave = tty::open_slave(master, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC)?;
        let (uid, gid) = (rustix::fs::Uid::from_raw(*uid), rustix::fs::Gid::from_raw(*gid));
        rustix::fs::fchown(&slave, Some(uid), Some(gid))?;
        rustix::fs::fchmod(&slave, Mode::from_raw_mode(*mode))?;
    }
    tty::SET_LOCK.to(master, locked.to_ne_bytes())
}

fn open_slave(pair: &Image, master: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Failure> {
    let flags = (flags & OFlags::ACCMODE) | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let open = || {
        tty::SET_LOCK.to(master, 0u32.to_ne_bytes())?;
        let slave = tty::open_slave(master, flags.bits().cast_signed())?;
        tty::SET_LOCK.to(master, pair.locked.to_ne_bytes())?;
        Ok::<_, io::Error>(slave)
    };
    open().making("open a terminal")
}
