//! A replica set: its template as a machine's, and a selector that means the template's labels.
//!
//! Sentences of a selector are apimachinery's (`pkg/labels/selector.go`), as KubeVirt repeats them. Beyond KubeVirt, and as
//! with Kubernetes' own sets, a selector asks for something; and a claim is one instance's to write.

use std::collections::BTreeMap;

use kubernest_crds::Selector;
use kubernest_crds::kubevirt::v1::VirtualMachineInstanceReplicaSetSpec;

use super::{defaults, filled, guard, instance, read, template_annotations};
use crate::{
    Decision, Installation, Review,
    decision::{Report, kubevirt_style, reasons},
    names,
};

/// Decides upon a VirtualMachineInstanceReplicaSet.
pub fn decide(_: &Installation, review: Review<'_>) -> Decision {
    let mut report = Report::default();
    let filled = filled(review.object, "/spec/template/spec", defaults::fill_template);
    if let Some(spec) = read::<VirtualMachineInstanceReplicaSetSpec>(&mut report, &filled) {
        instance(&mut report, "spec.template.spec", &spec.template.spec);
        selector(&mut report, &spec);
        claims(&mut report, &spec);
    }
    guard::template_brings_none(&mut report, review);
    template_annotations(&mut report, review.object);
    report.decide(kubevirt_style)
}

fn selector(report: &mut Report, spec: &VirtualMachineInstanceReplicaSetSpec) {
    let field = "spec.selector";
    if let Some(why) = malformed(spec) {
        return report.invalid(field, why);
    }
    let none = BTreeMap::new();
    let labels = spec.template.metadata.as_ref().map_or(&none, |found| &found.labels);
    match Selector::new(&spec.selector) {
        Err(error) => report.invalid(field, error.to_string()),
        Ok(selector) if selector.is_empty() => report.invalid(field, "empty selector is invalid for a replica set"),
        Ok(selector) if !selector.matches(labels) => report.invalid(field, "selector does not match labels."),
        Ok(_) => {}
    }
}

/// A claim that instances write is theirs all at once: each would break the others' disk.
fn claims(report: &mut Report, spec: &VirtualMachineInstanceReplicaSetSpec) {
    let volumes = spec.template.spec.volumes.iter().flatten().enumerate();
    for (at, _) in volumes.filter(|(_, volume)| volume.has_writable_claim()) {
        let field = format!("spec.template.spec.volumes[{at}].persistentVolumeClaim");
        let message = format!(
            "{field}: the instances of a replica set would write to one claim; use ephemeral, which gives each its own overlay, \
             or readOnly: true"
        );
        report.add(reasons::FORBIDDEN, field, message);
    }
}

