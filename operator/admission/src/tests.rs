//! Decisions on whole objects: the examples of `crds/examples`, KubeVirt's own answers, and updates.

use std::path::Path;

use kubernest_domain::machine::Source;
use kubernest_domain::processors::Processors;
use kubernest_domain::{Launch, fat, plan, xml};
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
fn admit_leaves_a_tenants_machines_to_its_cluster() {
    let machine = |strategy: &str, owner: &str| {
        let owner =
            json!({"apiVersion": "kubernest.io/v1alpha1", "kind": owner, "name": "customera", "controller": true});
        let template = json!({"spec": {"domain": {"memory": {"guest": "128Mi"}, "devices": {}}}});
        json!({"metadata": {"name": "a", "ownerReferences": [owner]}, "spec": {"runStrategy": strategy, "template": template}})
    };
    let decide = |owner, own_request| {
        let (old, new) = (machine("Always", owner), machine("Halted", owner));
        let review = Review {
            object: &new,
            old: Some(&old),
            own_request,
        };
        admit(&installation(), "VirtualMachine", review).unwrap()
    };
    let refused = decide("TenantCluster", false);
    assert_eq!(
        refused.message,
        "spec is TenantCluster customera's to write: change the TenantCluster instead"
    );
    assert!(decide("TenantCluster", true).allowed());
    assert!(decide("Pool", false).allowed());
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
fn admit_refuses_by_name_what_no_launcher_could_start() {
    let refused = |path: &str, value: Value| {
        let mut object = json!({"metadata": {"name": "a"}, "spec": {
            "domain": {"devices": {}, "memory": {"guest": "64Mi"}},
            "volumes": [{"name": "s", "secret": {"secretName": "s"}}],
        }});
        let (parent, key) = path.rsplit_once('/').unwrap();
        object.pointer_mut(parent).unwrap()[key] = value;
        let decision = create("VirtualMachineInstance", &object);
        decision
            .causes
            .iter()
            .map(|cause| cause.field.clone())
            .collect::<Vec<_>>()
            .join(" ")
    };
    let label = "/spec/volumes/0/secret/volumeLabel";
    assert_eq!(refused(label, json!("settings_01")), "");
    assert_eq!(
        refused(label, json!("settings-0123")),
        "spec.volumes[0].secret.volumeLabel"
    );
    let blocks = |bytes: u64| {
        let size = json!({"custom": {"logical": bytes, "physical": bytes}});
        json!([{"name": "s", "disk": {"bus": "virtio"}, "blockSize": size}])
    };
    let disks = "/spec/domain/devices/disks";
    assert_eq!(refused(disks, blocks(4096)), "");
    assert_eq!(
        refused(disks, blocks(8192)),
        "spec.domain.devices.disks[0].blockSize.custom.logical"
    );
    let action = |action: &str| json!({"name": "w", "i6300esb": {"action": action}});
    let watchdog = "/spec/domain/devices/watchdog";
    assert_eq!(refused(watchdog, action("shutdown")), "");
    assert_eq!(
        refused(watchdog, action("dump")),
        "spec.domain.devices.watchdog.i6300esb.action"
    );
    // Beside them a disk for the volume, and the interface that there is by default.
    let inputs = |count: usize| json!(vec![json!({"name": "t", "type": "tablet"}); count]);
    let devices = "/spec/domain/devices/inputs";
    let room = kubernest_domain::xml::MAX_PCI_DEVICES - 2;
    assert_eq!(refused(devices, inputs(room)), "");
    assert_eq!(refused(devices, inputs(room + 1)), "spec.domain.devices");
    let claim = json!([{"name": "c", "persistentVolumeClaim": {"claimName": "c", "readOnly": true}}]);
    assert_eq!(refused("/spec/volumes", claim), "spec.domain.devices.disks[0].disk.bus");
    let share = |name: String| json!([{"name": name, "virtiofs": {}}]);
    let shares = "/spec/domain/devices/filesystems";
    assert_eq!(refused(shares, share("a".repeat(36))), "");
    assert_eq!(
        refused(shares, share("a".repeat(37))),
        "spec.domain.devices.filesystems[0].name"
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
fn vectors() -> impl Iterator<Item = Value> {
    let texts = [
        include_str!("../tests/vectors/admission.jsonl"),
        include_str!("../tests/vectors/further.jsonl"),
    ];
    let lines = texts.into_iter().flat_map(str::lines);
    lines.map(|line| serde_json::from_str(line).unwrap())
}

#[test]
fn admit_agrees_with_kubevirt() {
    let wrong: Vec<(String, String)> = vectors().filter_map(|case| disagreement(&case)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What the refusal of a case beyond the subset must name.
const BEYOND: [(&str, &str); 35] = [
    ("lun-on-emptydisk", "spec.domain.devices.disks[2].lun"),
    ("lun-on-pvc", "spec.domain.devices.disks[2].lun"),
    ("disk-pciaddress-ok", "spec.domain.devices.disks[0].disk.pciAddress"),
    ("disk-pciaddress-bad", "spec.domain.devices.disks[0].disk.pciAddress"),
    ("disk-shareable", "spec.domain.devices.disks[0].shareable"),
    ("hostdisk-volume", "spec.volumes[2].hostDisk"),
    ("datavolume-volume", "spec.volumes[2].dataVolume"),
    ("downwardapi-volume", "spec.volumes[2].downwardAPI"),
    ("slirp-on-pod", "spec.domain.devices.interfaces[0].slirp"),
    ("sriov-on-pod", "spec.domain.devices.interfaces[0].sriov"),
    ("macvtap-on-pod", "spec.domain.devices.interfaces[0].macvtap"),
    ("passt-on-pod", "spec.domain.devices.interfaces[0].passt"),
    ("iface-state-up", "spec.domain.devices.interfaces[0].state"),
    ("iface-state-absent", "spec.domain.devices.interfaces[0].state"),
    ("hugepages-bad", "spec.domain.memory.hugepages"),
    ("hugepages-notdivisible", "spec.domain.memory.hugepages"),
    ("cpu-maxsockets-less", "spec.domain.cpu.sockets"),
    ("numa-without-dedicated", "spec.domain.cpu.numa"),
    ("fw-efi", "EFI SecureBoot"),
    ("tpm", "spec.domain.devices.tpm"),
    ("input-ps2", "spec.domain.devices.inputs[0].bus"),
    ("sound-ok", "spec.domain.devices.sound"),
    ("sound-noname", "spec.domain.devices.sound"),
    ("gpu", "spec.domain.devices.gpus"),
    ("hostdevice", "spec.domain.devices.hostDevices"),
    ("iothreads-shared", "spec.domain.ioThreadsPolicy"),
    ("dedicated-iothread", "spec.domain.devices.disks[0].dedicatedIOThread"),
    (
        "dedicated-iothread-sata",
        "spec.domain.devices.disks[0].dedicatedIOThread",
    ),
    ("vsock", "spec.domain.devices.autoattachVSOCK"),
    ("video-type-virtio", "spec.domain.devices.video"),
    ("eviction-LiveMigrateIfPossible", "spec.evictionStrategy"),
    ("eviction-External", "spec.evictionStrategy"),
    ("hyperv-relaxed", "spec.domain.features.hyperv"),
    ("hyperv-synictimer-nosynic", "spec.domain.features.hyperv"),
    ("vm-dvt-unused", "spec.dataVolumeTemplates"),
];

/// A path without the places in lists, which KubeVirt leaves out where it checks the schema.
fn without_places(path: &str) -> String {
    let parts = path
        .split('[')
        .map(|part| part.split_once(']').map_or(part, |(_, rest)| rest));
    parts.collect()
}

/// Names that stand nowhere in a refusal: of what is not supported, or of what KubeVirt's schema refuses.
fn unnamed(case: &Value, got: &[(String, String)]) -> Vec<String> {
    let beyond = BEYOND
        .iter()
        .filter(|(name, _)| case["name"] == *name && case["subset"] == false);
    let mut names: Vec<String> = beyond.map(|(_, field)| (*field).to_owned()).collect();
    if case["subset"] == true {
        let causes = case["causes"].as_array().into_iter().flatten();
        let causes = causes.filter(|cause| cause["field"] == "");
        names.extend(causes.filter_map(|cause| Some(cause["message"].as_str()?.split_once(" in body")?.0.to_owned())));
    } else if names.is_empty() {
        names.push("what BEYOND should have of it".to_owned());
    }
    let says = |name: &String| {
        let mut texts = got.iter().flat_map(|(field, message)| [field, message]);
        texts.any(|text| text.contains(name) || without_places(text).contains(name))
    };
    names.retain(|name| !says(name));
    names
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
    // Of what the schema refuses, and of what is not supported, the verdict is the same, and what is named.
    let schema = wanted.iter().any(|(field, _)| field.is_empty()) && case["causes"][0]["reason"] == "";
    let refused_only = case["subset"] == false || schema;
    if (refused_only && got.is_empty()) || (!refused_only && got != wanted) {
        return disagrees(format!("got {got:?}, KubeVirt says {wanted:?}"));
    }
    let unnamed = unnamed(case, &got);
    if refused_only && !unnamed.is_empty() {
        return disagrees(format!("{got:?} does not name {unnamed:?}"));
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

/// What ours says of machines that KubeVirt admits too, though no launcher can run them, its own neither.
const NEVER_RUN: [&str; 7] = [
    "spec.domain.cpu.cores: must be at most 256",
    "spec.domain.memory.guest: must be at least 1M",
    "spec.domain.memory.guest: must be a size in bytes",
    "spec.domain.clock.timer.pit.tickPolicy: not supported",
    "spec.domain.devices.filesystems[0].name 'f' not found",
    "spec.volumes[2].emptyDisk.capacity: must be greater than 0",
    "spec.volumes[2].emptyDisk.capacity: must be a size in bytes",
];

/// What is admitted becomes a domain: nobody learns only from a launcher that something is not supported.
#[rstest::rstest]
fn admit_what_becomes_a_domain(#[values("kvm", "tcg")] accelerator: &str) {
    let admitted = vectors().filter(|case| case["allowed"] == true && case["subset"] == true);
    let admitted = admitted.map(|case| (case["name"].as_str().unwrap().to_owned(), case["manifest"].clone()));
    let mut failed = Vec::new();
    for (name, manifest) in admitted.chain(examples()) {
        let template = manifest.pointer("/spec/template").unwrap_or(&manifest);
        if manifest["kind"] == "VirtualMachineInstancePreset" {
            continue;
        }
        if let Err(why) = domain(template, accelerator)
            && !NEVER_RUN.contains(&why.as_str())
        {
            failed.push(format!("{name}: {why}"));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// The machines of `crds/examples/valid`, by file name.
fn examples() -> impl Iterator<Item = (String, Value)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crds/examples/valid");
    let files = std::fs::read_dir(directory).unwrap().map(|file| file.unwrap());
    let files = files.map(|file| (file.file_name().into_string().unwrap(), file.path()));
    let files = files.filter(|(name, _)| name.starts_with("virtualmachine"));
    files.flat_map(|(name, path)| {
        let documents: Vec<Value> = serde_saphyr::from_multiple(&std::fs::read_to_string(path).unwrap()).unwrap();
        documents.into_iter().map(move |document| (name.clone(), document))
    })
}

/// The same of disks that launchers make of files, with all sizes of blocks and with labels of all lengths.
#[test]
fn admit_disks_of_files_that_become_images() {
    let targets = ["virtio", "scsi", "usb", "sata"].map(|bus| json!({"disk": {"bus": bus}}));
    let targets = [&targets[..], &[json!({"disk": {}}), json!({"cdrom": {"bus": "scsi"}})]].concat();
    let label = |length: usize| json!({"secret": {"secretName": "s", "volumeLabel": "l".repeat(length)}});
    let mut volumes: Vec<Value> = (0..13).map(label).collect();
    volumes.extend([
        json!({"configMap": {"name": "c", "volumeLabel": ""}}),
        json!({"serviceAccount": {"serviceAccountName": "a"}}),
        json!({"cloudInitNoCloud": {"userData": "#cloud-config"}}),
        json!({"cloudInitConfigDrive": {"userData": "#cloud-config"}}),
    ]);
    for (target, volume) in targets
        .iter()
        .flat_map(|target| volumes.iter().map(move |volume| (target, volume)))
    {
        let mut sizes = Vec::new();
        for logical in (9..22).map(|power| 1_u64 << power) {
            let (mut disk, mut volume) = (target.clone(), volume.clone());
            (disk["name"], volume["name"]) = (json!("f"), json!("f"));
            disk["blockSize"] = json!({"custom": {"logical": logical, "physical": 1 << 21}});
            let object = json!({"metadata": {"name": "a"}, "spec": {
                "domain": {"devices": {"disks": [disk]}, "memory": {"guest": "64Mi"}}, "volumes": [volume],
            }});
            if create("VirtualMachineInstance", &object).allowed() {
                sizes.push(logical);
                assert_eq!(domain(&object, "kvm").err(), None, "{object}");
            }
        }
        let too_long = *volume == label(12);
        assert_eq!(sizes.is_empty(), too_long, "{target} {volume}: {sizes:?}");
    }
}

/// The domain of an instance like this, on a node that has what it asks for.
fn domain(template: &Value, accelerator: &str) -> Result<String, String> {
    let instance = json!({"metadata": {"name": "a", "namespace": "b"}, "spec": template["spec"]});
    let instance = mutate(&instance, &[], "3f0d5d1e-0000-4000-8000-000000000001")
        .unwrap()
        .object;
    let list = |path: &str| {
        instance["spec"]
            .pointer(path)
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default()
    };
    let interfaces = list("/domain/devices/interfaces")
        .into_iter()
        .enumerate()
        .map(|(index, interface)| {
            let mac = interface["macAddress"].as_str().unwrap_or("02:00:00:00:00:01");
            // As the controller writes it.
            let mac = mac.to_ascii_lowercase().replace('-', ":");
            let kind = if interface.get("bridge").is_some() {
                "bridge"
            } else {
                "masquerade"
            };
            json!({"name": interface["name"], "kind": kind, "tap": format!("tap{index}"), "mac": mac, "mtu": 1400})
        });
    let interfaces: Vec<Value> = interfaces.collect();
    let claimed = |volume: &Value| {
        volume
            .get("persistentVolumeClaim")
            .or(volume.get("ephemeral"))
            .is_some()
    };
    let volumes = list("/volumes").into_iter().filter(claimed);
    let volumes = volumes.map(|volume| {
        let name = volume["name"].as_str().unwrap().to_owned();
        (name, json!({"mode": "Filesystem", "capacity": 1_u64 << 30}))
    });
    let volumes: serde_json::Map<String, Value> = volumes.collect();
    let launch = json!({"vmi": instance, "accelerator": accelerator, "volumes": volumes, "interfaces": interfaces});
    let launch = Launch::parse(&launch.to_string()).map_err(|error| error.to_string())?;
    let processors = (0..launch.dedicated().unwrap_or(4)).collect();
    let machine = plan::machine(&launch, &Processors::new(processors, |_| None)).map_err(|error| error.to_string())?;
    for disk in &machine.disks {
        let label = match &disk.source {
            Source::CloudInit(_) => fat::CLOUD_INIT_LABEL,
            Source::Files { label, .. } => label,
            _ => continue,
        };
        fat::image(label, disk.sector_bytes(), &[]).map_err(|error| error.to_string())?;
    }
    Ok(xml::domain(&machine))
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
