//! What the machine controllers watch: one watch and one cache per kind, shared by the controllers, and which object's
//! reconcile an event triggers.
//!
//! Only what decisions need is kept in memory: pods by the launcher label, without their volumes and environment; claims
//! and nodes reduced to a few fields. Events that cannot change a decision (a node's heartbeat) trigger nothing.
//! Deliberately not here: decisions, and writes of any kind.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use k8s_openapi::api::core::v1::{
    Container, Node, NodeSpec, NodeStatus, PersistentVolumeClaim, PersistentVolumeClaimSpec,
    PersistentVolumeClaimStatus, Pod, PodSpec,
};
use kube::api::ObjectMeta;
use kube::runtime::reflector::{ObjectRef, Store, store::Writer};
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, reflector};
use kube::{Api, Client, Resource, ResourceExt};
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance, VirtualMachineInstanceReplicaSet};
use serde::de::DeserializeOwned;

use kubernest_crds::labels;

use crate::virtualmachineinstancereplicaset as replicas;

/// Taint by which somebody declares that a machine is surely off (KEP-2268).
const TAINT_OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
/// Taint of a node whose kubelet stopped answering (Kubernetes' node lifecycle controller).
const TAINT_UNREACHABLE: &str = "node.kubernetes.io/unreachable";

/// The caches the controllers read.
#[derive(Clone)]
pub struct Stores {
    /// All VirtualMachines.
    pub machines: Store<VirtualMachine>,
    /// All VirtualMachineInstanceReplicaSets.
    pub replica_sets: Store<VirtualMachineInstanceReplicaSet>,
    /// All VirtualMachineInstances.
    pub instances: Store<VirtualMachineInstance>,
    /// Launcher pods, without volumes and environment.
    pub pods: Store<Pod>,
    /// Claims: volume mode, requested and real size.
    pub claims: Store<PersistentVolumeClaim>,
    /// Nodes: labels, taints, allocatable resources, their addresses and those of their pods.
    pub nodes: Store<Node>,
}

/// What is to be reconciled, as the watches see it.
pub struct Queues {
    /// VirtualMachines to reconcile.
    pub machines: UnboundedReceiver<ObjectRef<VirtualMachine>>,
    /// VirtualMachineInstanceReplicaSets to reconcile.
    pub replica_sets: UnboundedReceiver<ObjectRef<VirtualMachineInstanceReplicaSet>>,
    /// VirtualMachineInstances to reconcile.
    pub instances: UnboundedReceiver<ObjectRef<VirtualMachineInstance>>,
}

impl Stores {
    /// Opens the watches. The returned future drives them and ends never; dropping it closes them.
    pub fn open(client: &Client) -> (Stores, Queues, BoxFuture<'static, ()>) {
        let (machine_queue, machines_to_do) = unbounded();
        let (set_queue, sets_to_do) = unbounded();
        let (instance_queue, instances_to_do) = unbounded();
        let (machines, machine_writer) = reflector::store();
        let (replica_sets, set_writer) = reflector::store();
        let (instances, instance_writer) = reflector::store();
        let (pods, pod_writer) = reflector::store();
        let (claims, claim_writer) = reflector::store();
        let (nodes, node_writer) = reflector::store();
        let stores = Stores {
            machines,
            replica_sets,
            instances,
            pods,
            claims,
            nodes,
        };
        let touch = Touch {
            machines: machine_queue,
            replica_sets: set_queue,
            instances: instance_queue,
            known: stores.instances.clone(),
            known_sets: stores.replica_sets.clone(),
        };
        let on_set = touch.clone();
        let drive_sets = reflect(
            client.clone(),
            watcher::Config::default(),
            set_writer,
            prune_metadata,
            move |old, new| on_set.replica_set(old, new),
        );
        let (on_machine, on_instance, on_pod, on_claim) = (touch.clone(), touch.clone(), touch.clone(), touch.clone());
        let everything = watcher::Config::default();
        let launchers = format!("{}={}", labels::LAUNCHER_APP, labels::LAUNCHER_APP_VALUE);
        let launchers = everything.clone().labels(&launchers);
        let drive = futures::future::join5(
            reflect(
                client.clone(),
                everything.clone(),
                machine_writer,
                prune_metadata,
                move |old, new| on_machine.machine(old, new),
            ),
            reflect(
                client.clone(),
                everything.clone(),
                instance_writer,
                prune_metadata,
                move |old, new| {
                    on_instance.instance(old, new);
                },
            ),
            reflect(client.clone(), launchers, pod_writer, prune_pod, move |old, new| {
                on_pod.pod(old, new)
            }),
            reflect(
                client.clone(),
                everything.clone(),
                claim_writer,
                prune_claim,
                move |old, new| on_claim.claim(old, new),
            ),
            reflect(client.clone(), everything, node_writer, prune_node, move |old, new| {
                touch.node(old, new)
            }),
        );
        let queues = Queues {
            machines: machines_to_do,
            replica_sets: sets_to_do,
            instances: instances_to_do,
        };
        let drive = futures::future::join(drive, drive_sets);
        (stores, queues, drive.map(|_| ()).boxed())
    }

