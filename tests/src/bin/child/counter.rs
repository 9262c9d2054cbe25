//! The smallest worlds: numbers in memory, and clocks.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};
use nix::time::{ClockId, clock_gettime};

use crate::world::{Random, Scenario, compute};

static STATIC: AtomicU64 = AtomicU64::new(0);

/// Numbers in static memory and on the heap.
pub(crate) fn counter() -> Result<Scenario> {
    STATIC.store(0x1234_5678, Ordering::SeqCst);
    let mut random = Random(7);
    let heap: Vec<u64> = (0..100_000).map(|_| random.word()).collect();
    let check = |heap: &mut Vec<u64>| {
        ensure!(STATIC.load(Ordering::SeqCst) == 0x1234_5678, "static memory changed");
        let mut random = Random(7);
        let wrong = heap.iter().position(|word| *word != random.word());
        ensure!(wrong.is_none(), "the heap differs at word {wrong:?}");
        Ok(())
    };
    let spoil = |heap: &mut Vec<u64>| {
        heap[77_777] ^= 1;
        Ok(())
    };
    Scenario::new(heap, check, spoil)
}

/// Many blocks of all sizes, half of them freed, in an allocator that must go on.
pub(crate) fn heap() -> Result<Scenario> {
    let mut blocks: Vec<Vec<u8>> = (1..2000).map(|n| vec![0; n * 97 % 50_000 + 1]).collect();
    for (block, seed) in blocks.iter_mut().zip(1..) {
        compute(block, seed)?;
    }
    let mut kept: Vec<(u64, Vec<u8>)> = (1..).zip(blocks).collect();
    kept.retain(|(seed, _)| seed % 2 == 0);
    let check = |kept: &mut Vec<(u64, Vec<u8>)>| {
        for _ in 0..3 {
            for (seed, block) in kept.iter_mut() {
                let mut expected = vec![0; block.len()];
                compute(&mut expected, *seed)?;
                ensure!(*block == expected, "block {seed} changed");
                // Let the allocator free and reuse.
                *block = expected;
                block.extend_from_slice(&[]);
            }
            kept.reverse();
        }
        Ok(())
    };
    let spoil = |kept: &mut Vec<(u64, Vec<u8>)>| {
        kept[500].1[3] ^= 1;
        Ok(())
    };
    Scenario::new(kept, check, spoil)
}

const CLOCKS: [ClockId; 3] =
    [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_BOOTTIME, ClockId::CLOCK_REALTIME];

/// Clocks that must neither stand nor jump.
pub(crate) fn clocks() -> Result<Scenario> {
    let read = CLOCKS.map(clock_gettime);
    let check = |read: &mut [nix::Result<nix::sys::time::TimeSpec>; 3]| {
        for (clock, before) in CLOCKS.into_iter().zip(read) {
            let passed = clock_gettime(clock)?.tv_sec() - (*before)?.tv_sec();
            ensure!((0..3600).contains(&passed), "{clock} went on by {passed} s");
        }
        Ok(())
    };
    let spoil = |read: &mut [nix::Result<nix::sys::time::TimeSpec>; 3]| {
        read[0] = Ok(nix::sys::time::TimeSpec::new(i64::MAX / 2, 0));
        Ok(())
    };
    Scenario::new(read, check, spoil)
}
