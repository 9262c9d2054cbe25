//! When to stop sending memory ahead and freeze.
//!
//! A round sends what was written while the last one was under way. The next
//! freeze will take as long as it takes to send what is written during this
//! one, so rounds go on until that fits the downtime aimed at and they no
//! longer get much shorter.

use std::time::Duration;

use dunlin_api::rest::{DOWNTIME_MS, MigrateOptions};
use dunlin_checkpoint::RoundReport;

/// Most rounds: a container that writes faster than the link carries never
/// gets done.
const MOST: u32 = 12;
/// A freeze costs about this much before the first page, on any container.
const FIXED: Duration = Duration::from_millis(3);
/// Pages below which another round gains nothing.
const FEW_PAGES: u64 = 128;

/// The rounds so far.
pub(super) struct Rounds {
    budget: Duration,
    /// How many there were.
    pub(super) count: u32,
    /// Pages sent in them.
    pub(super) pages: u64,
    /// Bytes sent in them.
    pub(super) bytes: u64,
    /// Longest stop at the beginning of one.
    pub(super) watch_us: u64,
    last: Option<Round>,
}

#[derive(Clone, Copy)]
struct Round {
    pages: u64,
    bytes: u64,
    took: Duration,
}

impl Rounds {
    pub(super) fn new(options: &MigrateOptions) -> Self {
        let ms = options.downtime_ms.unwrap_or(DOWNTIME_MS);
        let budget = Duration::from_millis(u64::from(ms));
        Self { budget, count: 0, pages: 0, bytes: 0, watch_us: 0, last: None }
    }

    /// Takes note of a round that took `took` until the destination had all of
    /// it; says why it was the last, if it was.
    pub(super) fn add(&mut self, report: &RoundReport, took: Duration) -> Option<&'static str> {
        self.count += 1;
        self.pages += report.pages;
        self.bytes += report.bytes;
        self.watch_us = self.watch_us.max(report.stopped_us);
        let round = Round { pages: report.pages, bytes: report.bytes, took };
        let before = self.last.replace(round)?;
        if round.pages < FEW_PAGES {
            return Some("little is left");
        }
        let shrinks = round.pages * 10 < before.pages * 7;
        if self.count > 2 && !shrinks {
            return Some("rounds do not get shorter");
        }
        if MOST <= self.count {
            return Some("rounds were enough");
        }
        let fits = Self::predict(before, round) <= self.budget;
        (fits && !shrinks).then_some("the rest fits the downtime")
    }

    /// How long the freeze after `round` will be. What it sent was written
    /// while the one `before` it was under way.
    fn predict(before: Round, round: Round) -> Duration {
        let written_per_s = ratio(round.bytes, before.took);
        let sent_per_s = ratio(before.bytes + round.bytes, before.took + round.took);
        let left = written_per_s * round.took.as_secs_f64();
        FIXED + Duration::try_from_secs_f64(left / sent_per_s).unwrap_or(Duration::MAX - FIXED)
    }
}

fn ratio(bytes: u64, time: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let bytes = bytes as f64;
    bytes / time.as_secs_f64().max(1e-6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(rounds: &[(u64, u64)]) -> (u32, Option<&'static str>) {
        let mut all = Rounds::new(&MigrateOptions::default());
        for &(pages, ms) in rounds {
            let report = RoundReport { pages, bytes: pages * 4096, ..RoundReport::default() };
            if let Some(why) = all.add(&report, Duration::from_millis(ms)) {
                return (all.count, Some(why));
            }
        }
        (all.count, None)
    }

    #[test]
    fn an_idle_container_takes_two() {
        assert_eq!(run(&[(262_144, 400), (10, 2)]), (2, Some("little is left")));
    }

    #[test]
    fn a_busy_one_goes_on_while_it_pays() {
        let rounds = [(262_144, 400), (40_000, 60), (6_000, 10), (5_500, 9)];
        assert_eq!(run(&rounds), (4, Some("rounds do not get shorter")));
    }

    #[test]
    fn one_that_writes_faster_than_the_link_is_given_up() {
        let rounds = [(262_144, 400), (262_144, 400), (262_144, 400)];
        assert_eq!(run(&rounds), (3, Some("rounds do not get shorter")));
    }
}
