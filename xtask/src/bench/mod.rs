//! `cargo xtask bench`: what is measured, how, and how it is told.
//!
//! A bench does the same work in several ways. Each repetition does all of
//! them one after the other, so that whatever disturbs the machine disturbs
//! all of them, and ratios are taken pair by pair within a repetition. The
//! first repetition is thrown away: memory that was free for long is slow.

mod freeze;
mod limits;
mod local;
mod machine;
mod redis;

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only benches whose name begins with one of these.
    names: Vec<String>,
    /// Also write the results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Repetitions that count.
    #[arg(long, short, default_value_t = 5)]
    repetitions: usize,
}

/// Work that can be done in several ways.
pub(crate) trait Bench {
    /// Its name, e.g. `redis-256`.
    fn name(&self) -> String;

    /// The ways to do it. The others are compared with the first.
    fn ways(&self) -> Vec<&'static str>;

    /// Does it once in the `way`th way and says what was measured.
    fn measure(&mut self, way: usize) -> Result<Vec<Sample>>;
}

/// One figure of one repetition.
pub(crate) struct Sample {
    /// What it is, e.g. `downtime`.
    pub(crate) what: &'static str,
    /// Its unit.
    pub(crate) unit: &'static str,
    /// The figure.
    pub(crate) value: f64,
}

/// A time as a figure.
pub(crate) fn milliseconds(what: &'static str, time: Duration) -> Sample {
    Sample { what, unit: "ms", value: time.as_secs_f64() * 1e3 }
}

/// What a bench found out about one figure of one way.
#[derive(Debug, Serialize)]
struct Entry {
    name: String,
    unit: &'static str,
    n: usize,
    median: f64,
    min: f64,
    max: f64,
    ratio: Option<Ratio>,
}

/// How often a figure is another one, pair by pair.
#[derive(Debug, Serialize)]
struct Ratio {
    to: String,
    median: f64,
    min: f64,
    max: f64,
}

#[derive(Serialize)]
struct Results {
    machine: machine::Machine,
    entries: Vec<Entry>,
    not_measured: Vec<String>,
}

/// Measures what `args` ask for and prints a table.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(0 < args.repetitions, "nothing is measured in no repetitions");
    let mut not_measured: Vec<String> = Vec::new();
    let wanted = |name: &str| {
        args.names.is_empty() || args.names.iter().any(|wanted| name.starts_with(wanted.as_str()))
    };
    let mut benches: Vec<Box<dyn Bench>> = Vec::new();
    let criu_lacks = redis::criu_lacks();
    not_measured.extend(criu_lacks.as_ref().map(|why| format!("runc and CRIU, because {why}")));
    benches.extend(limits::benches());
    benches.extend(freeze::benches());
    benches.extend(local::benches(criu_lacks.is_none()));
    benches.extend(redis::benches(criu_lacks.is_none()));
    benches.retain(|bench| wanted(&bench.name()));
    ensure!(!benches.is_empty(), "there is no bench of that name");
    let mut entries = Vec::new();
    for bench in &mut benches {
        println!("measuring {}", bench.name());
        entries.extend(repeat(bench.as_mut(), args.repetitions)?);
    }
    let results = Results { machine: machine::Machine::look()?, entries, not_measured };
    print!("{}", table(&results));
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_vec_pretty(&results)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Runs a bench and makes entries of its samples.
fn repeat(bench: &mut dyn Bench, repetitions: usize) -> Result<Vec<Entry>> {
    let ways = bench.ways();
    let mut series: Vec<Series> = Vec::new();
    for repetition in 0..=repetitions {
        for (way, of) in ways.iter().enumerate() {
            let samples = bench
                .measure(way)
                .with_context(|| format!("{} by {of}, repetition {repetition}", bench.name()))?;
            if repetition == 0 {
                continue;
            }
            for Sample { what, unit, value } in samples {
                match series.iter_mut().find(|s| s.way == way && s.what == what) {
                    Some(series) => series.values.push(value),
                    None => series.push(Series { way, what, unit, values: vec![value] }),
                }
            }
        }
    }
    Ok(series.iter().map(|one| one.entry(&bench.name(), &ways, &series)).collect())
}

