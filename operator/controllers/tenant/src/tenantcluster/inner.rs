//! Writing into a tenant: add-ons, node labels and taints, removal of nodes whose slot is gone. At rest nothing is
//! written: add-ons go once a connection, nodes carry a hash of what was applied to them.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Node, Taint},
};
use kube::{
    Api,
    api::{ApiResource, DeleteParams, NotUsed, Object, Patch, PatchParams},
};
use kubernest_crds::{TaintEffect, labels};
use kubernest_runtime::ApplyError;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{
    build::{
        addons::{Addon, COREDNS, NAMESPACE},
        slots::Slot,
    },
    link::{Link, NodeFacts},
};
use crate::FIELD_MANAGER;

/// Annotation of a tenant's node: hash of the labels and taints that we applied.
pub const APPLIED: &str = "kubernest.io/applied";
/// Requests at a time; a guest without hardware virtualisation is slow.
const AT_ONCE: usize = 4;

/// Why something was not written into the tenant.
#[derive(Debug, thiserror::Error)]
pub enum InnerError {
    /// An add-on.
    #[error("an add-on was not applied")]
    Addon(#[source] ApplyError),
    /// An add-on can't be hashed.
    #[error("an add-on can't be serialised")]
    Serialize(#[source] serde_json::Error),
    /// Reading CoreDNS' Deployment.
    #[error("the state of CoreDNS can't be read")]
    CoreDns(#[source] kube::Error),
    /// A node.
    #[error("labels and taints of node {0} were not applied")]
    Node(String, #[source] kube::Error),
    /// A node that has to go.
    #[error("node {0} was not deleted")]
    Delete(String, #[source] kube::Error),
}

/// Applies the add-ons that were not applied through this link already, so that a slow tenant gets them over several
/// tries. Access rules come first.
pub async fn apply_addons(link: &Link, addons: &[Addon]) -> Result<(), InnerError> {
    let rules = addons
        .iter()
        .take_while(|(kind, _)| kind.kind == "ClusterRoleBinding")
        .count();
    let (first, rest) = addons.split_at(rules);
    for part in [first, rest] {
        // Collected first: a stream over a closure that borrows is not Send (rust-lang/rust#64552).
        let writes: Vec<_> = part.iter().map(|addon| apply_addon(link, addon)).collect();
        stream::iter(writes)
            .buffered(AT_ONCE)
            .try_for_each(|()| std::future::ready(Ok(())))
            .await?;
    }
    Ok(())
}

async fn apply_addon(link: &Link, (kind, object): &Addon) -> Result<(), InnerError> {
    let text = serde_json::to_vec(object).map_err(InnerError::Serialize)?;
    let hash: [u8; 32] = Sha256::digest(text).into();
    if !link.has_applied(&hash) {
        link.applier()
            .apply_with(kind, object, None)
            .await
            .map_err(InnerError::Addon)?;
        link.set_applied(hash);
    }
    Ok(())
}

/// What is read of a Deployment's status. Nothing else of it is: a volume `{}` alone takes some KB of memory.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Availability {
    available_replicas: Option<i32>,
}

/// Whether CoreDNS answers.
pub async fn dns_available(link: &Link) -> Result<bool, InnerError> {
    let kind = ApiResource::erase::<Deployment>(&());
    let api = Api::<Object<NotUsed, Availability>>::namespaced_with(link.client().clone(), NAMESPACE, &kind);
    let deployment = api.get_opt(COREDNS).await.map_err(InnerError::CoreDns)?;
    let available = deployment.and_then(|deployment| deployment.status?.available_replicas);
    Ok(available.unwrap_or_default() > 0)
}

/// Labels that a slot's node should have.
fn wanted_labels(slot: &Slot) -> BTreeMap<String, String> {
    let mut all = slot.labels.clone();
    all.insert(labels::POOL.to_owned(), slot.pool.clone());
    let role = format!("node-role.kubernetes.io/{}", slot.role.as_str());
    all.insert(role, String::new());
    all
}

fn wanted_taints(slot: &Slot) -> Vec<Taint> {
    let effect = |effect| match effect {
        TaintEffect::NoSchedule => "NoSchedule",
        TaintEffect::PreferNoSchedule => "PreferNoSchedule",
        TaintEffect::NoExecute => "NoExecute",
    };
    let own = slot.taints.iter().map(|taint| Taint {
        key: taint.key.clone(),
        value: Some(taint.value.clone()).filter(|value| !value.is_empty()),
        effect: effect(taint.effect).to_owned(),
        time_added: None,
    });
    own.collect()
}

/// Hash of labels and taints, short enough to read.
fn applied(labels: &BTreeMap<String, String>, taints: &[Taint]) -> Result<String, InnerError> {
    let text = serde_json::to_vec(&json!([labels, taints])).map_err(InnerError::Serialize)?;
    Ok(Sha256::digest(text)
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// What to send so that a node has its slot's labels and taints; nothing if it has.
fn node_patch(slot: &Slot, facts: &NodeFacts) -> Result<Option<serde_json::Value>, InnerError> {
    let (labels, taints) = (wanted_labels(slot), wanted_taints(slot));
    let hash = applied(&labels, &taints)?;
    let same = |a: &Taint, b: &Taint| a.key == b.key && a.effect == b.effect;
    let labelled = labels.iter().all(|(key, value)| facts.labels.get(key) == Some(value));
    let tainted = taints.iter().all(|taint| {
        facts
            .taints
            .iter()
            .any(|has| same(has, taint) && has.value == taint.value)
    });
    if labelled && tainted && facts.applied.as_deref() == Some(&hash) {
        return Ok(None);
    }
    let mut patch = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": slot.name, "labels": labels, "annotations": {APPLIED: hash}},
    });
    if !tainted {
        // Other controllers' taints (not-ready, unreachable) stay.
        let mut all = taints.clone();
        all.extend(
            facts
                .taints
                .iter()
                .filter(|has| !taints.iter().any(|taint| same(has, taint)))
                .cloned(),
        );
        patch["spec"] = json!({"taints": all});
    }
    Ok(Some(patch))
}

/// Gives the slot's node its labels and taints.
pub async fn apply_node(link: &Link, slot: &Slot, facts: &NodeFacts) -> Result<(), InnerError> {
    let Some(mut patch) = node_patch(slot, facts)? else {
        return Ok(());
    };
    let api = Api::<Node>::all(link.client().clone());
    let failed = |source| InnerError::Node(slot.name.clone(), source);
    // Taints have many owners and one list: they go as a plain patch, labels by server-side apply.
    if let Some(spec) = patch.as_object_mut().and_then(|patch| patch.remove("spec")) {
        api.patch(
            &slot.name,
            &PatchParams::default(),
            &Patch::Merge(json!({"spec": spec})),
        )
        .await
        .map_err(failed)?;
    }
    api.patch(
        &slot.name,
        &PatchParams::apply(FIELD_MANAGER).force(),
        &Patch::Apply(patch),
    )
    .await
    .map_err(failed)?;
    Ok(())
}

/// Removes the node of a slot that is gone.
pub async fn delete_node(link: &Link, name: &str) -> Result<(), InnerError> {
    match Api::<Node>::all(link.client().clone())
        .delete(name, &DeleteParams::default())
        .await
    {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other
            .map(drop)
            .map_err(|source| InnerError::Delete(name.to_owned(), source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenantcluster::{
        build::slots::{plan, tests::network},
        validate::{
            tests::{cluster, options},
            validate,
        },
    };

    fn slot() -> Slot {
        let pools = json!([{"name": "a", "labels": {"tier": "db"}, "taints": [{"key": "db", "effect": "NoSchedule"}]}]);
        let valid = validate(&cluster(json!({"version": "v1.35.4", "nodePools": pools})), &options()).unwrap();
        plan(&valid, &network(), &BTreeMap::new()).unwrap().remove(1)
    }

    #[test]
    fn plan_node_is_left_alone_when_it_has_everything() {
        let slot = slot();
        let patch = node_patch(&slot, &NodeFacts::default()).unwrap().unwrap();
        let facts = NodeFacts {
            labels: serde_json::from_value(patch["metadata"]["labels"].clone()).unwrap(),
            applied: patch["metadata"]["annotations"][APPLIED].as_str().map(str::to_owned),
            taints: serde_json::from_value(patch["spec"]["taints"].clone()).unwrap(),
            ..NodeFacts::default()
        };
        assert_eq!(facts.labels["tier"], "db");
        assert_eq!(facts.labels["node-role.kubernetes.io/worker"], "");
        assert_eq!(node_patch(&slot, &facts).unwrap(), None);
    }

    #[test]
    fn plan_node_keeps_taints_of_others() {
        let other = Taint {
            key: "node.kubernetes.io/not-ready".into(),
            effect: "NoExecute".into(),
            ..Taint::default()
        };
        let facts = NodeFacts {
            taints: vec![other],
            ..NodeFacts::default()
        };
        let patch = node_patch(&slot(), &facts).unwrap().unwrap();
        let keys: Vec<_> = patch["spec"]["taints"]
            .as_array()
            .unwrap()
            .iter()
            .map(|taint| taint["key"].clone())
            .collect();
        assert_eq!(keys, ["db", "node.kubernetes.io/not-ready"]);
    }
}
