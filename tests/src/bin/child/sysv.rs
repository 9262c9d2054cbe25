//! System V shared memory, semaphores and message queues.

use std::io;

use anyhow::{Context, Result, ensure};
use nix::libc;

use crate::fork::{Fork, fork, on_question, ready};
use crate::sys::{Mapping, PAGE, call};
use crate::world::{Scenario, wait_for_question};

const CREATE: usize = (libc::IPC_CREAT | libc::IPC_EXCL) as usize;
const REMOVE: usize = libc::IPC_RMID as usize;
const STAT: usize = libc::IPC_STAT as usize;
const SET: usize = libc::IPC_SET as usize;
const NOWAIT: usize = libc::IPC_NOWAIT as usize;

/// Key, owner, creator and mode as the kernel keeps them (`struct ipc64_perm`).
type Perm = [u32; 6];

/// What a `*ctl(IPC_STAT)` tells that must not change.
fn perm(number: i64, id: usize) -> Result<Perm> {
    let mut ds = [0_u32; 64];
    let at = ds.as_mut_ptr() as usize;
    // Semaphores have a number between id and command.
    let args = if number == libc::SYS_semctl { [id, 0, STAT, at] } else { [id, STAT, at, 0] };
    call(number, [args[0], args[1], args[2], args[3], 0, 0]).context("IPC_STAT")?;
    Ok([ds[0], ds[1], ds[2], ds[3], ds[4], ds[5]])
}

/// Gives an object an owner and a mode of its own.
fn give(number: i64, id: usize, uid: u32, mode: u32) -> Result<()> {
    let mut ds = Box::new([0_u32; 64]);
    let at = ds.as_mut_ptr() as usize;
    let stat = if number == libc::SYS_semctl { [id, 0, STAT, at] } else { [id, STAT, at, 0] };
    let set = if number == libc::SYS_semctl { [id, 0, SET, at] } else { [id, SET, at, 0] };
    call(number, [stat[0], stat[1], stat[2], stat[3], 0, 0])?;
    (ds[1], ds[2], ds[5]) = (uid, uid + 1, mode);
    call(number, [set[0], set[1], set[2], set[3], 0, 0])?;
    Ok(())
}

fn segment(key: usize, len: usize) -> io::Result<usize> {
    call(libc::SYS_shmget, [key, len, CREATE | 0o640, 0, 0, 0])
}

fn attach(id: usize, len: usize, flags: i32) -> Result<Mapping> {
    let flags = usize::try_from(flags)?;
    Ok(Mapping { addr: call(libc::SYS_shmat, [id, 0, flags, 0, 0, 0])?, len })
}

fn detach(memory: Mapping) -> io::Result<usize> {
    call(libc::SYS_shmdt, [memory.addr, 0, 0, 0, 0, 0])
}

/// How often a segment is attached.
fn attachments(id: usize) -> Result<u64> {
    // `struct shmid64_ds`: perm (48), segsz, three times, two
    // pids, then the count.
    let mut ds = [0_u64; 16];
    call(libc::SYS_shmctl, [id, STAT, ds.as_mut_ptr() as usize, 0, 0, 0])?;
    Ok(ds[11])
}

struct Memory {
    keyed: usize,
    whole: Mapping,
    read_only: Mapping,
    idle: usize,
    /// Its middle is protected, its first page no longer attached.
    parts: Mapping,
    marked: (usize, Mapping),
    perms: [Perm; 2],
    child: Fork,
}