/// The first key or value that no label can have.
fn malformed(spec: &VirtualMachineInstanceReplicaSetSpec) -> Option<String> {
    let bad_key = |key: &str| names::label_key(key).map(|why| format!("key: Invalid value: {key:?}: {why}"));
    let bad_value = |key: &str, at: usize, value: &str| {
        names::label_value(value).map(|why| format!("values[{at}][{key}]: Invalid value: {value:?}: {why}"))
    };
    let mut labels = spec.selector.match_labels.iter().flatten();
    let of_labels = labels.find_map(|(key, value)| bad_key(key).or_else(|| bad_value(key, 0, value)));
    of_labels.or_else(|| {
        let mut expressions = spec.selector.match_expressions.iter().flatten();
        expressions.find_map(|expression| {
            let mut values = expression.values.iter().flatten().enumerate();
            bad_key(&expression.key).or_else(|| values.find_map(|(at, value)| bad_value(&expression.key, at, value)))
        })
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use crate::decision::Decision;
    use crate::{Review, machine};

    fn set(selector: Value) -> Value {
        json!({"metadata": {"name": "rs"}, "spec": {"selector": selector, "template": {
            "metadata": {"labels": {"app": "a", "tier": "b"}, "name": "web", "creationTimestamp": null},
            "spec": {"domain": {"memory": {"guest": "128Mi"}, "devices": {}}},
        }}})
    }

    fn decide(object: &Value, old: Option<&Value>) -> Decision {
        let installation = crate::Installation {
            versions: Vec::new(),
            node_cidr_pool: "100.64.0.0/10".parse().unwrap(),
            base_domain: String::new(),
        };
        let review = Review {
            object,
            old,
            own_request: false,
        };
        machine::decide_replica_set(&installation, review)
    }

    fn expression(key: &str, operator: &str, values: &[&str]) -> Value {
        json!({"matchLabels": {"app": "a"}, "matchExpressions": [{"key": key, "operator": operator, "values": values}]})
    }

    #[rstest]
    #[case::everything(json!({}), "empty selector is invalid for a replica set")]
    #[case::everything_by_lists(json!({"matchLabels": {}, "matchExpressions": []}), "empty selector is invalid for a replica set")]
    #[case::labels(json!({"matchLabels": {"app": "a"}}), "")]
    #[case::expression(expression("tier", "In", &["b", "c"]), "")]
    #[case::other(expression("tier", "NotIn", &["b"]), "selector does not match labels.")]
    #[case::operator(expression("tier", "Near", &[]), "\"Near\" is not a valid label selector operator")]
    #[case::values(
        expression("tier", "In", &[]),
        "values: Invalid value: null: for 'in', 'notin' operators, values set can't be empty"
    )]
    #[case::key(expression("", "Exists", &[]), "key: Invalid value: \"\": name part must be non-empty")]
    #[case::unknown(json!({"matchNames": {}}), "spec.selector.matchNames: not supported, ")]
    fn admit_replica_set_by_its_selector(#[case] selector: Value, #[case] message: &str) {
        let decision = decide(&set(selector), None);
        match message.is_empty() {
            true => assert_eq!(decision, Decision::default()),
            false => assert!(
                decision.message.starts_with(message.trim_end_matches(", ")),
                "{}",
                decision.message
            ),
        }
    }

    #[rstest]
    #[case::writes(json!({"persistentVolumeClaim": {"claimName": "c"}}), false)]
    #[case::says_so(json!({"persistentVolumeClaim": {"claimName": "c", "readOnly": false}}), false)]
    #[case::reads(json!({"persistentVolumeClaim": {"claimName": "c", "readOnly": true}}), true)]
    #[case::overlay(json!({"ephemeral": {"persistentVolumeClaim": {"claimName": "c"}}}), true)]
    fn admit_replica_set_without_a_claim_that_all_write(#[case] mut volume: Value, #[case] allowed: bool) {
        let mut object = set(json!({"matchLabels": {"app": "a"}}));
        volume["name"] = json!("c");
        object["spec"]["template"]["spec"]["volumes"] =
            json!([{"name": "empty", "emptyDisk": {"capacity": "1Gi"}}, volume]);
        let disks = json!([{"name": "empty", "disk": {}}, {"name": "c", "disk": {"bus": "virtio"}}]);
        object["spec"]["template"]["spec"]["domain"]["devices"]["disks"] = disks;
        let decision = decide(&object, None);
        let fields: Vec<&str> = decision.causes.iter().map(|cause| cause.field.as_str()).collect();
        let expected = [].as_slice();
        let refused = ["spec.template.spec.volumes[1].persistentVolumeClaim"];
        assert_eq!(
            fields,
            if allowed { expected } else { &refused },
            "{}",
            decision.message
        );
        assert!(
            allowed || decision.message.contains("use ephemeral"),
            "{}",
            decision.message
        );
    }

    #[test]
    fn admit_replica_set_checks_its_template_when_updated_too() {
        let old = set(json!({"matchLabels": {"app": "a"}}));
        let mut new = old.clone();
        new["spec"]["replicas"] = json!(3);
        assert_eq!(decide(&new, Some(&old)), Decision::default());
        new["spec"]["template"]["spec"]["domain"]["devices"] = json!({"disks": [{"name": "x", "disk": {}}], "tpm": {}});
        new["spec"]["minReadySeconds"] = json!(3);
        let decision = decide(&new, Some(&old));
        let fields: Vec<&str> = decision.causes.iter().map(|cause| cause.field.as_str()).collect();
        let template = "spec.template.spec.domain.devices";
        let expected = [
            "spec.minReadySeconds".to_owned(),
            format!("{template}.tpm"),
            format!("{template}.disks[0].name"),
        ];
        assert_eq!(fields, expected);
    }
}
