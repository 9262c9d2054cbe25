//! Log lines and the last words of a command that failed.
//!
//! containerd and podman read the `--log` file: one JSON object a line with
//! `level`, `msg` and `time`, as runc writes them. podman parses the file as a
//! single object, so a failure writes exactly one line unless more was asked
//! for.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use liboci_cli::GlobalOpts;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Context as LayerContext, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// An error together with how the world stands after it.
#[derive(Debug, thiserror::Error)]
#[error("{now}")]
pub(crate) struct Aftermath {
    now: String,
    #[source]
    cause: anyhow::Error,
}

/// Adds to an error what the user finds after it.
pub(crate) trait Afterwards<T> {
    /// Says how the world stands now that this failed.
    fn afterwards(self, now: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Afterwards<T> for Result<T> {
    fn afterwards(self, now: impl FnOnce() -> String) -> Self {
        self.map_err(|cause| Aftermath { now: now(), cause }.into())
    }
}

/// Starts logging to `--log` or stderr.
pub(crate) fn init(opts: &GlobalOpts, level: Option<&str>) -> Result<()> {
    let filter = match level {
        Some(level) => {
            let level = LevelFilter::from_str(level)
                .with_context(|| format!("unknown log level {level}"))?;
            Targets::new().with_default(level)
        }
        None if opts.debug => Targets::new().with_default(LevelFilter::DEBUG),
        // The crates below log every error on its way up; we say it once.
        None => Targets::new().with_target("dunlin", LevelFilter::WARN),
    };
    let registry = tracing_subscriber::registry().with(Hearsay::new()?);
    let layer = tracing_subscriber::fmt::layer().with_ansi(false);
    match (&opts.log, is_json(opts)?) {
        (Some(path), json) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("cannot open log file {}", path.display()))?;
            let layer = layer.with_writer(file);
            if json {
                registry.with(layer.event_format(Lines).with_filter(filter)).init();
            } else {
                registry.with(layer.with_filter(filter)).init();
            }
        }
        (None, true) => {
            let layer = layer.with_writer(io::stderr).event_format(Lines);
            registry.with(layer.with_filter(filter)).init();
        }
        (None, false) => {
            registry.with(layer.with_writer(io::stderr).with_filter(filter)).init();
        }
    }
    Ok(())
}

/// Says why the command failed, on stderr and in the log.
pub(crate) fn report(opts: &GlobalOpts, err: &anyhow::Error, code: u8) -> ExitCode {
    let (cause, now) = match err.downcast_ref::<Aftermath>() {
        Some(Aftermath { now, cause }) => (cause, Some(now)),
        None => (err, None),
    };
    let mut text = format!("{cause:#}");
    if let Some(heard) = Hearsay::first()
        && !text.contains(&heard)
    {
        text = format!("{text}: {heard}");
    }
    let json = is_json(opts).unwrap_or(false);
    if opts.log.is_some() || json {
        tracing::error!("{text}");
    }
    if opts.log.is_some() || !json {
        // Callers look for the word, in the suites of other runtimes too.
        say(&format!("error: {text}"));
        if let Some(now) = now {
            say(now);
        }
    }
    ExitCode::from(code)
}

/// Writes one line to stderr; there is nobody to tell when that fails.
pub(crate) fn say(line: &str) {
    drop(writeln!(io::stderr(), "{line}"));
}

fn is_json(opts: &GlobalOpts) -> Result<bool> {
    match opts.log_format.as_deref() {
        None | Some("text") => Ok(false),
        Some("json") => Ok(true),
        Some(other) => bail!("unknown log format {other}; it is text or json"),
    }
}

/// What went wrong first inside a process of libcontainer's.
///
/// Of an error in the process that was to become a container's init only the
/// outermost words come back to us; the cause is in its log alone. A pipe that
/// the forks inherit brings it here.
struct Hearsay {
    mouth: File,
}

static EAR: OnceLock<File> = OnceLock::new();

impl Hearsay {
    fn new() -> Result<Self> {
        let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let (ear, mouth) = pipe2(flags).context("cannot make a pipe")?;
        EAR.get_or_init(|| File::from(ear));
        Ok(Self { mouth: File::from(mouth) })
    }

    /// The first line said so far.
    fn first() -> Option<String> {
        let mut text = vec![0; 4096];
        let len = EAR.get()?.read(&mut text).ok()?;
        let text = String::from_utf8_lossy(&text[..len]).into_owned();
        text.lines().next().map(str::to_owned)
    }
}

impl<S: Subscriber> Layer<S> for Hearsay {
    fn on_event(&self, event: &Event<'_>, _: LayerContext<'_, S>) {
        let meta = event.metadata();
        if *meta.level() != Level::ERROR || !meta.target().starts_with("libc") {
            return;
        }
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        let Fields(mut fields) = fields;
        let mut line = match fields.remove("msg") {
            Some(Value::String(message)) => message,
            _ => String::new(),
        };
        for (name, value) in fields {
            line.push_str(&format!(" {name}={}", value.as_str().unwrap_or_default()));
        }
        // Full or closed: then the cause stays unsaid.
        drop(writeln!(&self.mouth, "{}", line.replace('\n', " ")));
    }
}

/// Formats an event as runc does in its JSON log.
struct Lines;

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        let level = if level == "warn" { "warning".into() } else { level };
        fields.0.insert("level".into(), level.into());
        fields.0.insert("time".into(), time.into());
        writeln!(writer, "{}", Value::Object(fields.0))
    }
}

/// Collects the fields of an event.
struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let name = if field.name() == "message" { "msg" } else { field.name() };
        self.0.insert(name.into(), value.into());
    }
}