/// Segments with and without a key, attached twice, in parts, by a child, by
/// nobody, and marked to go with the last who has them.
pub(crate) fn sysv_memory() -> Result<Scenario> {
    // So that ids and places are not those of a namespace that is new.
    let gone = segment(0, PAGE)?;
    call(libc::SYS_shmctl, [gone, REMOVE, 0, 0, 0, 0])?;
    let keyed = segment(0x0d00_1122, 3 * PAGE - 100)?;
    give(libc::SYS_shmctl, keyed, 4, 0o604)?;
    let whole = attach(keyed, 3 * PAGE, 0)?;
    whole.part(0..3 * PAGE - 100).fill(1);
    let read_only = attach(keyed, 3 * PAGE, libc::SHM_RDONLY)?;
    let idle = segment(0, 2 * PAGE)?;
    let memory = attach(idle, 2 * PAGE, 0)?;
    memory.fill(2);
    detach(memory)?;
    let split = segment(0, 8 * PAGE)?;
    let parts = attach(split, 8 * PAGE, 0)?;
    parts.fill(3);
    call(libc::SYS_munmap, [parts.addr, PAGE, 0, 0, 0, 0])?;
    parts.part(3 * PAGE..5 * PAGE).protect(nix::sys::mman::ProtFlags::PROT_READ)?;
    // Marked, so that its key is free for another.
    let old = segment(0x0d00_3344, PAGE)?;
    let memory = attach(old, PAGE, 0)?;
    memory.fill(4);
    call(libc::SYS_shmctl, [old, REMOVE, 0, 0, 0, 0])?;
    segment(0x0d00_3344, PAGE)?;
    let child = fork(move || {
        on_question(|| {
            whole.part(0..3 * PAGE - 100).verify(1).context("the child's view")?;
            whole.page(1).fill(5);
            Ok(())
        })
    })?;
    let perms = [keyed, idle].map(|id| perm(libc::SYS_shmctl, id));
    let [first, second] = perms;
    let perms = [first?, second?];
    let marked = (old, memory);
    let world = Memory { keyed, whole, read_only, idle, parts, marked, perms, child };
    let check = |world: &mut Memory| {
        let Memory { keyed, whole, read_only, idle, parts, marked, perms, child } = world;
        ensure!(perm(libc::SYS_shmctl, *keyed)? == perms[0], "the owner changed");
        ensure!(perm(libc::SYS_shmctl, *idle)? == perms[1], "the owner changed");
        let found = call(libc::SYS_shmget, [0x0d00_1122, 0, 0, 0, 0, 0]).context("by its key")?;
        ensure!(found == *keyed, "the key leads to {found}, not {keyed}");
        // Twice by us, twice by the child.
        ensure!(attachments(*keyed)? == 4, "attached {} times", attachments(*keyed)?);
        whole.part(0..3 * PAGE - 100).verify(1)?;
        child.ask()?;
        read_only.page(1).verify(5).context("what the child wrote")?;
        ensure!(attachments(*keyed)? == 2, "attached {} times", attachments(*keyed)?);
        let memory = attach(*idle, 2 * PAGE, 0)?;
        memory.verify(2).context("the segment that nobody had attached")?;
        detach(memory)?;
        let parts_of = attach(find(parts)?, 8 * PAGE, 0)?;
        parts_of.verify(3)?;
        parts_of.page(4).fill(6);
        parts.page(4).verify(6).context("a part of a segment")?;
        parts_of.page(6).fill(7);
        parts.page(6).verify(7).context("another part")?;
        detach(parts_of)?;
        let (id, memory) = *marked;
        memory.verify(4)?;
        let other = call(libc::SYS_shmget, [0x0d00_3344, 0, 0, 0, 0, 0])?;
        ensure!(other != id, "the key leads to the one marked");
        detach(memory).context("cannot detach")?;
        ensure!(attachments(id).is_err(), "a marked segment outlives its last user");
        Ok(())
    };
    let spoil = |world: &mut Memory| {
        call(libc::SYS_shmctl, [world.idle, REMOVE, 0, 0, 0, 0])?;
        Ok(())
    };
    Scenario::new(world, check, spoil)
}

/// The id of the segment that is mapped in the middle of `memory`.
fn find(memory: &Mapping) -> Result<usize> {
    let start = format!("{:x}-", memory.addr + 5 * PAGE);
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let line = maps.lines().find(|line| line.starts_with(&start)).context("not mapped")?;
    Ok(line.split_whitespace().nth(4).context("no inode")?.parse()?)
}

fn semaphores(key: usize, count: usize) -> io::Result<usize> {
    call(libc::SYS_semget, [key, count, CREATE | 0o600, 0, 0, 0])
}

