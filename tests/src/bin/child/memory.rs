//! Memory of all kinds.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags};

use crate::fork::{Fork, fork, on_question};
use crate::sys::{Mapping, PAGE, call};
use crate::world::{Scenario, dir};

const RW: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);
const GIB: usize = 1 << 30;

/// Private anonymous memory: written, untouched, only read, write-protected,
/// hidden and executable pages.
pub(crate) fn memory_private() -> Result<Scenario> {
    let memory = Mapping::anonymous(64 * PAGE)?;
    memory.part(0..16 * PAGE).fill(1);
    // Pages that were read hold the kernel's zero page; those after are holes.
    memory.part(16 * PAGE..24 * PAGE).verify_zero()?;
    memory.part(32 * PAGE..40 * PAGE).fill(2);
    memory.part(32 * PAGE..40 * PAGE).protect(ProtFlags::PROT_READ)?;
    memory.part(40 * PAGE..48 * PAGE).fill(3);
    memory.part(40 * PAGE..48 * PAGE).protect(ProtFlags::PROT_NONE)?;
    // mov eax, 42; ret
    for (byte, code) in memory.page(50).bytes().iter().zip([0xb8, 42, 0, 0, 0, 0xc3]) {
        byte.store(code, Ordering::Relaxed);
    }
    memory.page(50).protect(ProtFlags::PROT_READ | ProtFlags::PROT_EXEC)?;
    memory.page(63).protect(ProtFlags::PROT_NONE)?;
    let check = |memory: &mut Mapping| {
        memory.part(0..16 * PAGE).verify(1).context("written")?;
        memory.part(16 * PAGE..32 * PAGE).verify_zero().context("untouched")?;
        memory.part(32 * PAGE..40 * PAGE).verify(2).context("read-only")?;
        memory.part(40 * PAGE..48 * PAGE).protect(RW)?;
        memory.part(40 * PAGE..48 * PAGE).verify(3).context("hidden")?;
        ensure!(memory.page(50).execute() == 42, "executable page");
        memory.part(32 * PAGE..64 * PAGE).protect(RW)?;
        memory.fill(9);
        memory.verify(9)
    };
    let spoil = |memory: &mut Mapping| Ok(memory.page(20).bytes()[0].store(1, Ordering::Relaxed));
    Scenario::new(memory, check, spoil)
}

/// So many MiB of written memory, for the bench.
pub(crate) fn memory_of(mib: usize) -> Result<Scenario> {
    let memory = Mapping::anonymous(mib << 20)?;
    memory.fill(1);
    let spoil = |memory: &mut Mapping| Ok(memory.page(0).fill(2));
    Scenario::new(memory, |memory| memory.verify(1), spoil)
}

/// Mapped files: pages written in private mappings stay ours, pages written in
/// shared ones are the file's.
pub(crate) fn memory_file() -> Result<Scenario> {
    let path = dir().join("mapped");
    let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
    file.write_all(&vec![b'f'; 32 * PAGE])?;
    let private =
        Mapping::new(16 * PAGE, RW, MapFlags::MAP_PRIVATE, Some((file.as_fd(), 8 * 4096)))?;
    let shared = Mapping::new(16 * PAGE, RW, MapFlags::MAP_SHARED, Some((file.as_fd(), 0)))?;
    let read_only = Mapping::new(
        4 * PAGE,
        ProtFlags::PROT_READ,
        MapFlags::MAP_SHARED,
        Some((file.as_fd(), 4096)),
    )?;
    private.page(3).fill(3);
    private.page(4).fill(4);
    // What the dynamic linker does to relocated sections.
    private.page(4).protect(ProtFlags::PROT_READ)?;
    shared.page(2).fill(2);
    drop(file);
    let check = |(private, shared, read_only): &mut (Mapping, Mapping, Mapping)| {
        private.page(3).verify(3).context("private, written")?;
        private.page(4).verify(4).context("private, written, now read-only")?;
        ensure!(private.page(5).bytes()[7].load(Ordering::Relaxed) == b'f', "private, clean");
        shared.page(2).verify(2).context("shared, written")?;
        read_only.page(1).verify(2).context("shared, seen through another mapping")?;
        shared.page(1).fill(11);
        let mut on_disk = vec![0; PAGE];
        File::open(dir().join("mapped"))?.read_exact_at(&mut on_disk, 4096)?;
        private.page(3).fill(11);
        let seen = private.page(3).bytes().iter().map(|byte| byte.load(Ordering::Relaxed));
        ensure!(seen.eq(on_disk), "what is written to a shared mapping is not in the file");
        Ok(())
    };
    let spoil = |(private, ..): &mut (Mapping, Mapping, Mapping)| {
        Ok(private.page(5).bytes()[7].store(b'F', Ordering::Relaxed))
    };
    Scenario::new((private, shared, read_only), check, spoil)
}

