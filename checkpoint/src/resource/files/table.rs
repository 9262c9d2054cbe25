//! Fd tables: which fds there are and which share a description.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashMap},
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
};

use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::Pid,
};
use rustix::{
    fs::{FileType, Stat},
    process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use super::{Fd, Table, TableRef, fdinfo::FdInfo, locks::PosixLock, tty::Control};
use crate::{DumpError, sys::kcmp};

/// A description of the source, held by a duplicate of ours.
pub(super) struct Held {
    pub(super) fd: OwnedFd,
    /// Who has it, and as which number.
    name: String,
    /// What `/proc/PID/fd/N` points to.
    link: PathBuf,
    pub(super) stat: Stat,
    pub(super) info: FdInfo,
}

impl Held {
    /// `fd 9 of pid 4711`.
    pub(super) fn name(&self) -> String {
        self.name.clone()
    }

    pub(super) fn path(&self) -> &Path {
        &self.link
    }

    pub(super) fn link(&self) -> std::path::Display<'_> {
        self.link.display()
    }

    /// Device and inode number: the object behind the description.
    pub(super) fn object(&self) -> (u64, u64) {
        (self.stat.st_dev, self.stat.st_ino)
    }

    pub(super) fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    pub(super) fn is_socket(&self) -> bool {
        self.file_type() == FileType::Socket
    }

    /// The name behind `anon_inode:`.
    pub(super) fn anon_inode(&self) -> Option<&str> {
        self.link.to_str()?.strip_prefix("anon_inode:")
    }
}

/// POSIX locks of one table by device and inode.
type PosixLocks = BTreeMap<(u64, u64), Vec<PosixLock>>;

/// All tables of the tree.
pub(super) struct Tables {
    pub(super) held: Vec<Held>,
    tables: Vec<(TableRef, Vec<Fd>, Vec<PosixLock>)>,
    /// Descriptions of one object, in the order of `kcmp`.
    by_object: HashMap<(u64, u64), Vec<usize>>,
}

impl Tables {
    /// Collects every fd; in a running tree (`frozen` false) one that is
    /// closed meanwhile is left out.
    pub(super) fn collect(refs: &[TableRef], frozen: bool) -> Result<Self, DumpError> {
        let mut all = Self {
            held: Vec::new(),
            tables: Vec::with_capacity(refs.len()),
            by_object: HashMap::new(),
        };
        for table in refs {
            let mut locks = BTreeMap::new();
            let failed =
                |source| DumpError::Process { what: "read the fds", pid: table.pid, source };
            let fds = match all.collect_one(table.pid, frozen, &mut locks) {
                Err(err) if !frozen && is_gone(&err) => continue,
                fds => fds.map_err(failed)?,
            };
            let locks = locks.into_values().flatten().collect();
            all.tables.push((*table, fds, locks));
        }
        Ok(all)
    }

    fn collect_one(
        &mut self,
        pid: Pid,
        frozen: bool,
        locks: &mut PosixLocks,
    ) -> io::Result<Vec<Fd>> {
        let pidfd = open_task(pid)?;
        let mut numbers = fs::read_dir(format!("/proc/{pid}/fd"))?
            .map(|entry| entry?.file_name().to_string_lossy().parse().map_err(io::Error::other))
            .collect::<io::Result<Vec<RawFd>>>()?;
        numbers.sort_unstable();
        let mut fds = Vec::with_capacity(numbers.len());
        for number in numbers {
            match self.collect_fd(&pidfd, pid, number, locks) {
                Err(err) if !frozen && is_gone(&err) => (),
                fd => fds.push(fd?),
            }
        }
        Ok(fds)
    }

