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

#[test]
fn admit_templates_without_labels_that_controllers_trust() {
    let spec = json!({"domain": {"memory": {"guest": "128Mi"}, "devices": {}}});
    let template = json!({"metadata": {"labels": {"app": "a", "kubevirt.io/nodeName": "n"}}, "spec": spec});
    let set = json!({"selector": {"matchLabels": {"app": "a"}}, "template": template});
    let machine = json!({"runStrategy": "Always", "template": template});
    for (kind, spec) in [("VirtualMachineInstanceReplicaSet", set), ("VirtualMachine", machine)] {
        let object = json!({"metadata": {"name": "a"}, "spec": spec});
        let decide = |own_request| {
            let review = Review {
                object: &object,
                old: None,
                own_request,
            };
            admit(&installation(), kind, review).unwrap()
        };
        let refused = decide(false);
        assert_eq!(refused.causes.len(), 1, "{kind}: {}", refused.message);
        assert_eq!(refused.causes[0].field, "spec.template.metadata.labels");
        assert!(
            refused.message.starts_with("creation of the following reserved"),
            "{kind}"
        );
        assert!(decide(true).allowed(), "{kind}");
    }
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
    let object = json!({"metadata": {"name": "a"}, "spec": {"runStrategy": "Always", "template": {"spec": {
        "domain": {"devices": {"tpm": {}}, "memory": {"guest": "64Mi"}}, "realtime": {},
    }}}});
    let decision = create("VirtualMachine", &object);
    assert_eq!(
        decision.message,
        "spec.template.spec.domain.devices.tpm: not supported, spec.template.spec.realtime: not supported"
    );
}

#[test]
fn admit_guest_network() {
    let of = |pod: Value| {
        let object = json!({"metadata": {"name": "a"}, "spec": {
            "domain": {"devices": {"interfaces": [{"name": "default", "masquerade": {}}]}, "memory": {"guest": "64Mi"}},
            "networks": [{"name": "default", "pod": pod}],
        }});
        create("VirtualMachineInstance", &object).message
    };
    assert_eq!(of(json!({"vmNetworkCIDR": "192.168.7.0/29"})), "");
    let field = "spec.networks[0].pod.vmNetworkCIDR";
    for (cidr, why) in [
        ("abc", "invalid CIDR address: abc"),
        ("10.0.2.0/31", "less than 4 addresses on network"),
        ("127.0.0.0/8", "overlaps 127.0.0.0/8, whose addresses no guest can have"),
    ] {
        assert_eq!(of(json!({"vmNetworkCIDR": cidr})), format!("{field}: {why}"));
    }
    let six = "spec.networks[0].pod.vmIPv6NetworkCIDR: not supported";
    assert_eq!(of(json!({"vmIPv6NetworkCIDR": "fd10:0:2::/120"})), six);
}