    /// Waits until every cache has its first complete list.
    ///
    /// # Errors
    /// When a watch was dropped before that, that is on shutdown.
    pub async fn wait_until_ready(&self) -> Result<(), reflector::store::WriterDropped> {
        self.machines.wait_until_ready().await?;
        self.replica_sets.wait_until_ready().await?;
        self.instances.wait_until_ready().await?;
        self.pods.wait_until_ready().await?;
        self.claims.wait_until_ready().await?;
        self.nodes.wait_until_ready().await
    }
}

/// Turns a change of an object into the reconciles it can matter to.
#[derive(Clone)]
struct Touch {
    machines: UnboundedSender<ObjectRef<VirtualMachine>>,
    replica_sets: UnboundedSender<ObjectRef<VirtualMachineInstanceReplicaSet>>,
    instances: UnboundedSender<ObjectRef<VirtualMachineInstance>>,
    known: Store<VirtualMachineInstance>,
    known_sets: Store<VirtualMachineInstanceReplicaSet>,
}

impl Touch {
    // A closed queue means that its controller has ended, which the watches need not care about.
    fn queue_machine(&self, reference: ObjectRef<VirtualMachine>) {
        let _ = self.machines.unbounded_send(reference);
    }

    fn queue_set(&self, reference: ObjectRef<VirtualMachineInstanceReplicaSet>) {
        let _ = self.replica_sets.unbounded_send(reference);
    }

    fn queue_instance(&self, reference: ObjectRef<VirtualMachineInstance>) {
        let _ = self.instances.unbounded_send(reference);
    }

    fn machine(&self, old: Option<&VirtualMachine>, new: Option<&VirtualMachine>) {
        let Some(machine) = new.or(old) else { return };
        self.queue_machine(ObjectRef::from_obj(machine));
        let request = |machine: &VirtualMachine| machine.annotations().get(labels::CONSOLE_TAIL_REQUEST).cloned();
        if old.and_then(request) != new.and_then(request) {
            let mut instance = ObjectRef::new(&machine.name_any());
            instance.namespace = machine.namespace();
            self.queue_instance(instance);
        }
    }

    fn instance(&self, old: Option<&VirtualMachineInstance>, new: Option<&VirtualMachineInstance>) {
        let Some(instance) = new.or(old) else { return };
        self.queue_instance(ObjectRef::from_obj(instance));
        // The machine of its name, be it the owner or one that waits for the name.
        let mut machine = ObjectRef::new(&instance.name_any());
        machine.namespace = instance.namespace();
        self.queue_machine(machine);
        if old.map(replicas::standing) != new.map(replicas::standing) {
            old.into_iter().chain(new).for_each(|instance| self.sets_of(instance));
        }
    }

    fn replica_set(
        &self,
        old: Option<&VirtualMachineInstanceReplicaSet>,
        new: Option<&VirtualMachineInstanceReplicaSet>,
    ) {
        let Some(set) = new.or(old) else { return };
        self.queue_set(ObjectRef::from_obj(set));
    }

