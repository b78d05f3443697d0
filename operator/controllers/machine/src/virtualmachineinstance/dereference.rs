//! Gathers what the decision about one instance needs, from the caches and, where a cache may lag, from the API server.
//!
//! A pod that an instance had and the cache has not is looked up: to take it for gone would fail the machine, or let its
//! object go while its process runs. Nothing is decided here.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance};
use kubernest_crds::labels;

use super::{claims_of, waits_for_a_pod};
use crate::stores::NodeState;
use crate::virtualmachine::goes_on;
use crate::{Context, names};

/// Everything the decision about an instance depends on.
pub struct Observed {
    /// Its launcher pod, if there is one.
    pub pod: Option<Pod>,
    /// The node of that pod; Up while it has none.
    pub node: NodeState,
    /// Claims that its volumes name, as far as they exist.
    pub claims: BTreeMap<String, PersistentVolumeClaim>,
    /// All nodes; empty once the instance has a pod.
    pub nodes: Vec<Arc<Node>>,
    /// The console-tail request on the VirtualMachine that owns it, or on the instance itself.
    pub tail_request: Option<String>,
    /// The VirtualMachine that owns it goes on to its next instance when this one is gone.
    pub goes_on: bool,
}

/// Reads caches, and the API server where they may lag.
///
/// # Errors
/// When the API server cannot be asked.
pub async fn dereference(instance: &VirtualMachineInstance, ctx: &Context) -> Result<Observed, kube::Error> {
    let namespace = instance.namespace().unwrap_or_default();
    let name = names::launcher_pod(&instance.name_any(), &instance.uid().unwrap_or_default());
    let waiting = waits_for_a_pod(instance) && instance.metadata.deletion_timestamp.is_none();
    let pod = match ctx.stores.pods.get(&ObjectRef::new(&name).within(&namespace)) {
        Some(pod) => Some((*pod).clone()),
        // The rehearsal of its create tells if there is one after all.
        None if waiting => None,
        None => {
            Api::<Pod>::namespaced(ctx.client.clone(), &namespace)
                .get_opt(&name)
                .await?
        }
    };
    let pod = pod.filter(|pod| belongs(pod, instance));
    let node = match pod.as_ref().and_then(node_of) {
        None => NodeState::Up,
        Some(node) => match ctx.stores.nodes.get(&ObjectRef::new(node)) {
            Some(node) => NodeState::of(&node),
            None => match Api::<Node>::all(ctx.client.clone()).get_opt(node).await? {
                Some(node) => NodeState::of(&node),
                None => NodeState::Dead,
            },
        },
    };
    let mut claims = BTreeMap::new();
    if waiting && pod.is_none() {
        for claim in claims_of(instance) {
            if let Some(found) = ctx.stores.claims.get(&ObjectRef::new(claim).within(&namespace)) {
                claims.insert(claim.to_owned(), (*found).clone());
            }
        }
    }
    let nodes = if waiting && pod.is_none() {
        ctx.stores.nodes.state()
    } else {
        Vec::new()
    };
    let machine = owner(instance, ctx);
    let goes_on = machine.as_ref().is_some_and(|machine| goes_on(machine));
    let request = |annotations: &BTreeMap<String, String>| annotations.get(labels::CONSOLE_TAIL_REQUEST).cloned();
    let tail_request = machine.and_then(|machine| request(machine.annotations()));
    let tail_request = tail_request.or_else(|| request(instance.annotations()));
    Ok(Observed {
        pod,
        node,
        claims,
        nodes,
        tail_request,
        goes_on,
    })
}

/// Whether the pod was made for exactly this instance.
pub fn belongs(pod: &Pod, instance: &VirtualMachineInstance) -> bool {
    instance
        .uid()
        .is_some_and(|uid| pod.owner_references().iter().any(|owner| owner.uid == uid))
}

/// The node that a pod is bound to.
pub fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|node| !node.is_empty())
}

fn owner(instance: &VirtualMachineInstance, ctx: &Context) -> Option<Arc<VirtualMachine>> {
    let mut machine = ObjectRef::<VirtualMachine>::new(&instance.name_any());
    machine.namespace = instance.namespace();
    let machine = ctx.stores.machines.get(&machine)?;
    let owns = instance
        .owner_references()
        .iter()
        .any(|owner| Some(&owner.uid) == machine.metadata.uid.as_ref());
    owns.then_some(machine)
}