/// Semaphore `n`, what to add to it, flags (`struct sembuf`).
fn operate(id: usize, n: i16, add: i16, flags: i32) -> Result<()> {
    let operation = [n, add, i16::try_from(flags)?];
    call(libc::SYS_semop, [id, operation.as_ptr() as usize, 1, 0, 0, 0]).context("semop")?;
    Ok(())
}

fn value(id: usize, n: usize) -> io::Result<usize> {
    call(libc::SYS_semctl, [id, n, libc::GETVAL as usize, 0, 0, 0])
}

/// Sets of semaphores, one by its key.
pub(crate) fn sysv_semaphores() -> Result<Scenario> {
    let gone = semaphores(0, 1)?;
    let private = semaphores(0, 2)?;
    let keyed = semaphores(0x0d00_5566, 3)?;
    call(libc::SYS_semctl, [gone, 0, REMOVE, 0, 0, 0])?;
    give(libc::SYS_semctl, keyed, 7, 0o660)?;
    operate(private, 1, 32_000, 0)?;
    operate(keyed, 0, 5, 0)?;
    operate(keyed, 2, 9, 0)?;
    let world = (private, keyed, perm(libc::SYS_semctl, keyed)?);
    let check = |(private, keyed, told): &mut (usize, usize, Perm)| {
        ensure!(perm(libc::SYS_semctl, *keyed)? == *told, "the owner changed");
        let found = call(libc::SYS_semget, [0x0d00_5566, 3, 0, 0, 0, 0]).context("by its key")?;
        ensure!(found == *keyed, "the key leads to {found}, not {keyed}");
        let values = [value(*private, 0)?, value(*private, 1)?];
        ensure!(values == [0, 32_000], "the private ones are {values:?}");
        let values = [value(*keyed, 0)?, value(*keyed, 1)?, value(*keyed, 2)?];
        ensure!(values == [5, 0, 9], "those with a key are {values:?}");
        Ok(())
    };
    let spoil = |(_, keyed, _): &mut (usize, usize, Perm)| operate(*keyed, 0, -1, 0);
    Scenario::new(world, check, spoil)
}

fn send(id: usize, kind: i64, text: &[u8]) -> io::Result<()> {
    let mut message = kind.to_ne_bytes().to_vec();
    message.extend_from_slice(text);
    let args = [id, message.as_ptr() as usize, text.len(), NOWAIT, 0, 0];
    call(libc::SYS_msgsnd, args).map(drop)
}

fn receive(id: usize, kind: i64, flags: usize) -> Result<(i64, Vec<u8>)> {
    let mut message = vec![0_u8; 8 + 8192];
    let kind = usize::try_from(kind)?;
    let args = [id, message.as_mut_ptr() as usize, 8192, kind, flags, 0];
    let len = call(libc::SYS_msgrcv, args)?;
    let (kind, text) = message.split_at(8);
    Ok((i64::from_ne_bytes(kind.try_into()?), text[..len].to_vec()))
}

