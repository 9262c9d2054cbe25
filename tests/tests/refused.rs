//! What cannot move is refused by name, and runs on as if nobody had asked.

use anyhow::{Result, bail, ensure};
use dunlin_checkpoint::{Options, TcpPolicy, inspect};
use dunlin_tests::worker::{Moved, Order};
use dunlin_tests::{Child, Mood, Place, for_each_refusal, settled, unless_skipped};

fn refused(scenario: &str, words: &str) -> Result<()> {
    unless_skipped(|| {
        let mut child = Child::spawn(scenario, Place::Plain, Mood::Idle)?;
        let before = child.facts()?;
        let verdict: Vec<String> = child.order(&Order::Inspect)?;
        let named = verdict
            .iter()
            .any(|finding| finding.starts_with("Refused: ") && finding.contains(words));
        ensure!(named, "the verdict names no {words}: {verdict:?}");
        match child.order::<Moved>(&Order::Move) {
            Ok(_) => bail!("it moved"),
            Err(err) => {
                ensure!(err.to_string().contains(words), "the error names no {words}: {err:#}")
            }
        }
        settled(&child, &before)?;
        child.verify()
    })
}

macro_rules! tests {
    ($($name:ident: $words:literal)*) => {
        $(
            #[test]
            fn $name() -> Result<()> {
                refused(stringify!($name), $words)
            }
        )*
    };
}

for_each_refusal!(tests);

#[test]
fn connections_of_the_host_are_not_kept() -> Result<()> {
    let child = Child::spawn("refused_tcp", Place::Plain, Mood::Idle)?;
    let keep = Options { tcp: TcpPolicy::Keep, ..Options::default() };
    let verdict = inspect(child.root(), &keep)?;
    let named =
        verdict.findings.iter().any(|finding| finding.reason.contains("the host's network"));
    ensure!(named && !verdict.is_movable(), "{verdict:?}");
    child.verify()
}
