//! What is kept of a tenant's nodes: only of those that are slots, and little of each.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Node, NodeCondition, Taint},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{Resource, ResourceExt, runtime::watcher};
use serde::Deserialize;

use super::{super::inner::APPLIED, View, clip};

/// Most bytes of memory that a node's labels and taints may take.
const NODE_BYTES: usize = 16 << 10;

/// What is read of a Node: the rest of it would take several times the memory.
#[derive(Clone, Debug, Deserialize, Resource)]
#[resource(inherit = Node)]
pub(super) struct SeenNode {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: SeenSpec,
    #[serde(default)]
    status: SeenStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct SeenSpec {
    taints: Option<Vec<Taint>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct SeenStatus {
    conditions: Option<Vec<NodeCondition>>,
}

/// What is known of a node of the tenant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeFacts {
    /// Its Ready condition is True.
    pub ready: bool,
    /// Why it is not ready, in the kubelet's words.
    pub message: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations that are ours.
    pub applied: Option<String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// It has more labels and taints than are read, and none of them is known.
    pub too_large: bool,
}

impl NodeFacts {
    fn of(node: &SeenNode) -> Self {
        if size(node) > NODE_BYTES {
            return NodeFacts {
                message: format!("the node has more than {NODE_BYTES} bytes of labels and taints: remove some"),
                too_large: true,
                ..NodeFacts::default()
            };
        }
        let mut conditions = node.status.conditions.iter().flatten();
        let ready = conditions.find(|condition| condition.type_ == "Ready");
        NodeFacts {
            ready: ready.is_some_and(|condition| condition.status == "True"),
            message: ready
                .and_then(|condition| condition.message.as_deref())
                .map(clip)
                .unwrap_or_default(),
            labels: node.labels().clone(),
            applied: node.annotations().get(APPLIED).cloned(),
            taints: node.spec.taints.clone().unwrap_or_default(),
            too_large: false,
        }
    }
}

/// Bytes of memory that [`NodeFacts`] needs for what it keeps of a node as it is. Also an empty taint needs its own.
fn size(node: &SeenNode) -> usize {
    let applied = node.annotations().get(APPLIED).map_or(0, String::len);
    let labels = node.labels().iter();
    let labels = labels.map(|(key, value)| size_of::<(String, String)>() + key.len() + value.len());
    let taints = node.spec.taints.iter().flatten().map(|taint| {
        let value = taint.value.as_ref().map_or(0, String::len);
        size_of::<Taint>() + taint.key.len() + taint.effect.len() + value
    });
    applied + labels.sum::<usize>() + taints.sum::<usize>()
}

/// Takes note of what happened to a node; whether the reconciler is to know. Only of nodes that are slots: what else a tenant
/// calls a node is its own affair. (A slot is known here before its machine is made, so that none is missed.)
pub(super) fn note(
    view: &mut View,
    listing: &mut BTreeMap<String, NodeFacts>,
    is_slot: impl Fn(&str) -> bool,
    event: watcher::Event<SeenNode>,
) -> bool {
    match event {
        watcher::Event::Apply(node) | watcher::Event::InitApply(node) if !is_slot(&node.name_any()) => false,
        watcher::Event::Apply(node) => {
            let facts = NodeFacts::of(&node);
            view.nodes.insert(node.name_any(), facts.clone()) != Some(facts)
        }
        watcher::Event::Delete(node) => view.nodes.remove(&node.name_any()).is_some(),
        watcher::Event::Init => {
            listing.clear();
            false
        }
        watcher::Event::InitApply(node) => {
            listing.insert(node.name_any(), NodeFacts::of(&node));
            false
        }
        watcher::Event::InitDone => {
            let fresh = std::mem::take(listing);
            let changed = !view.listed || view.nodes != fresh;
            view.nodes = fresh;
            view.listed = true;
            changed
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
    use serde_json::{Value, json};

    use super::{super::TEXT_BYTES, *};

    fn node(name: &str, labels: Value, message: &str) -> SeenNode {
        let ready = json!({"type": "Ready", "status": "False", "message": message});
        let node = json!({"metadata": {"name": name, "labels": labels}, "status": {"conditions": [ready]}});
        serde_json::from_value(node).unwrap()
    }

    #[test]
    fn link_keeps_only_nodes_that_are_slots() {
        let (mut view, mut listing) = (View::default(), BTreeMap::new());
        let mut take = |event| note(&mut view, &mut listing, |name| name == "a", event);
        take(watcher::Event::Init);
        for name in ["a", "stranger"] {
            take(watcher::Event::InitApply(node(name, json!({}), "")));
        }
        assert!(take(watcher::Event::InitDone));
        assert!(!take(watcher::Event::Apply(node("another", json!({}), ""))));
        assert!(take(watcher::Event::Apply(node("a", json!({"tier": "db"}), ""))));
        assert_eq!(view.nodes.keys().collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn link_repeats_little_of_what_a_tenant_says() {
        let facts = NodeFacts::of(&node("a", json!({}), &"x".repeat(700_000)));
        assert_eq!(facts.message.len(), TEXT_BYTES);
        let facts = NodeFacts::of(&node("a", json!({"large": "x".repeat(700_000)}), ""));
        assert!(facts.too_large && facts.labels.is_empty(), "{facts:?}");
        let mut many = node("a", json!({}), "");
        many.spec.taints = Some(vec![Taint::default(); 200]);
        let facts = NodeFacts::of(&many);
        assert!(facts.too_large && facts.taints.is_empty(), "{facts:?}");
    }

    #[test]
    fn link_reads_little_of_a_node() {
        let (seen, request) = (size_of::<SeenNode>(), size_of::<CertificateSigningRequest>());
        // What the bound on values says of them.
        assert!(seen <= 512 && request <= 1024, "{seen} {request} {}", size_of::<Node>());
    }
}
