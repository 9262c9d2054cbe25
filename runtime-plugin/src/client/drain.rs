//! `drain`: everything moves away from this node.

use std::time::Duration;

use anyhow::Result;
use dunlin_api::client::Client;
use dunlin_api::rest::{Drain, DrainRequest, DrainState, TcpPolicy};

use super::{Common, DONE, FAILED, show, tcp_policy};
use crate::commands::{print, print_json};
use crate::log::say;

/// How often the shim is asked how far it is.
const PERIOD: Duration = Duration::from_millis(200);

/// Where everything is to go.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// URL of a shim or name of a peer; given several times, they take turns;
    /// all peers when left out
    #[arg(long, value_name = "URL")]
    to: Vec<String>,
    /// How many migrations at once
    #[arg(long)]
    parallel: Option<usize>,
    /// What becomes of established TCP connections
    #[arg(long, default_value = "refuse", value_parser = tcp_policy)]
    tcp: TcpPolicy,
    /// Take containers in again; those that left stay where they are
    #[arg(long, conflicts_with_all = ["to", "parallel"])]
    undo: bool,
    #[command(flatten)]
    common: Common,
}

/// Drains the node and waits until that is over, or undoes it.
pub(crate) async fn drain(args: &Args) -> Result<u8> {
    let client = args.common.client();
    if args.undo {
        let drain = client.undrain().await?;
        if args.common.json {
            print_json(&drain)?;
        } else {
            print("the node takes containers in again")?;
        }
        return Ok(DONE);
    }
    let (to, parallel, tcp) = (args.to.clone(), args.parallel, args.tcp);
    client.drain(&DrainRequest { to, parallel, tcp }).await?;
    let drain = follow(&client).await?;
    if args.common.json {
        print_json(&drain)?;
    } else {
        let mut migrations = Vec::with_capacity(drain.migrations.len());
        for id in &drain.migrations {
            migrations.push(client.migration(*id).await?);
        }
        print(&show::migrations(&migrations))?;
    }
    say(&format!("{} of {} containers left, {} stay", drain.moved, drain.total, drain.stayed));
    Ok(if drain.stayed == 0 { DONE } else { FAILED })
}

async fn follow(client: &Client) -> Result<Drain> {
    let mut ticks = tokio::time::interval(PERIOD);
    let mut last = usize::MAX;
    loop {
        ticks.tick().await;
        let drain = client.drain_state().await?;
        if drain.state != DrainState::Draining {
            return Ok(drain);
        }
        if last != drain.moved {
            last = drain.moved;
            say(&format!("{} of {} containers have left", drain.moved, drain.total));
        }
    }
}