/// KubeVirt's own answers (tests/vectors/README.md).
#[test]
fn admit_agrees_with_kubevirt() {
    let texts = [
        include_str!("../tests/vectors/admission.jsonl"),
        include_str!("../tests/vectors/further.jsonl"),
    ];
    let lines = texts.iter().flat_map(|text| text.lines());
    let cases = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    let wrong: Vec<(String, String)> = cases.filter_map(|case| disagreement(&case)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Where our answer to a case is another than KubeVirt's.
fn disagreement(case: &Value) -> Option<(String, String)> {
    let (name, kind) = (case["name"].as_str().unwrap(), case["kind"].as_str().unwrap());
    let disagrees = |what: String| Some((name.to_owned(), what));
    let review = Review {
        object: &case["manifest"],
        old: None,
        own_request: false,
    };
    let Some(decision) = admit(&installation(), kind, review) else {
        return disagrees(format!("no rules for {kind}"));
    };
    let causes = case["causes"].as_array().cloned().unwrap_or_default();
    let text = |cause: &Value, key: &str| cause[key].as_str().unwrap().to_owned();
    let mut wanted: Vec<_> = causes
        .iter()
        .map(|cause| (text(cause, "field"), text(cause, "message")))
        .collect();
    let causes = decision.causes.iter();
    let mut got: Vec<_> = causes
        .map(|cause| (cause.field.clone(), cause.message.clone()))
        .collect();
    got.sort();
    wanted.sort();
    // Of what the schema refuses, and of what is not supported, only the verdict is the same.
    let schema = wanted.iter().any(|(field, _)| field.is_empty()) && case["causes"][0]["reason"] == "";
    let refused_only = case["subset"] == false || schema;
    if (refused_only && got.is_empty()) || (!refused_only && got != wanted) {
        return disagrees(format!("got {got:?}, KubeVirt says {wanted:?}"));
    }
    if case["allowed"] == true && kind == "VirtualMachineInstance" && case["subset"] == true {
        let mut defaulted = case["defaultedSpec"].clone();
        let firmware = defaulted["domain"]["firmware"].as_object_mut().unwrap();
        firmware.remove("uuid");
        let drawn = firmware.is_empty() && case["manifest"]["spec"]["domain"].get("firmware").is_none();
        if drawn {
            defaulted["domain"].as_object_mut().unwrap().remove("firmware");
        }
        let mut ours = defaulted_instance(&case["manifest"]).unwrap();
        if let Some(firmware) = ours["domain"].get_mut("firmware").and_then(Value::as_object_mut) {
            firmware.remove("uuid");
        }
        if ours != defaulted {
            return disagrees(format!("defaulted to {ours}, KubeVirt to {defaulted}"));
        }
    }
    None
}

#[test]
fn admit_dedicated_processors_are_whole_and_as_many_as_the_guest_has() {
    let of = |cpu: Value, resources: Value| {
        let mut cpu = cpu;
        cpu["dedicatedCpuPlacement"] = json!(true);
        let domain = json!({"cpu": cpu, "memory": {"guest": "64Mi"}, "resources": resources, "devices": {}});
        let object = json!({"metadata": {"name": "a"}, "spec": {"domain": domain}});
        let decision = create("VirtualMachineInstance", &object);
        let causes = decision.causes.iter();
        causes.map(|cause| cause.message.clone()).collect::<Vec<_>>().join(", ")
    };
    for (cpu, resources) in [
        (json!({}), json!({})),
        (json!({"isolateEmulatorThread": true}), json!({"limits": {"cpu": 2}})),
        (
            json!({"cores": 2, "threads": 2}),
            json!({"requests": {"cpu": "4000m"}, "limits": {"cpu": 4}}),
        ),
    ] {
        assert_eq!(of(cpu, resources), "");
    }
    let both = "spec.domain.resources.requests.cpu or spec.domain.resources.limits.cpu must not be provided at the same \
                time with spec.domain.cpu.cores when DedicatedCPUPlacement is true ";
    assert_eq!(of(json!({"cores": 2}), json!({"limits": {"cpu": 4}})), both);
    let memory = "spec.domain.resources.requests.memory must be equal to spec.domain.resources.limits.memory";
    let resources = json!({"requests": {"memory": "64Mi"}, "limits": {"memory": "128Mi"}});
    assert_eq!(of(json!({}), resources), memory);
    let numa = of(json!({"numa": {"guestMappingPassthrough": {}}}), json!({}));
    assert_eq!(numa, "spec.domain.cpu.numa: not supported");
    let realtime = of(json!({"realtime": {}}), json!({}));
    assert_eq!(realtime, "spec.domain.cpu.realtime: not supported");
}

#[test]
fn admit_fills_gaps_once() {
    let object =
        json!({"spec": {"domain": {"devices": {}, "resources": {"limits": {"memory": "1024Mi", "cpu": "1500m"}}}}});
    let once = defaulted_instance(&object).unwrap();
    assert_eq!(once["domain"]["memory"]["guest"], "1Gi");
    assert_eq!(once["domain"]["cpu"]["sockets"], 2);
    assert_eq!(defaulted_instance(&json!({"spec": once})).unwrap(), once);
}
