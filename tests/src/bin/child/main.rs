//! A program that is moved and then asks itself whether its world is whole.
//!
//! `child DIR SCENARIO MOOD` sets its world up, says `ready` into the FIFO
//! `DIR/report`, and on SIGUSR2 says `ok` or what is wrong.
#![allow(clippy::unit_arg, reason = "a check or a damage in one expression reads best")]

mod counter;
mod fork;
mod memory;
mod sys;
mod threads;
mod world;

use anyhow::{Result, bail};
use dunlin_tests::{Skipped, for_each_scenario};

use counter::{clocks, counter, heap};
use memory::{
    memory_advice, memory_cow, memory_file, memory_private, memory_shared, memory_sparse,
    memory_stack,
};
use threads::{threads_16, threads_1000, threads_one, threads_robust};
use world::Scenario;

macro_rules! set_up {
    ($($name:ident)*) => {
        fn set_up(scenario: &str) -> Result<Scenario> {
            match scenario {
                $(stringify!($name) => $name(),)*
                _ => bail!("no scenario {scenario}"),
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
