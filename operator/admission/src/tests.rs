//! Decisions on whole objects: the examples of `crds/examples`, KubeVirt's own answers, and updates.

use serde_json::json;

use super::*;

fn installation() -> Installation {
    Installation {
        versions: vec!["v1.34.4".to_owned(), "v1.35.4".to_owned()],
        node_cidr_pool: "100.64.0.0/10".parse().unwrap(),
        base_domain: "kubernest.local".to_owned(),
    }
}

fn create(kind: &str, object: &Value) -> Decision {
    admit(
        &installation(),
        kind,
        Review {
            object,
            old: None,
            own_request: false,
        },
    )
    .unwrap()
}

fn tenant(spec: Value) -> Value {
    json!({"metadata": {"name": "a", "namespace": "org"}, "spec": spec})
}

fn update(new: &Value, old: &Value) -> Decision {
    admit(
        &installation(),
        "TenantCluster",
        Review {
            object: new,
            old: Some(old),
            own_request: false,
        },
    )
    .unwrap()
}

#[test]
fn admit_tenant_with_a_version_only() {
    assert_eq!(
        create("TenantCluster", &tenant(json!({"version": "v1.35.4"}))),
        Decision::default()
    );
}

#[test]
fn admit_tenant_reports_all_causes_at_once() {
    let decision = create(
        "TenantCluster",
        &tenant(json!({"version": "v9.9.9", "controlPlane": {"replicas": 2, "cpu": 0}})),
    );
    let fields: Vec<_> = decision.causes.iter().map(|cause| cause.field.as_str()).collect();
    assert_eq!(
        fields,
        ["spec.version", "spec.controlPlane.replicas", "spec.controlPlane.cpu"]
    );
    assert!(
        decision
            .message
            .starts_with("spec.version: unknown version \"v9.9.9\": known versions are v1.34.4, v1.35.4; ")
    );
}

#[rstest::rstest]
#[case(json!({"network": {"podCIDR": "10.20.0.0/16"}}), "spec.network.podCIDR: is immutable")]
#[case(json!({"version": "v1.34.4"}), "spec.version: cannot change from v1.35.4 to v1.34.4: upgrades are not supported yet")]
#[case(json!({"controlPlane": {"storage": {"size": "4Gi"}}}), "spec.controlPlane.storage.size: cannot shrink from 8Gi to 4Gi")]
#[case(json!({"controlPlane": {"storage": {"size": "16Gi"}}}), "spec.controlPlane.storage.size: cannot grow")]
#[case(json!({"controlPlane": {"storage": {"storageClassName": "x"}}}), "spec.controlPlane.storage.storageClassName: is immutable")]
#[case(json!({"nodePools": [{"name": "default", "storage": {"size": "1Gi"}}]}), "spec.nodePools[0].storage.size: cannot shrink")]
fn admit_tenant_update_refuses(#[case] change: Value, #[case] message: &str) {
    let mut spec = json!({"version": "v1.35.4"});
    spec.as_object_mut()
        .unwrap()
        .append(&mut change.as_object().unwrap().clone());
    let decision = update(&tenant(spec), &tenant(json!({"version": "v1.35.4"})));
    assert!(decision.message.contains(message), "{}", decision.message);
}

#[test]
fn admit_tenant_update_scales_a_pool() {
    let old = tenant(json!({"version": "v1.35.4", "nodePools": [{"name": "a", "replicas": 1}]}));
    let new = tenant(
        json!({"version": "v1.35.4", "nodePools": [{"name": "a", "replicas": 3}, {"name": "b", "replicas": 0}]}),
    );
    assert!(update(&new, &old).allowed());
}

