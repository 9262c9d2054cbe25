//! System V objects: shared memory, semaphore sets, message queues (`sysvipc(7)`).
//!
//! All of it concerns the ipc namespace of the calling thread.

use std::{
    fs::{self, File, OpenOptions},
    io,
};

use nix::unistd::{Gid, Uid};
use serde::{Deserialize, Serialize};

/// The three kinds of objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Segment,
    Set,
    Queue,
}

/// Name and permissions of an object (`struct ipc_perm`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Perm {
    pub(crate) id: i32,
    pub(crate) key: i32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The creator's.
    pub(crate) cuid: u32,
    pub(crate) cgid: u32,
    /// Permission bits, and `SHM_DEST` and `SHM_LOCKED` of a segment.
    pub(crate) mode: u32,
}

/// What `IPC_STAT` tells of an object.
pub(crate) struct Stat {
    pub(crate) perm: Perm,
    /// Bytes of a segment, semaphores of a set, bytes that a queue may hold.
    pub(crate) size: u64,
    /// Messages in a queue, and bytes of them all together.
    pub(crate) messages: (u64, u64),
}

/// The segment goes when nobody has it attached any more.
pub(crate) const SHM_DEST: u32 = 0o1000;
/// The segment is locked in memory.
pub(crate) const SHM_LOCKED: u32 = 0o2000;

fn checked(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// Ids of all objects of one kind.
pub(crate) fn ids(kind: Kind) -> io::Result<Vec<i32>> {
    let text = fs::read_to_string(format!("/proc/sysvipc/{}", kind.name()))?;
    let id = |line: &str| line.split_ascii_whitespace().nth(1)?.parse().ok();
    Ok(text.lines().skip(1).filter_map(id).collect())
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Segment => "shm",
            Self::Set => "sem",
            Self::Queue => "msg",
        }
    }

    /// Reads what an object is.
    pub(crate) fn stat(self, id: i32) -> io::Result<Stat> {
        let perm = |perm: &libc::ipc_perm| Perm {
            id,
            key: perm.__key,
            uid: perm.uid,
            gid: perm.gid,
            cuid: perm.cuid,
            cgid: perm.cgid,
            mode: u32::from(perm.mode),
        };
        Ok(match self {
            Self::Segment => {
                let ds = segment_ds(id)?;
                Stat { perm: perm(&ds.shm_perm), size: ds.shm_segsz as u64, messages: (0, 0) }
            }
            Self::Set => {
                let ds = set_ds(id)?;
                Stat { perm: perm(&ds.sem_perm), size: ds.sem_nsems, messages: (0, 0) }
            }
            Self::Queue => {
                let ds = queue_ds(id)?;
                let messages = (ds.msg_qnum, ds.__msg_cbytes);
                Stat { perm: perm(&ds.msg_perm), size: ds.msg_qbytes, messages }
            }
        })
    }

    /// Makes an object as the one that `perm` tells of, by the creator it names.
    pub(crate) fn create(self, perm: &Perm, size: u64) -> io::Result<()> {
        // With the next id taken, the kernel would choose another one.
        fs::write(format!("/proc/sys/kernel/{}_next_id", self.name()), perm.id.to_string())?;
        let id = as_user(perm.cuid, perm.cgid, || self.get(perm, size))?;
        if id != perm.id {
            self.remove(id)?;
            return Err(io::Error::other(format!("id {} is taken", perm.id)));
        }
        self.set(perm, size)
    }

    fn get(self, perm: &Perm, size: u64) -> io::Result<i32> {
        let size = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidData)?;
        let mode = (perm.mode & 0o777).cast_signed() | libc::IPC_CREAT | libc::IPC_EXCL;
        // SAFETY: these calls take numbers only.
        checked(unsafe {
            match self {
                Self::Segment => libc::shmget(perm.key, size, mode),
                Self::Set => libc::semget(perm.key, i32::try_from(size).unwrap_or(-1), mode),
                Self::Queue => libc::msgget(perm.key, mode),
            }
        })
    }

    /// Gives an object its owner and mode, and a queue its size.
    fn set(self, perm: &Perm, size: u64) -> io::Result<()> {
        let id = perm.id;
        let own = |to: &mut libc::ipc_perm| {
            (to.uid, to.gid) = (perm.uid, perm.gid);
            #[allow(clippy::cast_possible_truncation, reason = "nine bits")]
            let mode = (perm.mode & 0o777) as u16;
            to.mode = mode;
        };
        // SAFETY: each call reads the struct of its kind, which lives across it.
        checked(unsafe {
            match self {
                Self::Segment => {
                    let mut ds = segment_ds(id)?;
                    own(&mut ds.shm_perm);
                    libc::shmctl(id, libc::IPC_SET, &raw mut ds)
                }
                Self::Set => {
                    let mut ds = set_ds(id)?;
                    own(&mut ds.sem_perm);
                    libc::semctl(id, 0, libc::IPC_SET, &raw mut ds)
                }
                Self::Queue => {
                    let mut ds = queue_ds(id)?;
                    own(&mut ds.msg_perm);
                    ds.msg_qbytes = size;
                    libc::msgctl(id, libc::IPC_SET, &raw mut ds)
                }
            }
        })
        .map(drop)
    }

    /// Removes an object; a segment that is attached, once it no longer is.
    pub(crate) fn remove(self, id: i32) -> io::Result<()> {
        // SAFETY: with IPC_RMID these calls take numbers only.
        checked(unsafe {
            match self {
                Self::Segment => libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()),
                Self::Set => libc::semctl(id, 0, libc::IPC_RMID),
                Self::Queue => libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()),
            }
        })
        .map(drop)
    }
}

