//! Figures of virtual machines under KubeVirt's names: how many there are, by phase and node, and how long they took to get
//! there. Counts are taken from the caches when somebody asks. What one machine uses, its launcher tells.

use std::collections::BTreeMap;

use jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::reflector::Store;
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance};
use kubernest_runtime::Metrics;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::{MetricType, TypedMetric};

use crate::virtualmachineinstance::phase_of;

/// What all names begin with.
const PREFIX: &str = "kubevirt";

/// Buckets from a small guest on a quick node to an image that has to be pulled first.
#[derive(Clone, Copy, Debug)]
struct StartBuckets;

impl MetricConstructor<Histogram> for StartBuckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new([0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0])
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPhase {
    phase: String,
}

/// Observes instances on their way.
#[derive(Clone, Debug)]
pub struct Figures {
    since_creation: Family<ByPhase, Histogram, StartBuckets>,
}

impl Figures {
    /// Registers all figures.
    pub fn register(
        metrics: &Metrics,
        machines: Store<VirtualMachine>,
        instances: Store<VirtualMachineInstance>,
    ) -> Self {
        let since_creation = Family::new_with_constructor(StartBuckets);
        metrics.foreign(PREFIX, |registry| {
            registry.register(
                "vmi_phase_transition_time_from_creation_seconds",
                "Time from an instance's creation to the beginning of a phase",
                since_creation.clone(),
            );
            registry.register_collector(Box::new(Counts(machines, instances)));
        });
        Self { since_creation }
    }

    /// An instance has come to this phase.
    pub fn reached(&self, instance: &VirtualMachineInstance, phase: &str, now: Timestamp) {
        let Some(created) = instance.creation_timestamp() else {
            return;
        };
        let phase = ByPhase {
            phase: phase.to_owned(),
        };
        let seconds = now.duration_since(created.0).as_secs_f64().max(0.0);
        self.since_creation.get_or_create(&phase).observe(seconds);
    }
}

/// Counts what is in the caches.
#[derive(Clone)]
struct Counts(Store<VirtualMachine>, Store<VirtualMachineInstance>);

impl std::fmt::Debug for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counts").finish_non_exhaustive()
    }
}

impl Collector for Counts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let machines = self.0.state();
        let by_namespace = count(machines.iter().map(|machine| {
            let namespace = machine.namespace().unwrap_or_default();
            vec![("namespace", namespace)]
        }));
        gauges(&mut encoder, "number_of_vms", "Virtual machines", &by_namespace)?;
        let instances = self.1.state();
        let by_phase = count(instances.iter().map(|instance| {
            let node = instance.status.as_ref().and_then(|status| status.node_name.clone());
            let phase = match phase_of(instance) {
                "" => "pending".to_owned(),
                phase => phase.to_lowercase(),
            };
            vec![("node", node.unwrap_or_default()), ("phase", phase)]
        }));
        gauges(
            &mut encoder,
            "vmi_phase_count",
            "Instances by phase and node",
            &by_phase,
        )
    }
}

type Labels = Vec<(&'static str, String)>;

fn count(all: impl Iterator<Item = Labels>) -> BTreeMap<Labels, i64> {
    let mut counts = BTreeMap::new();
    for labels in all {
        *counts.entry(labels).or_default() += 1;
    }
    counts
}

fn gauges(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    counts: &BTreeMap<Labels, i64>,
) -> Result<(), std::fmt::Error> {
    let kind: MetricType = <Gauge as TypedMetric>::TYPE;
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, value) in counts {
        ConstGauge::new(*value).encode(family.encode_family(labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kube::runtime::reflector;
    use kube::runtime::watcher::Event;
    use serde_json::json;

    use super::*;

    #[test]
    fn figures_count_by_phase_and_tell_how_long_it_took() {
        let (machines, _) = reflector::store();
        let (instances, mut writer) = reflector::store();
        let instance = |name: &str, status: serde_json::Value| -> VirtualMachineInstance {
            let metadata = json!({"name": name, "namespace": "n", "creationTimestamp": "2026-01-01T00:00:00Z"});
            let object = json!({
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": metadata,
                "spec": {"domain": {"devices": {}}}, "status": status,
            });
            serde_json::from_value(object).unwrap()
        };
        let running = json!({"phase": "Running", "nodeName": "node-1"});
        for object in [
            instance("a", running.clone()),
            instance("b", running),
            instance("c", json!({})),
        ] {
            writer.apply_watcher_event(&Event::Apply(object));
        }
        let metrics = Metrics::new();
        let figures = Figures::register(&metrics, machines, instances);
        let now: Timestamp = "2026-01-01T00:00:07Z".parse().unwrap();
        figures.reached(&instance("a", json!({})), "Running", now);
        let text = metrics.encode();
        for line in [
            r#"kubevirt_vmi_phase_count{node="node-1",phase="running"} 2"#,
            r#"kubevirt_vmi_phase_count{node="",phase="pending"} 1"#,
            r#"kubevirt_vmi_phase_transition_time_from_creation_seconds_sum{phase="Running"} 7.0"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert_eq!(text.matches("# EOF").count(), 1, "{text}");
    }
}
