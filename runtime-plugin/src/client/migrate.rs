//! `migrate` and `can-migrate`.

use std::time::Duration;

use anyhow::Result;
use dunlin_api::rest::{Migration, MigrationState, SourceState};
use dunlin_api::{ErrorCode, Problem};
use tokio::signal::ctrl_c;
use tokio::time::{Instant, sleep_until};

use super::progress::Progress;
use super::{DONE, FAILED, IN_DOUBT, Migrate, REFUSED, show};
use crate::commands::{print, print_json};
use crate::log::say;

/// How long a doubt is waited for before the user hears of it.
const DOUBT: Duration = Duration::from_secs(10);

/// Moves a container and follows it until that is over.
pub(crate) async fn migrate(args: &Migrate) -> Result<u8> {
    let client = args.common.client();
    let mut migration = client.migrate(&args.id, &args.request()).await?;
    let mut events = client.events(migration.id).await?;
    let mut progress = Progress::new(&args.id, &args.to);
    let mut doubt: Option<Instant> = None;
    loop {
        let patience = async {
            match doubt {
                Some(since) => sleep_until(since + DOUBT).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = events.next() => match event? {
                Some(event) => {
                    progress.show(&event);
                    if is_in_doubt(&event) {
                        doubt = doubt.or(Some(Instant::now()));
                    }
                    migration = event;
                }
                None => break,
            },
            interrupted = ctrl_c() => {
                interrupted?;
                progress.say("interrupted: cancelling");
                if let Err(problem) = client.cancel(migration.id).await {
                    progress.say(&problem.to_string());
                }
            }
            () = patience => break,
        }
    }
    progress.end();
    if args.common.json {
        print_json(&migration)?;
    } else if let Some(report) = &migration.report {
        print(&show::report(&migration, report))?;
    } else if migration.state.is_success() {
        print(&format!("{} runs at {}", migration.container, migration.peer))?;
    }
    Ok(outcome(&migration))
}

/// Says how the world stands now, and gives the exit code.
fn outcome(migration: &Migration) -> u8 {
    let id = &migration.container;
    if migration.state.is_success() {
        return DONE;
    }
    if is_in_doubt(migration) {
        say(&format!("{id} is in doubt: {} has not said whether it runs there", migration.peer));
        say(&format!("{id} stays stopped; the shim goes on asking (migration {})", migration.id));
        return IN_DOUBT;
    }
    let unknown = || Problem::new(ErrorCode::Internal, id.as_str(), "the shim does not say why");
    let problem = migration.error.clone().unwrap_or_else(unknown);
    say(&format!("cannot migrate {id}: {problem}"));
    say(&match problem.code {
        ErrorCode::NotRunning => format!("{id} has no running process"),
        _ => format!("{id} runs on as before"),
    });
    if problem.code.is_refusal() { REFUSED } else { FAILED }
}

fn is_in_doubt(migration: &Migration) -> bool {
    migration.state == MigrationState::Out(SourceState::InDoubt)
}

/// Shows the verdict.
pub(crate) async fn can_migrate(args: &Migrate) -> Result<u8> {
    let verdict = args.common.client().can_migrate(&args.id, &args.request()).await?;
    if args.common.json {
        print_json(&verdict)?;
    } else {
        print(&show::verdict(&args.id, &args.to, &verdict))?;
    }
    Ok(if verdict.movable { DONE } else { REFUSED })
}