fn segment_ds(id: i32) -> io::Result<libc::shmid_ds> {
    // SAFETY: plain data, for which zeros are valid; the kernel fills it.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes one `shmid_ds`, which `ds` is.
    checked(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut ds) })?;
    Ok(ds)
}

fn set_ds(id: i32) -> io::Result<libc::semid_ds> {
    // SAFETY: plain data, for which zeros are valid; the kernel fills it.
    let mut ds: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes one `semid_ds`, which `ds` is.
    checked(unsafe { libc::semctl(id, 0, libc::IPC_STAT, &raw mut ds) })?;
    Ok(ds)
}

fn queue_ds(id: i32) -> io::Result<libc::msqid_ds> {
    // SAFETY: plain data, for which zeros are valid; the kernel fills it.
    let mut ds: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes one `msqid_ds`, which `ds` is.
    checked(unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut ds) })?;
    Ok(ds)
}

/// Does something under another effective user, in this thread only: glibc's
/// functions would change them all.
fn as_user<T>(uid: u32, gid: u32, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let set = |number, id: u32| {
        let keep = libc::c_long::from(-1);
        // SAFETY: takes numbers only.
        match unsafe { libc::syscall(number, keep, libc::c_long::from(id), keep) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let (my_uid, my_gid) = (Uid::effective().as_raw(), Gid::effective().as_raw());
    set(libc::SYS_setresgid, gid)?;
    let done = set(libc::SYS_setresuid, uid).and_then(|()| work());
    set(libc::SYS_setresuid, my_uid)?;
    set(libc::SYS_setresgid, my_gid)?;
    done
}

/// The values of all `n` semaphores of a set.
pub(crate) fn values(id: i32, n: u64) -> io::Result<Vec<u16>> {
    let mut values = vec![0_u16; usize::try_from(n).map_err(io::Error::other)?];
    // SAFETY: writes one number for each semaphore; a set never changes its size.
    checked(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) })?;
    Ok(values)
}

/// Sets the values of all semaphores of a set.
pub(crate) fn set_values(id: i32, values: &[u16]) -> io::Result<()> {
    if set_ds(id)?.sem_nsems != values.len() as u64 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // SAFETY: reads one number for each semaphore, and there are as many.
    checked(unsafe { libc::semctl(id, 0, libc::SETALL, values.as_ptr()) }).map(drop)
}

/// A copy of message `n` of a queue that holds `room` bytes in all: its type
/// and text.
pub(crate) fn peek(id: i32, n: u64, room: u64) -> io::Result<(i64, Vec<u8>)> {
    let mut buf = vec![0_u64; usize::try_from(room / 8 + 2).map_err(io::Error::other)?];
    let n = i64::try_from(n).map_err(io::Error::other)?;
    let room = (buf.len() - 1) * 8;
    let flags = libc::MSG_COPY | libc::IPC_NOWAIT;
    // SAFETY: writes the type and at most `room` bytes behind it.
    let len = unsafe { libc::msgrcv(id, buf.as_mut_ptr().cast(), room, n, flags) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    let mut text: Vec<u8> = buf[1..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    text.truncate(len);
    Ok((buf[0].cast_signed(), text))
}

/// Puts a message into a queue.
pub(crate) fn send(id: i32, kind: i64, text: &[u8]) -> io::Result<()> {
    let mut message = kind.to_ne_bytes().to_vec();
    message.extend_from_slice(text);
    // SAFETY: reads the type and `text.len()` bytes behind it.
    checked(unsafe { libc::msgsnd(id, message.as_ptr().cast(), text.len(), libc::IPC_NOWAIT) })
        .map(drop)
}

/// Locks a segment in memory.
pub(crate) fn lock(id: i32) -> io::Result<()> {
    // SAFETY: with SHM_LOCK it takes numbers only.
    checked(unsafe { libc::shmctl(id, libc::SHM_LOCK, std::ptr::null_mut()) }).map(drop)
}

/// A segment that we have attached; dropping it detaches it.
pub(crate) struct Attached(usize);

impl Attached {
    /// Attaches segment `id`, of `size` bytes, and opens the file it is made of.
    pub(crate) fn new(id: i32, size: u64, write: bool) -> io::Result<(Self, File)> {
        let flags = if write { 0 } else { libc::SHM_RDONLY };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::shmat(id, std::ptr::null(), flags) } as usize;
        if at == usize::MAX {
            return Err(io::Error::last_os_error());
        }
        let attached = Self(at);
        let end = at as u64 + size.next_multiple_of(super::memory::PAGE);
        let path = format!("/proc/self/map_files/{at:x}-{end:x}");
        let file = OpenOptions::new().read(true).write(write).open(path)?;
        Ok((attached, file))
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: attached by us, and no reference into it was ever made.
        unsafe { libc::shmdt(self.0 as *const libc::c_void) };
    }
}
