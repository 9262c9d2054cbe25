//! A process with a pid of our choice (`clone3(2)`).
#![allow(unsafe_code, reason = "no crate at hand wraps clone3")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Result;
use nix::libc;
use nix::unistd::Pid;

/// Starts `command` as process `pid` of our namespace.
///
/// Only for a program that has one thread: the child is a copy of it until it
/// becomes the command.
pub(crate) fn start_as(pid: Pid, command: &mut Command) -> Result<Pid> {
    let wanted = pid.as_raw();
    // SAFETY: all-zero is a valid `clone_args`.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.exit_signal = libc::SIGCHLD.unsigned_abs().into();
    args.set_tid = &raw const wanted as u64;
    args.set_tid_size = 1;
    let size = size_of::<libc::clone_args>();
    // SAFETY: `args` names no stack and shares nothing, which makes it a fork;
    // `wanted` outlives the call.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size) } {
        -1 => Err(io::Error::last_os_error().into()),
        0 => {
            let error = command.exec();
            // SAFETY: ends the copy without running what is the parent's.
            unsafe { libc::_exit(error.raw_os_error().unwrap_or(127)) }
        }
        _ => Ok(pid),
    }
}