    /// An instance matters to the set that it is of, or to those that may take it.
    fn sets_of(&self, instance: &VirtualMachineInstance) {
        match replicas::controller(instance) {
            Some(owner) => {
                let set = ObjectRef::from_owner_ref(instance.namespace().as_deref(), owner, ());
                set.into_iter().for_each(|set| self.queue_set(set));
            }
            None => {
                let sets = self.known_sets.state().into_iter();
                let sets = sets.filter(|set| replicas::wants(set, instance));
                sets.for_each(|set| self.queue_set(ObjectRef::from_obj(&*set)));
            }
        }
    }

    fn pod(&self, old: Option<&Pod>, new: Option<&Pod>) {
        let Some(pod) = new.or(old) else { return };
        for owner in pod.owner_references() {
            if let Some(instance) = ObjectRef::from_owner_ref(pod.namespace().as_deref(), owner, ()) {
                self.queue_instance(instance);
            }
        }
    }

    /// A claim matters to the instances that may wait for it.
    fn claim(&self, old: Option<&PersistentVolumeClaim>, new: Option<&PersistentVolumeClaim>) {
        let Some(claim) = new.or(old) else { return };
        let (namespace, name) = (claim.namespace(), claim.name_any());
        if old.map(|claim| (&claim.spec, &claim.status)) == new.map(|claim| (&claim.spec, &claim.status)) {
            return;
        }
        for instance in self.known.state() {
            if instance.namespace() == namespace
                && crate::virtualmachineinstance::waits_for_a_pod(&instance)
                && crate::virtualmachineinstance::claims_of(&instance).any(|claimed| claimed == name)
            {
                self.queue_instance(ObjectRef::from_obj(&*instance));
            }
        }
    }

    /// A node matters to the instances on it when it goes, answers no more, or is declared to be off.
    fn node(&self, old: Option<&Node>, new: Option<&Node>) {
        let Some(node) = new.or(old) else { return };
        if old.map(NodeState::of) == new.map(NodeState::of) {
            return;
        }
        let name = node.name_any();
        for instance in self.known.state() {
            if instance.status.as_ref().and_then(|status| status.node_name.as_deref()) == Some(name.as_str()) {
                self.queue_instance(ObjectRef::from_obj(&*instance));
            }
        }
    }
}

/// What is known of the node below a launcher pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Nothing speaks against it.
    Up,
    /// Its kubelet does not answer; what runs on it may run on.
    Unreachable,
    /// It is surely off: deleted, or declared so by the out-of-service taint (KEP-2268).
    Dead,
}

impl NodeState {
    /// Reads the taints of a node that exists.
    pub fn of(node: &Node) -> Self {
        let taints = node
            .spec
            .as_ref()
            .and_then(|spec| spec.taints.as_deref())
            .unwrap_or_default();
        let tainted = |key: &str| taints.iter().any(|taint| taint.key == key);
        if tainted(TAINT_OUT_OF_SERVICE) {
            Self::Dead
        } else if tainted(TAINT_UNREACHABLE) {
            Self::Unreachable
        } else {
            Self::Up
        }
    }
}

/// Drives one watch into its cache and reports each change as (before, after).
///
/// The changes of a (re)list are reported when the list is complete, since the cache shows it only then.
fn reflect<K>(
    client: Client,
    config: watcher::Config,
    writer: Writer<K>,
    prune: fn(&mut K),
    touch: impl Fn(Option<&K>, Option<&K>) + Send,
) -> impl Future<Output = ()> + Send
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    drive(
        watcher(Api::<K>::all(client), config).default_backoff().modify(prune),
        writer,
        touch,
    )
}

