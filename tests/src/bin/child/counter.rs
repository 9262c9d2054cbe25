//! The smallest world: numbers on the stack, on the heap and in static memory.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::world::Random;

static STATIC: AtomicU64 = AtomicU64::new(0);

pub(crate) struct Counter {
    heap: Vec<u64>,
}

pub(crate) fn counter() -> Result<Counter> {
    STATIC.store(0x1234_5678, Ordering::SeqCst);
    let mut random = Random(7);
    Ok(Counter { heap: (0..100_000).map(|_| random.word()).collect() })
}

impl Scenario for Counter {
    fn check(&mut self) -> Result<()> {
        ensure!(STATIC.load(Ordering::SeqCst) == 0x1234_5678, "static memory changed");
        let mut random = Random(7);
        let wrong = self.heap.iter().position(|word| *word != random.word());
        ensure!(wrong.is_none(), "the heap differs at word {wrong:?}");
        Ok(())
    }

    fn spoil(&mut self) -> Result<()> {
        self.heap[77_777] ^= 1;
        Ok(())
    }
}