/// Queues: messages of several types, in order, one as long as they come, one
/// empty; a queue with less room than usual.
pub(crate) fn sysv_queues() -> Result<Scenario> {
    let gone = call(libc::SYS_msgget, [0, CREATE | 0o600, 0, 0, 0, 0])?;
    let full = call(libc::SYS_msgget, [0, CREATE | 0o600, 0, 0, 0, 0])?;
    let small = call(libc::SYS_msgget, [0x0d00_7788, CREATE | 0o622, 0, 0, 0, 0])?;
    call(libc::SYS_msgctl, [gone, REMOVE, 0, 0, 0, 0])?;
    for (kind, text) in MESSAGES {
        send(full, kind, text)?;
    }
    send(full, 3, &[b'x'; 8192])?;
    // The bytes that a queue may hold are word 11 of `struct msqid64_ds`.
    let mut ds = [0_u64; 16];
    call(libc::SYS_msgctl, [small, STAT, ds.as_mut_ptr() as usize, 0, 0, 0])?;
    ds[11] = 100;
    call(libc::SYS_msgctl, [small, SET, ds.as_mut_ptr() as usize, 0, 0, 0])?;
    let world = (full, small, perm(libc::SYS_msgctl, small)?);
    let check = |(full, small, told): &mut (usize, usize, Perm)| {
        ensure!(perm(libc::SYS_msgctl, *small)? == *told, "the owner changed");
        ensure!(receive(*full, 7, NOWAIT)? == (7, b"seven".to_vec()), "the one by its type");
        let rest = MESSAGES.into_iter().filter(|(kind, _)| *kind != 7);
        for (kind, text) in rest {
            let found = receive(*full, 0, NOWAIT)?;
            ensure!(found == (kind, text.to_vec()), "{found:?} in place of {kind}, {text:?}");
        }
        ensure!(receive(*full, 0, NOWAIT)? == (3, vec![b'x'; 8192]), "the long one");
        ensure!(receive(*full, 0, NOWAIT).is_err(), "one message too many");
        send(*small, 1, &[0; 100])?;
        ensure!(send(*small, 1, &[0; 100]).is_err(), "the queue has grown");
        Ok(())
    };
    let spoil = |(full, ..): &mut (usize, usize, Perm)| Ok(drop(receive(*full, 5, NOWAIT)?));
    Scenario::new(world, check, spoil)
}

const MESSAGES: [(i64, &[u8]); 4] = [(5, b"five"), (7, b"seven"), (1, b""), (5, b"five again")];

/// Children that wait for a semaphore and for a message while they move.
pub(crate) fn sysv_waiting() -> Result<Scenario> {
    let set = semaphores(0, 1)?;
    let queue = call(libc::SYS_msgget, [0, CREATE | 0o600, 0, 0, 0, 0])?;
    let taker = fork(move || {
        ready()?;
        operate(set, 0, -1, 0)
    })?;
    let reader = fork(move || {
        ready()?;
        let found = receive(queue, 4, 0).context("msgrcv")?;
        Ok(ensure!(found == (4, b"there".to_vec()), "{found:?}"))
    })?;
    for (child, number) in [(taker, libc::SYS_semop), (reader, libc::SYS_msgrcv)] {
        let file = format!("/proc/{}/syscall", child.0);
        while !std::fs::read_to_string(&file)?.starts_with(&format!("{number} ")) {
            std::thread::yield_now();
        }
    }
    let check = |(set, queue, taker, reader): &mut (usize, usize, Fork, Fork)| {
        operate(*set, 0, 1, 0)?;
        taker.content().context("who waited for a semaphore")?;
        ensure!(value(*set, 0)? == 0, "nobody took the semaphore");
        send(*queue, 4, b"there")?;
        reader.content().context("who waited for a message")
    };
    let spoil = |(_, queue, ..): &mut (usize, usize, Fork, Fork)| Ok(send(*queue, 4, b"gone")?);
    Scenario::new((set, queue, taker, reader), check, spoil)
}

/// A segment in a namespace in which somebody lives who left the tree.
pub(crate) fn refused_shared_ipc() -> Result<Scenario> {
    let id = segment(0, PAGE)?;
    let memory = attach(id, PAGE, 0)?;
    memory.fill(1);
    let parent = fork(|| {
        // Ends with the test, whose worker it belongs to then.
        fork(|| ready().and_then(|()| wait_for_question()))?;
        ready()
    })?;
    parent.content()?;
    let check = |memory: &mut Mapping| memory.verify(1);
    Scenario::new(memory, check, |memory| Ok(memory.fill(2)))
}

/// A semaphore that is to be given back at the end of who took it.
pub(crate) fn refused_undo() -> Result<Scenario> {
    let id = semaphores(0, 1)?;
    operate(id, 0, 1, libc::SEM_UNDO)?;
    let check = |id: &mut usize| Ok(ensure!(value(*id, 0)? == 1, "it is {}", value(*id, 0)?));
    Scenario::new(id, check, |id| operate(*id, 0, -1, 0))
}