async fn drive<K>(
    events: impl Stream<Item = watcher::Result<Event<K>>> + Send,
    mut writer: Writer<K>,
    touch: impl Fn(Option<&K>, Option<&K>) + Send,
) where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
{
    let kind = K::kind(&()).into_owned();
    let store = writer.as_reader();
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(event @ (Event::Init | Event::InitApply(_))) => writer.apply_watcher_event(&event),
            Ok(Event::InitDone) => {
                let mut before: HashMap<ObjectRef<K>, Arc<K>> = store
                    .state()
                    .into_iter()
                    .map(|object| (ObjectRef::from_obj(&*object), object))
                    .collect();
                writer.apply_watcher_event(&Event::InitDone);
                for object in store.state() {
                    let old = before.remove(&ObjectRef::from_obj(&*object));
                    touch(old.as_deref(), Some(&object));
                }
                before.values().for_each(|gone| touch(Some(gone), None));
            }
            Ok(event @ Event::Apply(_)) => {
                let Event::Apply(object) = &event else { continue };
                let old = store.get(&ObjectRef::from_obj(object));
                writer.apply_watcher_event(&event);
                touch(old.as_deref(), Some(object));
            }
            Ok(event @ Event::Delete(_)) => {
                let Event::Delete(object) = &event else { continue };
                writer.apply_watcher_event(&event);
                touch(Some(object), None);
            }
            Err(error) => tracing::warn!(
                kind,
                error = &error as &dyn std::error::Error,
                "watch failed, is retried"
            ),
        }
    }
}

fn prune_metadata<K: Resource>(object: &mut K) {
    object.meta_mut().managed_fields = None;
}

/// Keeps what says where a launcher is, whether it may use KVM, what it is asked, how it fares, and how long it was given
/// to end.
fn prune_pod(pod: &mut Pod) {
    prune_metadata(pod);
    let Some(spec) = &mut pod.spec else { return };
    let containers = spec.containers.drain(..);
    let containers = containers.map(|container| Container {
        name: container.name,
        resources: container.resources,
        startup_probe: container.startup_probe,
        readiness_probe: container.readiness_probe,
        liveness_probe: container.liveness_probe,
        ..Container::default()
    });
    *spec = PodSpec {
        containers: containers.collect(),
        node_name: spec.node_name.take(),
        readiness_gates: spec.readiness_gates.take(),
        termination_grace_period_seconds: spec.termination_grace_period_seconds,
        ..PodSpec::default()
    };
}

fn prune_claim(claim: &mut PersistentVolumeClaim) {
    let spec = claim.spec.take().unwrap_or_default();
    let status = claim.status.take().unwrap_or_default();
    claim.metadata = ObjectMeta {
        annotations: None,
        labels: None,
        managed_fields: None,
        owner_references: None,
        ..std::mem::take(&mut claim.metadata)
    };
    claim.spec = Some(PersistentVolumeClaimSpec {
        access_modes: spec.access_modes,
        resources: spec.resources,
        volume_mode: spec.volume_mode,
        ..PersistentVolumeClaimSpec::default()
    });
    claim.status = Some(PersistentVolumeClaimStatus {
        capacity: status.capacity,
        ..PersistentVolumeClaimStatus::default()
    });
}

fn prune_node(node: &mut Node) {
    let spec = node.spec.take().unwrap_or_default();
    let status = node.status.take().unwrap_or_default();
    node.metadata = ObjectMeta {
        annotations: None,
        managed_fields: None,
        ..std::mem::take(&mut node.metadata)
    };
    node.spec = Some(NodeSpec {
        taints: spec.taints,
        unschedulable: spec.unschedulable,
        pod_cidrs: spec.pod_cidrs,
        ..NodeSpec::default()
    });
    node.status = Some(NodeStatus {
        allocatable: status.allocatable,
        addresses: status.addresses,
        ..NodeStatus::default()
    });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn stores_keep_of_a_pod_what_decisions_are_made_by() {
        let probe = json!({"tcpSocket": {"port": 22}});
        let kept = json!({
            "name": "compute", "resources": {"limits": {"devices.kubevirt.io/kvm": "1"}},
            "startupProbe": probe, "readinessProbe": probe, "livenessProbe": probe,
        });
        let mut whole = kept.clone();
        whole["env"] = json!([{"name": "a", "value": "b"}]);
        let pod = |container: &serde_json::Value| -> Pod {
            serde_json::from_value(json!({"spec": {
                "containers": [container], "nodeName": "n", "readinessGates": [{"conditionType": "a"}],
                "terminationGracePeriodSeconds": 45,
            }}))
            .unwrap()
        };
        let mut pruned = pod(&whole);
        pruned.spec.as_mut().unwrap().volumes = Some(Vec::new());
        prune_pod(&mut pruned);
        assert_eq!(pruned, pod(&kept));
    }
}
