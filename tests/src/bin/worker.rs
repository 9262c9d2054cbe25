//! Runs the engine for one test; see `dunlin_tests::worker`.

use anyhow::{Result, bail};
use dunlin_tests::worker;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((verb, [])) if verb == "serve" => worker::serve(),
        Some((verb, rest)) if verb == "dump" => worker::dump(rest),
        Some((verb, rest)) if verb == "inside" => worker::inside(rest),
        Some((verb, rest)) if verb == "skeleton" => worker::become_skeleton(rest),
        _ => bail!("usage: worker serve | dump PID | inside PROGRAM ARGS… | skeleton PIPE"),
    }
}