#[test]
fn admit_tenant_that_no_longer_fits_the_rules_can_be_labelled_and_deleted() {
    let old = tenant(json!({"version": "v1.20.0"}));
    let mut labelled = old.clone();
    labelled["metadata"]["labels"] = json!({"a": "b"});
    assert!(update(&labelled, &old).allowed());
    let mut deleting = tenant(json!({"version": "v1.20.0", "nodePools": []}));
    deleting["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    assert!(update(&deleting, &old).allowed());
    let scaled = tenant(json!({"version": "v1.20.0", "nodePools": [{"name": "a"}]}));
    assert!(update(&scaled, &old).allowed(), "a version whose image is gone is kept");
}

#[test]
fn admit_instance_spec_is_not_changed_by_users() {
    let old = json!({"metadata": {"name": "a"}, "spec": {"domain": {"devices": {}}}});
    let new = json!({"metadata": {"name": "a"}, "spec": {"domain": {"devices": {"rng": {}}}}});
    let decide = |own_request| {
        let review = Review {
            object: &new,
            old: Some(&old),
            own_request,
        };
        admit(&installation(), "VirtualMachineInstance", review).unwrap()
    };
    assert_eq!(decide(false).message, "update of VMI object is restricted");
    assert!(decide(true).allowed());
}

/// A machine as the tenant half makes it must pass.
#[test]
fn admit_machine_of_a_slot() {
    let object = json!({"metadata": {"name": "a-cp-0", "namespace": "org"}, "spec": {"runStrategy": "Always", "template": {
        "metadata": {"labels": {"kubernest.io/cluster": "a"}},
        "spec": {
            "domain": {
                "cpu": {"cores": 2}, "memory": {"guest": "2Gi"},
                "firmware": {"kernelBoot": {"kernelArgs": "console=ttyS0", "container": {
                    "image": "localhost/kubernest-node@sha256:0", "kernelPath": "/boot/vmlinuz", "initrdPath": "/boot/initrd.img"}}},
                "devices": {
                    "disks": [{"name": "root", "disk": {"bus": "virtio"}}, {"name": "data", "disk": {"bus": "virtio"}, "serial": "data"}],
                    "filesystems": [{"name": "bootstrap", "virtiofs": {}}],
                    "interfaces": [
                        {"name": "default", "masquerade": {}, "ports": [{"port": 6443}]},
                        {"name": "tenant", "bridge": {}, "macAddress": "02:00:10:01:00:0a"}],
                    "rng": {},
                },
            },
            "networks": [{"name": "default", "pod": {}}, {"name": "tenant", "multus": {"networkName": "org/a"}}],
            "volumes": [
                {"name": "root", "containerDisk": {"image": "localhost/kubernest-node@sha256:0"}},
                {"name": "data", "persistentVolumeClaim": {"claimName": "a-cp-0-data"}},
                {"name": "bootstrap", "secret": {"secretName": "a-cp-0-bootstrap"}}],
            "terminationGracePeriodSeconds": 60,
        },
    }}});
    assert_eq!(create("VirtualMachine", &object), Decision::default());
}

#[test]
fn admit_machine_refuses_what_is_not_supported_by_path() {
    let object = json!({"metadata": {"name": "a"}, "spec": {"runStrategy": "Manual", "template": {"spec": {
        "domain": {"devices": {"tpm": {}}, "memory": {"guest": "64Mi"}}, "realtime": {},
    }}}});
    let decision = create("VirtualMachine", &object);
    assert_eq!(
        decision.message,
        "spec.template.spec.domain.devices.tpm: not supported, spec.template.spec.realtime: not supported, \
         spec.runStrategy: Manual is not supported"
    );
}

/// KubeVirt's answers, where they are to be had. Cases whose fields are not supported yet are refused by name, which is
/// no equality; the number that are equal may only grow.
#[test]
fn admit_agrees_with_kubevirt() {
    let Ok(vectors) = std::env::var("KUBERNEST_ADMISSION_VECTORS") else {
        return;
    };
    let text = std::fs::read_to_string(vectors).unwrap();
    let (mut equal, mut total) = (0, 0);
    for line in text.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let Some(decision) = admit(
            &installation(),
            case["kind"].as_str().unwrap(),
            Review {
                object: &case["manifest"],
                old: None,
                own_request: false,
            },
        ) else {
            continue;
        };
        total += 1;
        let mut got: Vec<_> = decision
            .causes
            .iter()
            .map(|cause| (cause.field.clone(), cause.message.clone()))
            .collect();
        let mut wanted: Vec<(String, String)> = case["causes"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|cause| {
                (
                    cause["field"].as_str().unwrap().to_owned(),
                    cause["message"].as_str().unwrap().to_owned(),
                )
            })
            .collect();
        got.sort();
        wanted.sort();
        let schema_error = wanted.iter().any(|(field, _)| field.is_empty()) && case["causes"][0]["reason"] == "";
        let same = if case["subset"] == false || schema_error {
            !got.is_empty()
        } else {
            got == wanted
        };
        equal += usize::from(same);
        if !same {
            println!("{}: got {got:?}, KubeVirt says {wanted:?}", case["name"]);
        }
    }
    println!("{equal} of {total} equal");
}
