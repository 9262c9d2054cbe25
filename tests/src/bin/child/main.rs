//! A program that is moved and then asks itself whether its world is whole.
//!
//! `child DIR SCENARIO MOOD` sets its world up, says `ready` into the FIFO
//! `DIR/report`, and on SIGUSR2 says `ok` or what is wrong.
#![allow(clippy::unit_arg, reason = "a check or a damage in one expression reads best")]

mod counter;
mod creds;
mod events;
mod fds;
mod fork;
mod memory;
mod pingpong;
mod place;
mod refused;
mod registers;
mod signals;
mod sockets;
mod sys;
mod syscalls;
mod sysv;
mod threads;
mod timers;
mod tree;
mod world;

use anyhow::{Context, Result, bail};
use dunlin_tests::{Skipped, for_each_refusal, for_each_scenario};

use counter::{clocks, counter, heap};
use creds::{
    creds_capabilities, creds_ids, creds_limits, creds_scheduling, creds_seccomp, creds_switches,
};
use events::{events_epoll, events_eventfd, events_signalfd, events_timerfd};
use fds::{fds_devices, fds_files, fds_pipes, fds_shared};
use memory::{
    memory_advice, memory_cow, memory_file, memory_of, memory_private, memory_shared,
    memory_sparse, memory_stack,
};
use pingpong::futex_pingpong;
use place::{place_directory, place_names, place_root};
use refused::{
    refused_aio, refused_block_device, refused_bpf, refused_fanotify, refused_io_uring,
    refused_mptcp, refused_namespace, refused_outside_socket, refused_sctp, refused_tcp,
    refused_traced, refused_userfaultfd,
};
use registers::{
    registers_avx, registers_avx512, registers_float, registers_general, registers_segments,
};
use signals::{signals_actions, signals_altstack, signals_pending};
use sockets::{sockets_family, sockets_listening, sockets_pairs};
use syscalls::{
    call_accept, call_clock_nanosleep, call_clock_nanosleep_until, call_epoll_wait,
    call_epoll_wait_timeout, call_flock, call_futex, call_futex_timeout, call_nanosleep, call_poll,
    call_poll_timeout, call_ppoll_timeout, call_read_pipe, call_recv, call_recv_timeout,
    call_select_timeout, call_sigtimedwait, call_sigtimedwait_timeout, call_wait4, call_write_pipe,
};
use sysv::{
    refused_shared_ipc, refused_undo, sysv_memory, sysv_queues, sysv_semaphores, sysv_waiting,
};
use threads::{threads_16, threads_1000, threads_one, threads_robust};
use timers::{timers_alarm, timers_interval, timers_overrun, timers_posix};
use tree::{
    tree_deep, tree_leaderless, tree_orphans, tree_sessions, tree_stopped, tree_wide, tree_zombies,
};
use world::Scenario;

macro_rules! movable {
    ($($name:ident)*) => {
        /// The scenario of that name, if it is one that can move.
        fn movable(scenario: &str) -> Option<fn() -> Result<Scenario>> {
            match scenario {
                $(stringify!($name) => Some($name),)*
                _ => None,
            }
        }
    };
}

for_each_scenario!(movable);

macro_rules! refused {
    ($($name:ident: $words:literal)*) => {
        /// The scenario of that name, if it is one that cannot.
        fn refused(scenario: &str) -> Option<fn() -> Result<Scenario>> {
            match scenario {
                $(stringify!($name) => Some($name),)*
                _ => None,
            }
        }
    };
}

for_each_refusal!(refused);

fn set_up(scenario: &str) -> Result<Scenario> {
    if let Some(mib) = scenario.strip_prefix("memory_of_") {
        return memory_of(mib.parse()?);
    }
    let found = movable(scenario).or_else(|| refused(scenario));
    found.with_context(|| format!("no scenario {scenario}"))?()
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, scenario, mood] = args.as_slice() else { bail!("usage: child DIR SCENARIO MOOD") };
    world::begin(dir, mood)?;
    let verdict = set_up(scenario).and_then(Scenario::run);
    match &verdict {
        Ok(()) => world::say("ok")?,
        Err(err) if err.is::<Skipped>() => world::say(&err.to_string())?,
        Err(err) => world::say(&format!("failed: {err:#}"))?,
    }
    verdict
}
