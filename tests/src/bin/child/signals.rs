//! Signals: actions, pending ones, and a handler at work.

use std::os::raw::c_int;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sys::signal::{SigSet, Signal, kill, raise};
use nix::unistd::{getpid, getuid};

use crate::fork::{fork, ready};
use crate::sys::{self, AltStack, Info, Mapping, PAGE};
use crate::world::{Scenario, wait_for_question};

static CAUGHT: AtomicI32 = AtomicI32::new(0);
static HANDLER_SP: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_signal(signal: c_int) {
    CAUGHT.store(signal, Ordering::SeqCst);
}

/// Pending signals of thread and process, real-time ones with their values in
/// their order.
pub(crate) fn signals_pending() -> Result<Scenario> {
    let (first, second) = (libc::SIGRTMIN() + 3, libc::SIGRTMIN() + 4);
    let (pid, uid) = (getpid().as_raw(), getuid().as_raw());
    let sent = [libc::SIGUSR1, libc::SIGTERM, libc::SIGCHLD, first, second];
    sys::block(&sent)?;
    sys::tgkill(libc::SIGUSR1)?;
    kill(getpid(), Signal::SIGTERM)?;
    let child = fork(|| {
        ready()?;
        sys::exit(3)
    })?;
    nix::sys::wait::waitpid(child.0, None)?;
    for (signal, value) in [(first, 1), (second, 99), (first, 2), (first, 3)] {
        sys::queue(signal, value)?;
    }
    let user = |signal, code| Info { signal, code, pid, uid, value: 0 };
    let queued = |signal, value| Info { value, ..user(signal, libc::SI_QUEUE) };
    let expected = vec![
        user(libc::SIGUSR1, libc::SI_TKILL),
        user(libc::SIGTERM, libc::SI_USER),
        // The value's place holds the exit status.
        Info { pid: child.0.as_raw(), value: 3, ..user(libc::SIGCHLD, libc::CLD_EXITED) },
        queued(first, 1),
        queued(first, 2),
        queued(first, 3),
        queued(second, 99),
    ];
    let check = |expected: &mut Vec<Info>| {
        for expected in expected.iter() {
            let got = sys::take(expected.signal).with_context(|| format!("no {expected:?}"))?;
            ensure!(got == *expected, "{got:?} instead of {expected:?}");
        }
        let left = expected.iter().find_map(|sent| sys::take(sent.signal).ok());
        ensure!(left.is_none(), "one too many: {left:?}");
        Ok(())
    };
    let spoil = |expected: &mut Vec<Info>| sys::take(expected[3].signal).map(drop);
    Scenario::new(expected, check, spoil)
}

/// What is to be done on each signal, in every detail the kernel keeps.
pub(crate) fn signals_actions() -> Result<Scenario> {
    for (signal, flags) in [
        (Signal::SIGHUP, libc::SA_RESTART),
        (Signal::SIGINT, libc::SA_NODEFER | libc::SA_ONSTACK),
        (Signal::SIGTERM, libc::SA_RESETHAND),
        (Signal::SIGCHLD, libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT),
    ] {
        sys::handle(signal, on_signal, flags)?;
    }
    sys::ignore(Signal::SIGQUIT)?;
    sys::ignore(Signal::SIGWINCH)?;
    let check = |before: &mut Vec<[usize; 4]>| {
        let after = sys::actions()?;
        for (signal, (before, after)) in before.iter().zip(&after).enumerate() {
            ensure!(before == after, "signal {}: {before:x?} became {after:x?}", signal + 1);
        }
        for signal in [Signal::SIGHUP, Signal::SIGTERM] {
            raise(signal)?;
            ensure!(CAUGHT.load(Ordering::SeqCst) == signal as i32, "{signal} was not caught");
        }
        let default = sys::actions()?[Signal::SIGTERM as usize - 1][0];
        ensure!(default == libc::SIG_DFL, "SA_RESETHAND was lost");
        Ok(raise(Signal::SIGQUIT)?)
    };
    let spoil = |_: &mut Vec<[usize; 4]>| sys::ignore(Signal::SIGHUP);
    Scenario::new(sys::actions()?, check, spoil)
}

/// Waits for the question inside a handler, on a stack of its own.
extern "C" fn wait_on_stack(signal: c_int) {
    let local = 0_u8;
    HANDLER_SP.store(&raw const local as usize, Ordering::SeqCst);
    let inside = sys::altstack().is_ok_and(|AltStack(_, flags, _)| flags == libc::SS_ONSTACK);
    let waited = wait_for_question();
    let masked = SigSet::thread_get_mask().is_ok_and(|mask| mask.contains(Signal::SIGUSR1));
    let still = sys::altstack().is_ok_and(|AltStack(_, flags, _)| flags == libc::SS_ONSTACK);
    if inside && still && masked && waited.is_ok() {
        CAUGHT.store(signal, Ordering::SeqCst);
    }
}

/// A signal stack that is in use, and the frame on it that leads back.
pub(crate) fn signals_altstack() -> Result<Scenario> {
    let stack = Mapping::anonymous(32 * PAGE)?;
    sys::set_altstack(stack)?;
    sys::handle(Signal::SIGUSR1, wait_on_stack, libc::SA_ONSTACK)?;
    let check = |(stack, before): &mut (Mapping, AltStack)| {
        ensure!(CAUGHT.load(Ordering::SeqCst) == libc::SIGUSR1, "the handler lost its stack");
        let sp = HANDLER_SP.load(Ordering::SeqCst);
        ensure!((stack.addr..stack.addr + stack.len).contains(&sp), "it ran elsewhere");
        let after = sys::altstack()?;
        ensure!(after == *before, "the signal stack was {before:?} and is {after:?}");
        let masked = SigSet::thread_get_mask()?.contains(Signal::SIGUSR1);
        ensure!(!masked, "the mask was not taken back");
        Ok(())
    };
    let spoil = |(stack, _): &mut (Mapping, AltStack)| sys::set_altstack(stack.part(0..16 * PAGE));
    let state = (stack, sys::altstack()?);
    Scenario::waiting(state, |_| Ok(raise(Signal::SIGUSR1)?), check, spoil)
}
