//! System calls that neither nix nor rustix wraps.
#![allow(unsafe_code, reason = "this is where the crate's system calls live")]

pub(crate) mod epoll;
pub(crate) mod fcntl;
pub(crate) mod inotify;
pub(crate) mod kcmp;
pub(crate) mod memory;
pub(crate) mod process;
pub(crate) mod ptrace;
pub(crate) mod signalfd;
pub(crate) mod sockopt;
pub(crate) mod sysv;
pub(crate) mod task;
pub(crate) mod timerfd;
pub(crate) mod tty;
pub(crate) mod unix;
pub(crate) mod userfaultfd;