/// All values of one figure of one way, by repetition.
struct Series {
    way: usize,
    what: &'static str,
    unit: &'static str,
    values: Vec<f64>,
}

impl Series {
    fn entry(&self, bench: &str, ways: &[&str], all: &[Self]) -> Entry {
        let name =
            |way: usize| format!("{bench} {} {}", self.what, ways[way]).trim_end().to_owned();
        let first = all.iter().find(|s| s.way == 0 && s.what == self.what);
        let ratio = first.filter(|_| self.way != 0).map(|first| {
            let ratios: Vec<f64> =
                self.values.iter().zip(&first.values).map(|(own, first)| own / first).collect();
            let (median, min, max) = spread(&ratios);
            Ratio { to: name(0), median, min, max }
        });
        let (median, min, max) = spread(&self.values);
        let n = self.values.len();
        Entry { name: name(self.way), unit: self.unit, n, median, min, max, ratio }
    }
}

/// Median, least and greatest.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else {
        return (f64::NAN, f64::NAN, f64::NAN);
    };
    let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    (f64::midpoint(low, high), *min, *max)
}

/// The results as a table in Markdown.
fn table(results: &Results) -> String {
    let mut rows =
        vec![["name", "unit", "n", "median", "min", "max", "ratio (min..max)"].map(str::to_owned)];
    for Entry { name, unit, n, median, min, max, ratio } in &results.entries {
        let ratio = ratio.as_ref().map_or_else(String::new, |Ratio { to, median, min, max }| {
            let (median, min, max) = (figure(*median), figure(*min), figure(*max));
            format!("{median} ({min}..{max}) of {to}")
        });
        let [median, min, max] = [median, min, max].map(|value| figure(*value));
        rows.push([name.clone(), (*unit).to_owned(), n.to_string(), median, min, max, ratio]);
    }
    let widths: [usize; 7] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
    let line = |row: &[String; 7]| {
        let cells = std::array::from_fn::<_, 7, _>(|i| {
            let (cell, width) = (&row[i], widths[i]);
            if (2..6).contains(&i) { format!("{cell:>width$}") } else { format!("{cell:width$}") }
        });
        format!("| {} |\n", cells.join(" | "))
    };
    let rule = widths.map(|width| "-".repeat(width));
    let mut text = format!("\n{}\n", results.machine);
    text += &line(&rows[0]);
    text += &line(&rule);
    text.extend(rows[1..].iter().map(line));
    for what in &results.not_measured {
        text += &format!("\nNot measured: {what}");
    }
    text + "\n"
}

/// A figure with four digits that mean something.
fn figure(value: f64) -> String {
    match value.abs() {
        1000.0.. => format!("{value:.0}"),
        100.0.. => format!("{value:.1}"),
        10.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives 10, 20, 30 … one way and twice of it the other, 1000 more at first.
    struct Counted(f64);

    impl Bench for Counted {
        fn name(&self) -> String {
            "counted".to_owned()
        }

        fn ways(&self) -> Vec<&'static str> {
            vec!["one", "two"]
        }

        fn measure(&mut self, way: usize) -> Result<Vec<Sample>> {
            if way == 0 {
                self.0 += 10.0;
            }
            let value = if way == 0 { self.0 } else { 2.0 * self.0 };
            let value = if self.0 <= 10.0 { value + 1000.0 } else { value };
            Ok(vec![Sample { what: "time", unit: "ms", value }])
        }
    }

    #[test]
    fn the_first_repetition_is_thrown_away_and_ratios_are_taken_in_pairs() {
        let entries = repeat(&mut Counted(0.0), 3).unwrap();
        let [one, two] = &entries[..] else { panic!("{entries:?}") };
        assert_eq!((one.name.as_str(), one.n), ("counted time one", 3));
        assert_eq!([one.median, one.min, one.max], [30.0, 20.0, 40.0]);
        assert!(one.ratio.is_none());
        let ratio = two.ratio.as_ref().unwrap();
        assert_eq!(ratio.to, "counted time one");
        assert_eq!([ratio.median, ratio.min, ratio.max], [2.0, 2.0, 2.0]);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(spread(&[4.0, 1.0, 2.0, 3.0]), (2.5, 1.0, 4.0));
    }
}