/// Anonymous memory that parent and children share, in whole and in part.
pub(crate) fn memory_shared() -> Result<Scenario> {
    let memory = Mapping::shared(32 * PAGE)?;
    memory.part(0..8 * PAGE).fill(1);
    let child = move |seed: u64| {
        fork(move || {
            // Its mapping begins in the middle of the shared memory.
            call(libc::SYS_munmap, [memory.addr, 4 * PAGE, 0, 0, 0, 0])?;
            on_question(|| {
                memory.part(4 * PAGE..8 * PAGE).verify(2).context("what the parent wrote")?;
                memory.page(10 + usize::try_from(seed)?).fill(seed);
                Ok(())
            })
        })
    };
    let children = [child(1)?, child(2)?, child(3)?];
    let check = |(memory, children): &mut (Mapping, [Fork; 3])| {
        memory.part(0..8 * PAGE).verify(1)?;
        memory.part(4 * PAGE..8 * PAGE).fill(2);
        for (child, seed) in children.iter().zip(1..) {
            child.ask()?;
            memory.page(10 + usize::try_from(seed)?).verify(seed).context("what a child wrote")?;
        }
        Ok(())
    };
    let spoil = |(memory, _): &mut (Mapping, [Fork; 3])| {
        // What a move does that gives each process a memory of its own.
        let flags = (MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | MapFlags::MAP_ANONYMOUS).bits();
        let (prot, flags) = (usize::try_from(RW.bits())?, usize::try_from(flags)?);
        call(libc::SYS_mmap, [memory.addr, memory.len, prot, flags, usize::MAX, 0])?;
        memory.part(0..8 * PAGE).fill(1);
        Ok(())
    };
    Scenario::new((memory, children), check, spoil)
}

/// Advice and locks; whether the flags are kept shows in `smaps`, what they do
/// shows in a child.
pub(crate) fn memory_advice() -> Result<Scenario> {
    let memory = Mapping::anonymous(64 * PAGE)?;
    memory.part(0..16 * PAGE).fill(1);
    let advice =
        [libc::MADV_DONTFORK, libc::MADV_DONTDUMP, libc::MADV_WIPEONFORK, libc::MADV_NOHUGEPAGE];
    for (advice, n) in advice.into_iter().zip(0..) {
        memory.part(4 * n * PAGE..(4 * n + 3) * PAGE).advise(advice)?;
    }
    memory.part(20 * PAGE..24 * PAGE).advise(libc::MADV_HUGEPAGE)?;
    memory.part(28 * PAGE..32 * PAGE).advise(libc::MADV_SEQUENTIAL)?;
    memory.part(36 * PAGE..40 * PAGE).advise(libc::MADV_RANDOM)?;
    call(libc::SYS_mlock, [memory.addr + 44 * PAGE, 4 * PAGE, 0, 0, 0, 0])?;
    call(libc::SYS_mlock2, [memory.addr + 52 * PAGE, 4 * PAGE, 1 /* MLOCK_ONFAULT */, 0, 0, 0])?;
    let unreserved =
        Mapping::new(16 * PAGE, RW, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE, None)?;
    unreserved.page(1).fill(5);
    let check = |(memory, unreserved): &mut (Mapping, Mapping)| {
        memory.part(0..16 * PAGE).verify(1)?;
        unreserved.page(1).verify(5)?;
        let memory = *memory;
        let child = fork(move || {
            on_question(|| {
                let maps = fs::read_to_string("/proc/self/maps")?;
                ensure!(!maps.contains(&format!("{:x}-", memory.addr)), "MADV_DONTFORK was lost");
                memory.part(8 * PAGE..11 * PAGE).verify_zero().context("MADV_WIPEONFORK was lost")
            })
        })?;
        child.ask()
    };
    let spoil = |(memory, _): &mut (Mapping, Mapping)| {
        Ok(memory.part(8 * PAGE..12 * PAGE).advise(libc::MADV_KEEPONFORK)?)
    };
    Scenario::new((memory, unreserved), check, spoil)
}

