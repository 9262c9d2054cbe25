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
mod registers;
mod signals;
mod sockets;
mod sys;
mod syscalls;
mod threads;
mod timers;
mod tree;
mod world;

use anyhow::{Result, bail};
use dunlin_tests::{Skipped, for_each_scenario};

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
use threads::{threads_16, threads_1000, threads_one, threads_robust};
use timers::{timers_alarm, timers_interval, timers_overrun, timers_posix};
use tree::{
    tree_deep, tree_leaderless, tree_orphans, tree_sessions, tree_stopped, tree_wide, tree_zombies,
};
use world::Scenario;

macro_rules! set_up {
    ($($name:ident)*) => {
        fn set_up(scenario: &str) -> Result<Scenario> {
            match scenario {
                $(stringify!($name) => $name(),)*
                _ => match scenario.strip_prefix("memory_of_") {
                    Some(mib) => memory_of(mib.parse()?),
                    None => bail!("no scenario {scenario}"),
                },
            }
        }
    };
}

for_each_scenario!(set_up);

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
