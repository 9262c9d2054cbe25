//! Figures for Prometheus.

use std::sync::atomic::AtomicU64;

use dunlin_api::{
    Problem,
    rest::{Migration, MigrationState},
};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::daemon::Shim;

/// Counted since the start.
pub(crate) struct Metrics {
    registry: Registry,
    ended: Family<Ended, Counter<u64, AtomicU64>>,
    bytes: Family<Way, Counter<u64, AtomicU64>>,
    downtime: Histogram,
    running: Gauge,
    containers: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    direction: String,
    outcome: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Way {
    direction: String,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("dunlin");
        let (ended, bytes) = (Family::default(), Family::default());
        let buckets = (0..16).map(|n| 0.0005 * f64::from(1 << n));
        let downtime = Histogram::new(buckets);
        let (running, containers) = (Gauge::default(), Gauge::default());
        registry.register("migrations", "Migrations that ended", ended.clone());
        registry.register("image_bytes", "Bytes of image moved", bytes.clone());
        registry.register("downtime_seconds", "Time a container stood still", downtime.clone());
        registry.register("migrations_running", "Migrations now", running.clone());
        registry.register("containers", "Containers known now", containers.clone());
        Self { registry, ended, bytes, downtime, running, containers }
    }
}

impl Metrics {
    /// Counts a migration that ended.
    pub(crate) fn ended(&self, migration: &Migration) {
        let direction = match migration.state {
            MigrationState::Out(_) => "out",
            MigrationState::In(_) => "in",
        };
        let outcome = match (&migration.error, migration.state.is_success()) {
            (_, true) => "moved".to_owned(),
            (Some(problem), false) => problem.code.to_string(),
            (None, false) => "failed".to_owned(),
        };
        let direction = direction.to_owned();
        self.ended.get_or_create(&Ended { direction: direction.clone(), outcome }).inc();
        let bytes = migration.report.map_or(migration.progress.bytes, |report| report.bytes);
        self.bytes.get_or_create(&Way { direction }).inc_by(bytes);
        if let Some(report) = migration.report {
            self.downtime
                .observe(std::time::Duration::from_micros(report.downtime_us).as_secs_f64());
        }
    }

    /// All figures as text.
    pub(crate) async fn text(&self, shim: &Shim) -> Result<String, Problem> {
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.running.set(count(shim.migrations.running().len()));
        self.containers.set(count(shim.containers().await?.len()));
        let mut text = String::new();
        // Writing into a string does not fail.
        encode(&mut text, &self.registry).expect("metrics are text");
        Ok(text)
    }
}