/// Reservations as runtimes and sanitizers make them, little of them touched:
/// they must arrive, and must not be filled on the way.
pub(crate) fn memory_sparse() -> Result<Scenario> {
    let reserve = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    let hidden = Mapping::new(100 * GIB, ProtFlags::PROT_NONE, reserve, None)?;
    let open = Mapping::new(100 * GIB, RW, reserve, None)?;
    let touched = [
        hidden.part(50 * GIB..50 * GIB + 8 * PAGE),
        open.page(0),
        open.part(99 * GIB..99 * GIB + PAGE),
    ];
    touched[0].protect(RW)?;
    for (part, seed) in touched.iter().zip(1..) {
        part.fill(seed);
    }
    let check = |(touched, open): &mut ([Mapping; 3], Mapping)| {
        for (part, seed) in touched.iter().zip(1..) {
            part.verify(seed)?;
        }
        for key in ["VmRSS:", "VmPTE:"] {
            let status = fs::read_to_string("/proc/self/status")?;
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let size: u64 =
                line.and_then(|line| line.trim().split(' ').next()).context("no size")?.parse()?;
            ensure!(size < 64 << 10, "{key} {size} kB");
        }
        open.part(70 * GIB..70 * GIB + PAGE).verify_zero()
    };
    let spoil = |(_, open): &mut ([Mapping; 3], Mapping)| {
        Ok(open.part(10 * GIB..10 * GIB + (64 << 20)).fill(1))
    };
    Scenario::new((touched, open), check, spoil)
}

/// A mapping that grows downwards.
pub(crate) fn memory_stack() -> Result<Scenario> {
    // The place below it stays free, else it could not grow.
    let place = Mapping::anonymous(1024 * PAGE)?;
    call(libc::SYS_munmap, [place.addr, place.len, 0, 0, 0, 0])?;
    let top = place.addr + 1000 * PAGE;
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN;
    let (prot, flags) = (usize::try_from(RW.bits())?, usize::try_from(flags)?);
    call(libc::SYS_mmap, [top, 4 * PAGE, prot, flags, usize::MAX, 0])?;
    let stack = Mapping { addr: top - 10 * PAGE, len: 14 * PAGE };
    stack.part(5 * PAGE..14 * PAGE).fill(1);
    let check = |stack: &mut Mapping| {
        stack.part(5 * PAGE..14 * PAGE).verify(1)?;
        // Dies with SIGSEGV if it does not grow.
        stack.fill(2);
        stack.verify(2)
    };
    let spoil = |stack: &mut Mapping| Ok(stack.page(8).fill(3));
    Scenario::new(stack, check, spoil)
}

/// Memory that children inherited: each has its own after the first write.
pub(crate) fn memory_cow() -> Result<Scenario> {
    let memory = Mapping::anonymous(1024 * PAGE)?;
    memory.fill(1);
    let child = move |seed: u64| {
        fork(move || {
            let own = usize::try_from(seed)?;
            memory.page(own).fill(seed);
            on_question(|| {
                memory.page(own).verify(seed).context("what the child wrote before")?;
                memory.part(0..PAGE).verify(1).context("what it inherited")?;
                memory.fill(seed);
                memory.verify(seed)
            })
        })
    };
    let children = [child(2)?, child(3)?, child(4)?];
    let check = |(memory, children): &mut (Mapping, [Fork; 3])| {
        for child in children.iter() {
            child.ask()?;
            memory.verify(1).context("after a child wrote")?;
        }
        Ok(())
    };
    let spoil = |(memory, _): &mut (Mapping, [Fork; 3])| Ok(memory.page(3).fill(3));
    Scenario::new((memory, children), check, spoil)
}
