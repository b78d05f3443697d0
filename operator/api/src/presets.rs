//! The presets of all namespaces, watched, so that a new instance can be given those that match it.

use std::{collections::BTreeMap, sync::Arc};

use futures::StreamExt;
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, reflector, reflector::Store, watcher},
};
use kubernest_admission::{MAX_PRESET_NAME, Preset};
use kubernest_crds::{
    Selector,
    kubevirt::v1::{Devices, VirtualMachineInstancePreset},
};
use kubernest_runtime::{CancellationToken, server::Readiness, telemetry::chain};
use serde_json::Value;

/// The name under which readiness waits until all presets were read once.
pub const READY: &str = "the presets";

/// What was read of them.
#[derive(Clone)]
pub struct Presets(Store<VirtualMachineInstancePreset>);

/// Watches presets until shutdown, in a task of its own.
pub fn watch(client: Client, readiness: Readiness, shutdown: CancellationToken) -> Presets {
    let (reader, writer) = reflector::store();
    let events = watcher(
        Api::<VirtualMachineInstancePreset>::all(client),
        watcher::Config::default(),
    );
    let events = events.default_backoff().modify(prune).reflect(writer);
    tokio::spawn(async move {
        let told = events.for_each(|event| {
            if let Err(error) = event {
                tracing::warn!(error = chain(&error), "the watch of presets failed, it is begun again");
            }
            std::future::ready(())
        });
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = told => {}
        }
    });
    let store = reader.clone();
    tokio::spawn(async move {
        if store.wait_until_ready().await.is_ok() {
            readiness.set(READY, true);
        }
    });
    Presets(reader)
}

impl Presets {
    /// Those of a namespace whose selector matches the labels of `instance`, by name.
    pub fn of(&self, namespace: &str, instance: &Value) -> Vec<Preset> {
        let labels = instance.pointer("/metadata/labels").cloned().unwrap_or_default();
        let labels = serde_json::from_value(labels).unwrap_or_default();
        let mut found: Vec<Preset> = self
            .0
            .state()
            .iter()
            .filter(|preset| preset.namespace().as_deref() == Some(namespace))
            .filter(|preset| preset.metadata.deletion_timestamp.is_none())
            // From before such names were refused.
            .filter(|preset| preset.name_any().len() <= MAX_PRESET_NAME)
            .filter(|preset| matches(preset, &labels))
            .filter_map(domain)
            .collect();
        found.sort_by(|one, other| one.name.cmp(&other.name));
        found
    }
}

/// Keeps of a preset what is ever applied: users write as many as they like.
fn prune(preset: &mut VirtualMachineInstancePreset) {
    preset.metadata.managed_fields = None;
    preset.metadata.annotations = None;
    preset.metadata.labels = None;
    let Some(domain) = &mut preset.spec.domain else { return };
    (domain.memory, domain.machine) = (None, None);
    domain.resources.limits.clear();
    domain.devices = Devices {
        watchdog: domain.devices.watchdog.take(),
        ..Devices::default()
    };
}

/// A selector that cannot be read, from before such were refused, matches nothing.
fn matches(preset: &VirtualMachineInstancePreset, labels: &BTreeMap<String, String>) -> bool {
    Selector::new(&preset.spec.selector).is_ok_and(|selector| selector.matches(labels))
}

fn domain(preset: &Arc<VirtualMachineInstancePreset>) -> Option<Preset> {
    let domain = serde_json::to_value(preset.spec.domain.as_ref()?).ok()?;
    Some(Preset {
        name: preset.name_any(),
        domain,
    })
}