    fn collect_fd(
        &mut self,
        pidfd: &OwnedFd,
        pid: Pid,
        number: RawFd,
        locks: &mut PosixLocks,
    ) -> io::Result<Fd> {
        let fd = pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())?;
        let info = FdInfo::read(pid, number)?;
        let cloexec = info.cloexec();
        let stat = rustix::fs::fstat(&fd)?;
        let object = (stat.st_dev, stat.st_ino);
        // Every fd of a file shows the table's locks on it.
        locks.entry(object).or_insert_with(|| PosixLock::all(number, &info));
        let file = match self.find(object, &fd)? {
            Ok(known) => known,
            Err(place) => {
                let name = format!("fd {number} of pid {pid}");
                self.hold(place, Held { link: link(&fd)?, fd, name, stat, info })
            }
        };
        let file = u32::try_from(file).map_err(io::Error::other)?;
        Ok(Fd { fd: number, file, cloexec })
    }

    fn hold(&mut self, place: usize, held: Held) -> usize {
        let id = self.held.len();
        self.by_object.entry(held.object()).or_default().insert(place, id);
        self.held.push(held);
        id
    }

    /// Takes in a file found in the queue of the socket `carrier`.
    pub(super) fn adopt(&mut self, fd: OwnedFd, carrier: &str) -> io::Result<u32> {
        let stat = rustix::fs::fstat(&fd)?;
        let file = match self.find((stat.st_dev, stat.st_ino), &fd)? {
            Ok(known) => known,
            Err(place) => {
                let info = FdInfo::read(Pid::this(), fd.as_raw_fd())?;
                let name = format!("a file in flight in {carrier}");
                self.hold(place, Held { link: link(&fd)?, fd, name, stat, info })
            }
        };
        u32::try_from(file).map_err(io::Error::other)
    }

    /// The description of the socket with this inode; `any` is one too.
    pub(super) fn socket(&self, any: &Held, inode: u32) -> Option<usize> {
        self.by_object.get(&(any.stat.st_dev, inode.into()))?.first().copied()
    }

    /// Finds the description behind our fd, or the place where it belongs.
    fn find(&self, object: (u64, u64), fd: &OwnedFd) -> io::Result<Result<usize, usize>> {
        let known = self.by_object.get(&object).map_or(&[][..], Vec::as_slice);
        let (mut low, mut high) = (0, known.len());
        while low < high {
            let middle = low.midpoint(high);
            match kcmp::files(self.held[known[middle]].fd.as_fd(), fd.as_fd())? {
                Ordering::Equal => return Ok(Ok(known[middle])),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(Err(low))
    }

    /// Every description of one object.
    pub(super) fn same_object(&self, held: &Held) -> impl Iterator<Item = (usize, &Held)> {
        let ids = self.by_object.get(&held.object()).map_or(&[][..], Vec::as_slice);
        ids.iter().map(|id| (*id, &self.held[*id]))
    }

    /// The description behind fd `number` of the table that `pid` uses.
    pub(super) fn lookup(&self, pid: Pid, number: RawFd) -> Option<usize> {
        let (_, fds, _) = self.tables.iter().find(|(table, ..)| table.pid == pid)?;
        find_fd(fds, number)
    }

    /// The number of an fd in the table that `pid` uses.
    pub(super) fn find_number(&self, pid: Pid, is_it: impl Fn(&Held) -> bool) -> Option<RawFd> {
        let (_, fds, _) = self.tables.iter().find(|(table, ..)| table.pid == pid)?;
        fds.iter().find(|fd| is_it(&self.held[fd.file as usize])).map(|fd| fd.fd)
    }

    /// The description behind fd `number` in any table that also holds `file`.
    pub(super) fn beside(&self, file: usize, number: RawFd) -> impl Iterator<Item = usize> {
        self.tables.iter().filter_map(move |(_, fds, _)| {
            fds.iter().any(|fd| fd.file as usize == file).then(|| find_fd(fds, number))?
        })
    }

    pub(super) fn image(&self, control: impl Fn(Pid) -> Option<Control>) -> Vec<Table> {
        self.tables
            .iter()
            .map(|(table, fds, locks)| Table {
                pid: table.ns_pid,
                fds: fds.clone(),
                locks: locks.clone(),
                control: control(table.pid),
            })
            .collect()
    }
}

/// Lets the engine have as many fds as it may: it holds every description of
/// the tree at once.
pub(super) fn lift_limit() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(())
}

fn link(fd: &OwnedFd) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn find_fd(fds: &[Fd], number: RawFd) -> Option<usize> {
    let place = fds.binary_search_by_key(&number, |fd| fd.fd).ok()?;
    Some(fds[place].file as usize)
}

/// Opens a pidfd; of a thread where the pid is no process (`PIDFD_THREAD`).
fn open_task(pid: Pid) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(io::ErrorKind::InvalidInput)?;
    pidfd_open(pid, PidfdFlags::empty())
        .or_else(|_| pidfd_open(pid, PidfdFlags::from_bits_retain(libc::O_EXCL.cast_unsigned())))
        .map_err(Into::into)
}

fn is_gone(err: &io::Error) -> bool {
    matches!(err.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::EBADF))
}
