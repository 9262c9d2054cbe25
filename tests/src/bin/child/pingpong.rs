//! Two processes that pass a turn back and forth without pause.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, ensure};
use rustix::thread::futex;

use crate::fork::{Fork, fork, ready};
use crate::sys::{Mapping, PAGE};
use crate::world::{Scenario, while_open};

/// Whose turn it is: even ours, odd the child's. Also the number of turns.
fn turn(memory: Mapping) -> &'static AtomicU32 {
    &memory.words()[0]
}

/// Set when the game is over.
fn over(memory: Mapping) -> &'static AtomicU32 {
    &memory.words()[1]
}

/// Takes every second turn until told to stop; each player counts his own.
fn play(memory: Mapping, player: u32, stop: impl Fn() -> bool) -> Result<()> {
    let own = &memory.words()[2 + usize::try_from(player)?];
    loop {
        let seen = turn(memory).load(Ordering::SeqCst);
        if seen % 2 != player {
            match futex::wait(turn(memory), futex::Flags::empty(), seen, None) {
                Ok(()) | Err(rustix::io::Errno::AGAIN) => continue,
                // The question came.
                Err(rustix::io::Errno::INTR) if stop() => continue,
                Err(err) => return Err(err.into()),
            }
        }
        if over(memory).load(Ordering::SeqCst) == 1 || (player == 0 && stop()) {
            over(memory).store(1, Ordering::SeqCst);
            turn(memory).store(seen + 1, Ordering::SeqCst);
            futex::wake(turn(memory), futex::Flags::empty(), 1)?;
            return Ok(());
        }
        let count = own.fetch_add(1, Ordering::SeqCst) + 1;
        ensure!(count == seen / 2 + 1, "player {player}: turn {seen}, but only {count} were taken");
        turn(memory).store(seen + 1, Ordering::SeqCst);
        futex::wake(turn(memory), futex::Flags::empty(), 1)?;
    }
}

/// Futexes in memory shared by processes, under load.
pub(crate) fn futex_pingpong() -> Result<Scenario> {
    let memory = Mapping::shared(PAGE)?;
    let child = fork(move || {
        ready()?;
        play(memory, 1, || false)
    })?;
    let wait = |(memory, _): &mut (Mapping, Fork)| {
        while_open(|asked| play(*memory, 0, || asked.load(Ordering::SeqCst)))
    };
    let check = |(memory, child): &mut (Mapping, Fork)| {
        child.content()?;
        let [ours, theirs] = [2, 3].map(|n| memory.words()[n].load(Ordering::SeqCst));
        ensure!(ours == theirs && ours > 0, "{ours} turns of ours, {theirs} of theirs");
        Ok(())
    };
    let spoil =
        |(memory, _): &mut (Mapping, Fork)| Ok(memory.words()[3].store(0, Ordering::SeqCst));
    Scenario::waiting((memory, child), wait, check, spoil)
}
