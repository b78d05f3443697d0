//! What users must not change of an object's metadata, even of one that is on its way out: labels that controllers trust,
//! and the finalizer by which an object stays until its process, or a cluster until all that it had, is surely gone.

use std::collections::BTreeMap;

use kubernest_crds::{
    TENANT_FINALIZER, TenantCluster,
    kubevirt::v1::{VM_FINALIZER, VMI_FINALIZER},
};
use serde_json::Value;

use crate::{
    Decision, Review,
    decision::{Cause, Report, kubevirt_style, reasons, with_fields},
};

/// Labels of an instance that controllers trust (KubeVirt's list).
const RESERVED: [&str; 7] = [
    "kubevirt.io/created-by",
    "kubevirt.io/nodeName",
    "kubevirt.io/migrationJobUID",
    "kubevirt.io/managed-by",
    "kubevirt.io/install-strategy-version",
    "kubevirt.io/install-strategy-registry",
    "kubevirt.io/schedulable",
];

/// Refuses a user's change of what is Kubernest's alone; `None` where there is none.
pub fn guard(kind: &str, review: Review<'_>) -> Option<Decision> {
    let old = review.old.filter(|_| !review.own_request)?;
    // Sentences of KubeVirt's kinds carry the field themselves.
    let (style, prefix): (fn(&[Cause]) -> String, _) = match kind {
        "TenantCluster" => (with_fields, ""),
        _ => (kubevirt_style, "metadata.finalizers: "),
    };
    let mut report = Report::default();
    if let Some((finalizer, until)) = finalizer_of(kind)
        && has_finalizer(old, finalizer)
        && !has_finalizer(review.object, finalizer)
    {
        let message = format!("{prefix}{finalizer} is taken off by kubernest-operator once {until}");
        report.add(reasons::FORBIDDEN, "metadata.finalizers", message);
    }
    if kind == "VirtualMachineInstance" && reserved(old) != reserved(review.object) {
        let message = "modification of the following reserved kubevirt.io/ labels on a VMI object is prohibited";
        report.not_supported("", message);
    }
    (report.count() > 0).then(|| report.decide(style))
}

const BRINGS: &str = "creation of the following reserved kubevirt.io/ labels on a VMI object is prohibited";
/// Where labels of instances to come stand.
const TEMPLATE: &str = "/spec/template";

/// Refuses a new instance that brings such labels.
pub fn brings_none(report: &mut Report, object: &Value) {
    if !reserved(object).is_empty() {
        report.not_supported("metadata.labels", BRINGS);
    }
}

/// Refuses a user's template that brings such labels: instances are made of it by Kubernest, whose own requests may.
pub fn template_brings_none(report: &mut Report, review: Review<'_>) {
    let found = |object: &Value| {
        object
            .pointer(TEMPLATE)
            .is_some_and(|template| !reserved(template).is_empty())
    };
    if !review.own_request && found(review.object) {
        report.not_supported("spec.template.metadata.labels", BRINGS);
    }
}

/// Refuses a user's change of a machine that a TenantCluster wrote, and would write again.
pub fn leaves_a_clusters_own(report: &mut Report, review: Review<'_>) {
    let Some(cluster) = review.old.filter(|_| !review.own_request).and_then(cluster_of) else {
        return;
    };
    let message = format!("spec is TenantCluster {cluster}'s to write: change the TenantCluster instead");
    report.add(reasons::FORBIDDEN, "spec", message);
}

/// The TenantCluster that controls an object.
fn cluster_of(object: &Value) -> Option<&str> {
    let mut owners = object.pointer("/metadata/ownerReferences")?.as_array()?.iter();
    let owner = owners.find(|owner| owner["controller"] == true)?;
    let text = |field: &str| owner[field].as_str();
    text("name").filter(|_| {
        TenantCluster::is_named_by(text("apiVersion").unwrap_or_default(), text("kind").unwrap_or_default())
    })
}

/// The finalizer of a kind, and when it is taken off.
fn finalizer_of(kind: &str) -> Option<(&'static str, &'static str)> {
    const PROCESS: &str = "the machine's process is surely gone";
    const CLUSTER: &str = "its machines are surely gone and nobody is on its network";
    match kind {
        "TenantCluster" => Some((TENANT_FINALIZER, CLUSTER)),
        "VirtualMachine" => Some((VM_FINALIZER, PROCESS)),
        "VirtualMachineInstance" => Some((VMI_FINALIZER, PROCESS)),
        _ => None,
    }
}

fn has_finalizer(object: &Value, finalizer: &str) -> bool {
    let all = object.pointer("/metadata/finalizers").and_then(Value::as_array);
    all.into_iter().flatten().any(|one| one == finalizer)
}

fn reserved(object: &Value) -> BTreeMap<&str, &Value> {
    let labels = object.pointer("/metadata/labels").and_then(Value::as_object);
    let labels = labels.into_iter().flatten();
    labels
        .map(|(key, value)| (key.as_str(), value))
        .filter(|(key, _)| RESERVED.contains(key))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(kind: &str, old: Value, object: Value, own_request: bool) -> Option<String> {
        let review = Review {
            object: &object,
            old: Some(&old),
            own_request,
        };
        guard(kind, review).map(|decision| decision.message)
    }

    #[test]
    fn guard_keeps_the_finalizer_of_an_object_that_goes() {
        let object = |finalizers: Value| json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": finalizers}});
        for (kind, finalizer) in [
            ("TenantCluster", TENANT_FINALIZER),
            ("VirtualMachine", VM_FINALIZER),
            ("VirtualMachineInstance", VMI_FINALIZER),
        ] {
            let (held, let_go) = (object(json!([finalizer, "other"])), object(json!(["other"])));
            let told = refusal(kind, held.clone(), let_go.clone(), false).unwrap();
            assert!(
                told.starts_with(&format!("metadata.finalizers: {finalizer} is")),
                "{told}"
            );
            assert_eq!(refusal(kind, held.clone(), let_go.clone(), true), None);
            assert_eq!(refusal(kind, let_go, held.clone(), false), None);
            assert_eq!(refusal(kind, held, object(json!([finalizer])), false), None);
        }
    }

    #[test]
    fn guard_keeps_labels_that_controllers_trust() {
        let object = |labels: Value| json!({"metadata": {"labels": labels}});
        let node = |name: &str| object(json!({"kubevirt.io/nodeName": name, "app": name}));
        let refused = refusal("VirtualMachineInstance", node("a"), node("b"), false).unwrap();
        assert!(
            refused.starts_with("modification of the following reserved"),
            "{refused}"
        );
        assert!(refusal("VirtualMachineInstance", node("a"), object(json!({})), false).is_some());
        let app = |name: &str| object(json!({"app": name}));
        assert_eq!(refusal("VirtualMachineInstance", app("a"), app("b"), false), None);
    }
}
