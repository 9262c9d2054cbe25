//! What all scenarios have in common: the question, the answer, the waiting.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::unistd::setsid;

use crate::sys;

static DIR: Mutex<Option<PathBuf>> = Mutex::new(None);
static MOOD: AtomicU8 = AtomicU8::new(0);
static ASKED: AtomicBool = AtomicBool::new(false);

/// A world that was set up, and how to look at it.
pub(crate) struct Scenario(Box<dyn FnOnce() -> Result<()>>);

impl Scenario {
    /// `check` finds out whether `state` is whole; `spoil` damages it the way
    /// a bad move would.
    pub(crate) fn new<S: 'static>(
        state: S,
        check: fn(&mut S) -> Result<()>,
        spoil: fn(&mut S) -> Result<()>,
    ) -> Result<Self> {
        Self::waiting(state, |_| wait_for_question(), check, spoil)
    }

    /// The same for a world that waits for the question in its own way.
    pub(crate) fn waiting<S: 'static>(
        mut state: S,
        wait: fn(&mut S) -> Result<()>,
        check: fn(&mut S) -> Result<()>,
        spoil: fn(&mut S) -> Result<()>,
    ) -> Result<Self> {
        Ok(Self(Box::new(move || {
            wait(&mut state)?;
            if is_to_be_spoiled() {
                spoil(&mut state).context("cannot spoil")?;
            }
            check(&mut state)
        })))
    }

    /// Says that the world stands, waits for the question, answers it.
    pub(crate) fn run(self) -> Result<()> {
        say("ready")?;
        (self.0)()
    }
}

extern "C" fn on_question(_signal: i32) {
    ASKED.store(true, Ordering::SeqCst);
}

/// Prepares for the question; it stays blocked except while we wait for it.
pub(crate) fn begin(dir: &str, mood: &str) -> Result<()> {
    set_dir(dir.into());
    MOOD.store(mood.as_bytes()[0], Ordering::SeqCst);
    setsid()?;
    question().thread_block()?;
    sys::handle(Signal::SIGUSR2, on_question, 0)?;
    std::panic::set_hook(Box::new(|info| {
        let told = say(&format!("failed: {}", info.to_string().replace('\n', " ")));
        assert!(told.is_ok(), "{told:?}");
    }));
    Ok(())
}

/// Where files of this child go, as it sees the directory now.
pub(crate) fn dir() -> PathBuf {
    DIR.lock().expect("nobody panics with it").clone().expect("begin sets it")
}

/// The directory is seen elsewhere from now on.
pub(crate) fn set_dir(dir: PathBuf) {
    *DIR.lock().expect("nobody panics with it") = Some(dir);
}

/// Tells the harness one line. The FIFO is closed again, for it is no part of
/// the world that is moved.
pub(crate) fn say(line: &str) -> Result<()> {
    let mut report = File::options().write(true).open(dir().join("report"))?;
    report.write_all(format!("{line}\n").as_bytes())?;
    Ok(())
}

/// Whether this run is to show that the check can fail.
pub(crate) fn is_to_be_spoiled() -> bool {
    MOOD.load(Ordering::SeqCst) == b'S'
}

/// Returns once SIGUSR2 came. Meanwhile sleeps, or computes if busy.
pub(crate) fn wait_for_question() -> Result<()> {
    if MOOD.load(Ordering::SeqCst) != b'B' {
        let mut meanwhile = SigSet::thread_get_mask()?;
        meanwhile.remove(Signal::SIGUSR2);
        while !ASKED.load(Ordering::SeqCst) {
            meanwhile.suspend()?;
        }
        return Ok(());
    }
    while_open(|asked| {
        // On the stack, so that no mapping comes and goes.
        let mut block = [0; 1 << 14];
        let mut seed = 1;
        while !asked.load(Ordering::SeqCst) {
            compute(&mut block, seed)?;
            seed += 1;
        }
        Ok(())
    })
}

/// Runs `body` while the question can come: it sets the flag.
pub(crate) fn while_open<T>(body: impl FnOnce(&AtomicBool) -> Result<T>) -> Result<T> {
    let mask = question().thread_swap_mask(SigmaskHow::SIG_UNBLOCK)?;
    let result = body(&ASKED);
    mask.thread_set_mask()?;
    result
}

/// Fills `block` from `seed` and proves that what was computed is what is there.
pub(crate) fn compute(block: &mut [u8], seed: u64) -> Result<()> {
    let mut random = Random(seed);
    let mut sum = 0_u64;
    for byte in block.iter_mut() {
        *byte = random.byte();
        sum = sum.wrapping_mul(31).wrapping_add(u64::from(*byte));
    }
    let again =
        block.iter().fold(0_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    ensure!(sum == again, "block {seed} sums to {again:x}, not {sum:x}");
    Ok(())
}

/// A pattern that is cheap to repeat (xorshift).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.word().to_le_bytes()[3]
    }
}

fn question() -> SigSet {
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR2);
    set
}
