//! Threads and what each has of its own.

use std::cell::Cell;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{Builder, JoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::gettid;

use crate::fork::{Fork, fork, on_question};
use crate::sys::{self, Mapping, PAGE};
use crate::world::{Scenario, compute};

thread_local! {
    static OWN: Cell<usize> = const { Cell::new(0) };
}

/// What a thread can ask the kernel about itself.
#[derive(Debug, PartialEq)]
struct Traits {
    tid: i32,
    name: Vec<u8>,
    mask: SigSet,
    stack: sys::AltStack,
    robust: usize,
    local: usize,
    nice: i32,
}

impl Traits {
    fn read() -> Result<Self> {
        Ok(Self {
            tid: gettid().as_raw(),
            name: prctl::get_name()?.into_bytes(),
            mask: SigSet::thread_get_mask()?,
            stack: sys::altstack()?,
            robust: sys::robust_list()?,
            local: OWN.get(),
            nice: rustix::process::getpriority_process(None)?,
        })
    }
}

/// Threads that sleep on a condition until they are let go.
struct Threads {
    gate: Arc<(Mutex<bool>, Condvar)>,
    threads: Vec<JoinHandle<Result<()>>>,
}

pub(crate) fn threads_one() -> Result<Scenario> {
    threads(1)
}

pub(crate) fn threads_16() -> Result<Scenario> {
    threads(16)
}

pub(crate) fn threads_1000() -> Result<Scenario> {
    threads(1000)
}

fn threads(count: usize) -> Result<Scenario> {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let arrived = Arc::new(std::sync::Barrier::new(count + 1));
    let mut threads = Vec::new();
    for n in 1..=count {
        let (gate, arrived) = (Arc::clone(&gate), Arc::clone(&arrived));
        let builder = Builder::new().name(format!("worker {n}")).stack_size(128 << 10);
        threads.push(builder.spawn(move || {
            OWN.set(n);
            let mut mask = SigSet::empty();
            mask.add([Signal::SIGHUP, Signal::SIGINT, Signal::SIGWINCH, Signal::SIGURG][n % 4]);
            mask.thread_block()?;
            rustix::process::setpriority_process(None, i32::try_from(n % 5)?)?;
            let before = Traits::read()?;
            arrived.wait();
            let (open, changed) = &*gate;
            drop(changed.wait_while(open.lock().map_err(|_| anyhow!("poisoned"))?, |open| !*open));
            let after = Traits::read()?;
            ensure!(before == after, "thread {n}: {before:?} became {after:?}");
            // glibc takes this from its rseq area.
            ensure!(rustix::thread::sched_getcpu() < 4096, "no cpu number");
            compute(&mut [0; 4096], u64::try_from(n)?)
        })?);
    }
    arrived.wait();
    let check = |state: &mut Threads| {
        let (open, changed) = &*state.gate;
        *open.lock().map_err(|_| anyhow!("poisoned"))? = true;
        changed.notify_all();
        for thread in state.threads.drain(..) {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        // And new ones can be made.
        std::thread::spawn(|| OWN.set(1)).join().map_err(|_| anyhow!("a new thread panicked"))
    };
    let spoil = |state: &mut Threads| {
        // Any thread's name will do; the last one's tid is the highest.
        let last = std::fs::read_dir("/proc/self/task")?
            .filter_map(|task| task.ok()?.file_name().into_string().ok());
        let own = gettid().to_string();
        let tid = last.into_iter().find(|tid| *tid != own).context("no thread")?;
        ensure!(!state.threads.is_empty());
        Ok(std::fs::write(format!("/proc/self/task/{tid}/comm"), "renamed")?)
    };
    Scenario::new(Threads { gate, threads }, check, spoil)
}

/// A robust mutex in shared memory: when its owner dies the next one is told.
pub(crate) fn threads_robust() -> Result<Scenario> {
    let memory = Mapping::shared(PAGE)?;
    sys::robust_mutex(memory)?;
    let owner = fork(move || {
        ensure!(sys::robust_lock(memory) == 0, "the child cannot lock");
        on_question(|| Ok(())) // and dies with the lock held
    })?;
    let check = |(memory, owner): &mut (Mapping, Fork)| {
        owner.ask()?;
        let told = sys::robust_lock(*memory);
        ensure!(told == libc::EOWNERDEAD, "locking after the owner's death gave {told}");
        Ok(())
    };
    let spoil = |(memory, _): &mut (Mapping, Fork)| sys::robust_mutex(*memory);
    Scenario::new((memory, owner), check, spoil)
}
