//! System calls that neither nix nor rustix wraps.
#![allow(unsafe_code, reason = "this is where the crate's system calls live")]

pub(crate) mod memory;
pub(crate) mod process;
pub(crate) mod ptrace;
pub(crate) mod task;
