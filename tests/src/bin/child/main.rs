//! A program that is moved and then asks itself whether its world is whole.
//!
//! `child DIR SCENARIO MOOD` sets its world up, says `ready` into the FIFO
//! `DIR/report`, and on SIGUSR2 says `ok` or what is wrong.

mod counter;
mod sys;
mod world;

use anyhow::{Result, bail};
use dunlin_tests::{Skipped, for_each_scenario};

use counter::counter;

/// A world that was set up.
trait Scenario {
    /// Finds out whether it is whole.
    fn check(&mut self) -> Result<()>;

    /// Damages it the way a bad move would.
    fn spoil(&mut self) -> Result<()>;
}

macro_rules! set_up {
    ($($name:ident)*) => {
        fn set_up(scenario: &str) -> Result<Box<dyn Scenario>> {
            match scenario {
                $(stringify!($name) => Ok(Box::new($name()?)),)*
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
    let verdict = run(scenario);
    match &verdict {
        Ok(()) => world::say("ok")?,
        Err(err) if err.is::<Skipped>() => world::say(&err.to_string())?,
        Err(err) => world::say(&format!("failed: {err:#}"))?,
    }
    verdict
}

fn run(scenario: &str) -> Result<()> {
    let mut world = set_up(scenario)?;
    world::say("ready")?;
    world::wait_for_question()?;
    if world::is_to_be_spoiled() {
        world.spoil()?;
    }
    world.check()
}
