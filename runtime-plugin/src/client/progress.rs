//! How a migration goes on, live: a bar on a terminal, otherwise a line for
//! each phase.

use std::io::{IsTerminal, stderr};

use dunlin_api::rest::{ContainerId, Migration, Phase};
use indicatif::{ProgressBar, ProgressStyle};

use crate::log::say;

/// What is shown, on stderr.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    what: String,
    last: Option<Phase>,
}

impl Progress {
    /// Starts with nothing done.
    pub(crate) fn new(id: &ContainerId, to: &str) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let style = "{prefix} {msg:<12} [{bar:30}] {bytes:>10}/{total_bytes:<10} \
                         {binary_bytes_per_sec:>12} {eta:>4}";
            // The template is a constant that indicatif takes.
            let style = ProgressStyle::with_template(style).expect("the template is right");
            ProgressBar::new(0).with_style(style.progress_chars("=> ")).with_prefix(id.to_string())
        });
        Self { bar, what: format!("{id} to {to}"), last: None }
    }

    /// Shows how far it is.
    pub(crate) fn show(&mut self, event: &Migration) {
        let progress = &event.progress;
        let entered = self.last != Some(progress.phase);
        self.last = Some(progress.phase);
        match &self.bar {
            Some(bar) => {
                bar.set_length(progress.total.max(progress.bytes));
                bar.set_position(progress.bytes);
                bar.set_message(words(progress.phase));
            }
            None if entered => {
                let (words, bytes) = (words(progress.phase), progress.bytes);
                let rate = match progress.rate {
                    0 => String::new(),
                    rate => format!(", {rate} bytes/s"),
                };
                say(&format!("{}: {words}, {bytes} bytes sent{rate}", self.what));
            }
            None => {}
        }
    }

    /// Says something beside it.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => say(line),
        }
    }

    /// Takes it away.
    pub(crate) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn words(phase: Phase) -> &'static str {
    match phase {
        Phase::Checking => "checking",
        Phase::Preparing => "preparing",
        Phase::Copying => "copying",
        Phase::Frozen => "frozen",
        Phase::Switching => "switching",
        Phase::Asking => "in doubt",
        Phase::Cleaning => "cleaning up",
        Phase::Done => "done",
    }
}
