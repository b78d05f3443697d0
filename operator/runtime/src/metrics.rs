//! Prometheus metrics (OpenMetrics text): one registry a process, and the families that every controller fills.
//!
//! kube-runtime does not show its queue's length; `work_in_flight` and `work_retrying` are what can be known.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::{Metric, Registry},
};

/// Media type of [`Metrics::encode`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByController {
    controller: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByStep {
    controller: &'static str,
    step: &'static str,
}

/// Buckets from a reconcile that found nothing to do (milliseconds) to one that waited on a slow API server (seconds).
#[derive(Clone, Copy, Debug)]
struct DurationBuckets;

impl MetricConstructor<Histogram> for DurationBuckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
    }
}

/// The registry of a process. Clones share it.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    foreign: Arc<Mutex<Vec<Registry>>>,
    reconciles: Family<ByController, Counter>,
    errors: Family<ByStep, Counter>,
    durations: Family<ByController, Histogram, DurationBuckets>,
    in_flight: Family<ByController, Gauge>,
    retrying: Family<ByController, Gauge>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Arc::new(Mutex::new(Registry::with_prefix("kubernest"))),
            foreign: Arc::default(),
            reconciles: Family::default(),
            errors: Family::default(),
            durations: Family::new_with_constructor(DurationBuckets),
            in_flight: Family::default(),
            retrying: Family::default(),
        };
        metrics.register(
            "reconciles",
            "Reconciles finished, failed ones included",
            metrics.reconciles.clone(),
        );
        metrics.register(
            "reconcile_errors",
            "Reconciles that failed, by the step that did",
            metrics.errors.clone(),
        );
        metrics.register(
            "reconcile_duration_seconds",
            "Duration of a reconcile",
            metrics.durations.clone(),
        );
        metrics.register(
            "work_in_flight",
            "Objects being reconciled now",
            metrics.in_flight.clone(),
        );
        metrics.register(
            "work_retrying",
            "Objects whose last reconcile failed",
            metrics.retrying.clone(),
        );
        metrics
    }
}

impl Metrics {
    /// A registry with the controllers' families in it. All names start with `kubernest_`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metric of the caller's. Counters get `_total` appended when encoded.
    pub fn register(&self, name: &str, help: &str, metric: impl Metric) {
        self.registry
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .register(name, help, metric);
    }

    /// Adds metrics under names that another project has made known; they start with `<prefix>_`.
    pub fn foreign(&self, prefix: &str, register: impl FnOnce(&mut Registry)) {
        let mut registry = Registry::with_prefix(prefix);
        register(&mut registry);
        let mut foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        foreign.push(registry);
    }

    /// The part of one controller.
    pub fn controller(&self, name: &'static str) -> ControllerMetrics {
        let by = ByController { controller: name };
        ControllerMetrics {
            name,
            reconciles: self.reconciles.get_or_create_owned(&by),
            errors: self.errors.clone(),
            durations: self.durations.get_or_create_owned(&by),
            in_flight: self.in_flight.get_or_create_owned(&by),
            retrying: self.retrying.get_or_create_owned(&by),
        }
    }

    /// All metrics as OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut buffer = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = std::iter::once(&*registry).chain(&*foreign);
        let encoded = all.try_for_each(|registry| text::encode_registry(&mut buffer, registry));
        if let Err(error) = encoded.and_then(|()| text::encode_eof(&mut buffer)) {
            tracing::error!(%error, "cannot encode metrics");
        }
        buffer
    }
}

/// Metrics of one controller.
#[derive(Clone, Debug)]
pub struct ControllerMetrics {
    name: &'static str,
    reconciles: Counter,
    errors: Family<ByStep, Counter>,
    durations: Histogram,
    in_flight: Gauge,
    retrying: Gauge,
}

impl ControllerMetrics {
    /// The controller's name, as it stands in the label.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// A reconcile begins; the guard counts it and its duration when dropped.
    pub fn start(&self) -> Running {
        self.in_flight.inc();
        Running {
            metrics: self.clone(),
            since: std::time::Instant::now(),
        }
    }

    /// A reconcile failed in `step`.
    pub fn error(&self, step: &'static str) {
        self.errors
            .get_or_create(&ByStep {
                controller: self.name,
                step,
            })
            .inc();
    }

    /// How many objects wait for a retry.
    pub fn set_retrying(&self, objects: usize) {
        self.retrying.set(i64::try_from(objects).unwrap_or(i64::MAX));
    }
}

/// A reconcile in progress.
#[derive(Debug)]
pub struct Running {
    metrics: ControllerMetrics,
    since: std::time::Instant,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.metrics.in_flight.dec();
        self.metrics.reconciles.inc();
        self.metrics.durations.observe(self.since.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_carry_controller_and_step() {
        let metrics = Metrics::new();
        let tenant = metrics.controller("tenant");
        drop(tenant.start());
        tenant.error("apply");
        tenant.set_retrying(1);
        let text = metrics.encode();
        for line in [
            r#"kubernest_reconciles_total{controller="tenant"} 1"#,
            r#"kubernest_reconcile_errors_total{controller="tenant",step="apply"} 1"#,
            r#"kubernest_reconcile_duration_seconds_count{controller="tenant"} 1"#,
            r#"kubernest_work_in_flight{controller="tenant"} 0"#,
            r#"kubernest_work_retrying{controller="tenant"} 1"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
