//! System calls that only the self-checking programs make.
#![allow(unsafe_code, reason = "the programs set up worlds that no safe wrapper offers")]

use std::io;

use anyhow::Result;
use nix::libc;
use nix::sys::signal::Signal;

/// Turns the C convention for failure into an error.
pub(crate) fn checked<T: Copy + PartialEq + From<i8>>(value: T) -> io::Result<T> {
    if value == T::from(-1) { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Has `handler` called on `signal`, with further `SA_` flags.
pub(crate) fn handle(signal: Signal, handler: extern "C" fn(i32), flags: i32) -> Result<()> {
    // SAFETY: all-zero is a valid `sigaction` (no flags, empty mask).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = flags;
    // SAFETY: our handlers only touch atomics.
    checked(unsafe { libc::sigaction(signal as i32, &raw const action, std::ptr::null_mut()) })?;
    Ok(())
}
