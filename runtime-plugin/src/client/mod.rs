//! The user's commands: they ask the node's shim and show what it answers.

mod drain;
mod migrate;
mod progress;
mod show;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use dunlin_api::Problem;
use dunlin_api::client::{Client, Endpoint};
use dunlin_api::rest::{ContainerId, Mechanism, MigrateRequest, ResolveRequest, Runs, TcpPolicy};
use uuid::Uuid;

use crate::commands::{print, print_json};
use crate::log::say;

/// What the exit codes of all these commands mean.
const CODES: &str = "Exit codes:
  0  done; a migrated container runs at its destination
  1  failed; a container that was to move runs on here
  2  wrong usage
  3  refused by the verdict: nothing was touched
  4  in doubt: the container stays stopped until its destination answers
  5  the shim of this node cannot be reached";

/// Everything done; what it means is in [`CODES`].
const DONE: u8 = 0;
const FAILED: u8 = 1;
const REFUSED: u8 = 3;
const IN_DOUBT: u8 = 4;
const NO_SHIM: u8 = 5;

/// Commands for people.
#[derive(Debug, Subcommand)]
pub(crate) enum UserCommand {
    /// Moves a running container to another node
    #[command(after_help = CODES)]
    Migrate(Migrate),
    /// Judges whether a container could move, without touching it
    #[command(after_help = CODES)]
    CanMigrate(Migrate),
    /// Shows migrations; cancels one; ends a doubt by hand
    #[command(after_help = CODES)]
    Migrations(Migrations),
    /// Shows the node
    #[command(after_help = CODES)]
    Node(Common),
    /// Moves everything away and takes nothing in any more
    #[command(after_help = CODES)]
    Drain(drain::Args),
}

/// What every command takes.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Socket of the node's shim
    #[arg(long, env = "DUNLIN_SHIM", default_value = "/run/dunlin/shim.sock")]
    pub(crate) shim: PathBuf,
    /// Print one JSON value for programs
    #[arg(long)]
    pub(crate) json: bool,
}

/// A container and where it is to go.
#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// The container
    id: ContainerId,
    /// URL of the destination's shim, or the name of a peer
    #[arg(long, value_name = "URL")]
    to: String,
    /// What becomes of established TCP connections
    #[arg(long, default_value = "refuse", value_parser = tcp_policy)]
    tcp: TcpPolicy,
    /// Absolute path of the bundle at the destination, where it differs
    #[arg(long)]
    bundle: Option<String>,
    /// Carry file locks
    #[arg(long)]
    file_locks: bool,
    /// Accept unix sockets to processes outside; they arrive closed
    #[arg(long)]
    ext_unix_sk: bool,
    /// Accept a controlling terminal from outside
    #[arg(long)]
    shell_job: bool,
    /// When memory moves: auto, total-copy (all in the freeze) or pre-copy
    #[arg(long, default_value = "auto", value_parser = mechanism)]
    mechanism: Mechanism,
    /// Downtime aimed at, in milliseconds [default: 50]
    #[arg(long, value_name = "MS")]
    downtime_ms: Option<u32>,
    #[command(flatten)]
    common: Common,
}

/// What to do with migrations.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Migrations {
    /// Show only this one
    id: Option<Uuid>,
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Option<MigrationsCommand>,
}

#[derive(Debug, Subcommand)]
enum MigrationsCommand {
    /// Cancels one; the container runs on where it is
    Cancel {
        id: Uuid,
        #[command(flatten)]
        common: Common,
    },
    /// Ends a doubt by hand; look at the destination first
    Resolve {
        id: Uuid,
        /// It does not run at the destination and never will: the stopped
        /// original runs on. Said wrongly, there are two of it from then on
        #[arg(long, required_unless_present = "there")]
        here: bool,
        /// It runs at the destination: the stopped original is ended. Said
        /// wrongly, it is lost
        #[arg(long, conflicts_with = "here")]
        there: bool,
        #[command(flatten)]
        common: Common,
    },
}

/// Runs a command and gives its exit code.
pub(crate) fn run(command: &UserCommand) -> Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (done, what) = match command {
            UserCommand::Migrate(args) => {
                (migrate::migrate(args).await, format!("migrate {}", args.id))
            }
            UserCommand::CanMigrate(args) => {
                (migrate::can_migrate(args).await, format!("judge {}", args.id))
            }
            UserCommand::Migrations(args) => (migrations(args).await, "show migrations".into()),
            UserCommand::Node(args) => (node(args).await, "show the node".into()),
            UserCommand::Drain(args) => (drain::drain(args).await, "drain the node".into()),
        };
        match done {
            Err(err) => match err.downcast_ref::<Problem>() {
                Some(problem) => {
                    say(&format!("cannot {what}: {problem}"));
                    Ok(code(problem))
                }
                None => Err(err),
            },
            done => done,
        }
    })
}

/// Exit code of a problem that the shim answered with at once.
fn code(problem: &Problem) -> u8 {
    match problem.code {
        dunlin_api::ErrorCode::PeerUnreachable if problem.object.starts_with("unix:") => NO_SHIM,
        code if code.is_refusal() => REFUSED,
        _ => FAILED,
    }
}

impl Common {
    fn client(&self) -> Client {
        Client::new(Endpoint::Unix(self.shim.clone()))
    }
}

impl Migrate {
    fn request(&self) -> MigrateRequest {
        MigrateRequest {
            to: self.to.clone(),
            bundle: self.bundle.clone(),
            tcp: self.tcp,
            file_locks: self.file_locks,
            external_unix: self.ext_unix_sk,
            shell_job: self.shell_job,
            mechanism: self.mechanism,
            downtime_ms: self.downtime_ms,
        }
    }
}

async fn migrations(args: &Migrations) -> Result<u8> {
    let (common, shown) = match &args.command {
        Some(MigrationsCommand::Cancel { id, common }) => {
            (common, vec![common.client().cancel(*id).await?])
        }
        Some(MigrationsCommand::Resolve { id, there, common, .. }) => {
            let request = ResolveRequest { runs: if *there { Runs::There } else { Runs::Here } };
            (common, vec![common.client().resolve(*id, &request).await?])
        }
        None => (
            &args.common,
            match args.id {
                Some(id) => vec![args.common.client().migration(id).await?],
                None => args.common.client().migrations().await?,
            },
        ),
    };
    match (common.json, args.id) {
        (true, Some(_)) => print_json(&shown[0])?,
        (true, None) => print_json(&shown)?,
        (false, _) => print(&show::migrations(&shown))?,
    }
    Ok(DONE)
}

async fn node(args: &Common) -> Result<u8> {
    let client = args.client();
    let node = client.node().await?;
    if args.json {
        print_json(&node)?;
    } else {
        print(&show::node(&node))?;
        print(&show::containers(&client.containers().await?))?;
    }
    Ok(DONE)
}

fn tcp_policy(text: &str) -> Result<TcpPolicy, String> {
    match text {
        "keep" => Ok(TcpPolicy::Keep),
        "close" => Ok(TcpPolicy::Close),
        "refuse" => Ok(TcpPolicy::Refuse),
        _ => Err("expected keep, close or refuse".into()),
    }
}

fn mechanism(text: &str) -> Result<Mechanism, String> {
    match text {
        "auto" => Ok(Mechanism::Auto),
        "total-copy" => Ok(Mechanism::TotalCopy),
        "pre-copy" => Ok(Mechanism::PreCopy),
        _ => Err("expected auto, total-copy or pre-copy".into()),
    }
}
