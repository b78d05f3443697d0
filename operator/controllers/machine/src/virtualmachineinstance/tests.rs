//! Tables of the instance's pure decisions: what is valid, what pod is built, what status follows from what pod.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use kubernest_crds::kubevirt::v1::{VirtualMachineInstance, phase};
use kubernest_domain::{Accelerator, LAUNCH_ENV, Launch, VolumeMode};
use rstest::rstest;
use serde_json::{Value, json};

use super::status::{POD_SCHEDULED, Seen, status};
use super::validate::{Machine, Obstacle, validate};
use super::{build, ending, networks, reasons, resources};
use crate::stores::NodeState;
use crate::{Emulation, conditions};

fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn instance() -> VirtualMachineInstance {
    read(json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {
            "name": "customera-cp-0", "namespace": "org-acme", "uid": "u-1",
            "labels": {"kubernest.io/cluster": "customera"}, "annotations": {"kept": "yes"},
        },
        "spec": {
            "terminationGracePeriodSeconds": 60,
            "hostname": "cp-0",
            "nodeSelector": {"zone": "a"},
            "priorityClassName": "machines",
            "domain": {
                "cpu": {"cores": 2},
                "memory": {"guest": "2Gi"},
                "firmware": {"kernelBoot": {"kernelArgs": "ro", "container": {
                    "image": "img@sha256:1", "kernelPath": "/boot/vmlinuz", "initrdPath": "/boot/initrd.img",
                    "imagePullSecret": "registry",
                }}},
                "devices": {
                    "disks": [
                        {"name": "os", "disk": {"bus": "virtio"}},
                        {"name": "data", "disk": {"bus": "virtio"}, "serial": "data"},
                        {"name": "seed", "cdrom": {}},
                    ],
                    "filesystems": [{"name": "bootstrap", "virtiofs": {}}],
                    "interfaces": [
                        {"name": "pod", "masquerade": {}, "ports": [{"port": 6443}]},
                        {"name": "tenant", "bridge": {}, "macAddress": "02-00-10-01-00-0A"},
                    ],
                },
            },
            "networks": [
                {"name": "pod", "pod": {}},
                {"name": "tenant", "multus": {"networkName": "customera"}},
            ],
            "volumes": [
                {"name": "os", "containerDisk": {"image": "img@sha256:1", "path": "/disk/node.qcow2"}},
                {"name": "data", "persistentVolumeClaim": {"claimName": "cp-0-data"}},
                {"name": "bootstrap", "secret": {"secretName": "cp-0-bootstrap"}},
                {"name": "seed", "cloudInitNoCloud": {"secretRef": {"name": "user"}, "networkDataSecretRef": {"name": "net"}}},
            ],
        },
    }))
}

fn claims(mode: &str) -> BTreeMap<String, PersistentVolumeClaim> {
    let claim = json!({
        "metadata": {"name": "cp-0-data"},
        "spec": {"volumeMode": mode, "resources": {"requests": {"storage": "8Gi"}}},
    });
    BTreeMap::from([("cp-0-data".to_owned(), read(claim))])
}

fn machine(instance: &VirtualMachineInstance) -> Machine {
    validate(instance, &claims("Filesystem")).unwrap()
}

fn built(instance: &VirtualMachineInstance, accelerator: Accelerator) -> Value {
    serde_json::to_value(build::launcher_pod(&machine(instance), accelerator, "launcher@sha256:2").unwrap()).unwrap()
}

fn mount_of(pod: &Value, path: &str) -> (Value, Value) {
    let mounts = pod["spec"]["containers"][0]["volumeMounts"].as_array().unwrap();
    let mount = mounts
        .iter()
        .find(|mount| mount["mountPath"] == path)
        .unwrap_or_else(|| panic!("{path}: {mounts:?}"));
    let volumes = pod["spec"]["volumes"].as_array().unwrap();
    (
        volumes
            .iter()
            .find(|volume| volume["name"] == mount["name"])
            .unwrap()
            .clone(),
        mount.clone(),
    )
}

#[test]
fn build_pod_passes_pod_security_restricted() {
    let pod = built(&instance(), Accelerator::Tcg);
    let spec = &pod["spec"];
    for gone in [
        "serviceAccountName",
        "hostNetwork",
        "hostPID",
        "hostIPC",
        "initContainers",
    ] {
        assert_eq!(spec[gone], Value::Null, "{gone}");
    }
    assert_eq!(spec["automountServiceAccountToken"], false);
    assert_eq!(spec["enableServiceLinks"], false);
    assert_eq!(spec["restartPolicy"], "Never");
    let expected = json!({
        "runAsUser": 107, "runAsGroup": 107, "fsGroup": 107, "runAsNonRoot": true,
        "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
    });
    assert_eq!(spec["securityContext"], expected);
    let expected = json!({
        "allowPrivilegeEscalation": false, "privileged": false, "readOnlyRootFilesystem": true, "runAsNonRoot": true,
        "runAsUser": 107, "runAsGroup": 107, "capabilities": {"drop": ["ALL"]},
    });
    assert_eq!(spec["containers"][0]["securityContext"], expected);
    assert!(!spec["volumes"].to_string().contains("hostPath"));
}

#[test]
fn build_pod_carries_identity_place_and_grace() {
    let pod = built(&instance(), Accelerator::Tcg);
    let metadata = &pod["metadata"];
    assert!(
        metadata["name"]
            .as_str()
            .unwrap()
            .starts_with("virt-launcher-customera-cp-0-")
    );
    let expected = json!({
        "kubernest.io/cluster": "customera", "kubevirt.io": "virt-launcher", "kubevirt.io/created-by": "u-1",
        "vm.kubevirt.io/name": "customera-cp-0", "app.kubernetes.io/managed-by": "kubernest",
    });
    assert_eq!(metadata["labels"], expected);
    assert_eq!(metadata["annotations"]["kubevirt.io/domain"], "customera-cp-0");
    let owner = &metadata["ownerReferences"][0];
    assert_eq!(
        (&owner["uid"], &owner["controller"], &owner["blockOwnerDeletion"]),
        (&json!("u-1"), &json!(true), &json!(true))
    );
    let spec = &pod["spec"];
    assert_eq!(spec["terminationGracePeriodSeconds"], 75);
    assert_eq!(
        spec["nodeSelector"],
        json!({"zone": "a", "kubevirt.io/schedulable": "true"})
    );
    assert_eq!(spec["priorityClassName"], "machines");
    assert_eq!(spec["hostname"], "cp-0");
    assert_eq!(spec["imagePullSecrets"], json!([{"name": "registry"}]));
    let probe = &spec["containers"][0]["readinessProbe"];
    assert_eq!(probe["httpGet"], json!({"path": "/readyz", "port": 49080}));
    assert_eq!(probe["periodSeconds"], 2);
}

#[test]
fn build_pod_mounts_where_the_launcher_looks() {
    let pod = built(&instance(), Accelerator::Tcg);
    let (run, _) = mount_of(&pod, "/run/kubernest");
    assert_eq!(run["emptyDir"], json!({}));
    let (os, mount) = mount_of(&pod, "/run/container-disks/os");
    assert_eq!(
        (&os["image"]["reference"], &mount["readOnly"]),
        (&json!("img@sha256:1"), &json!(true))
    );
    assert_eq!(
        mount_of(&pod, "/run/kernel-boot").0["image"]["reference"],
        "img@sha256:1"
    );
    let (data, mount) = mount_of(&pod, "/run/pvcs/data");
    assert_eq!(
        (&data["persistentVolumeClaim"]["claimName"], &mount["readOnly"]),
        (&json!("cp-0-data"), &Value::Null)
    );
    let (bootstrap, mount) = mount_of(&pod, "/run/volumes/bootstrap");
    assert_eq!(
        (&bootstrap["secret"]["secretName"], &mount["readOnly"]),
        (&json!("cp-0-bootstrap"), &json!(true))
    );
    assert_eq!(
        mount_of(&pod, "/run/cloud-init/seed/user").0["secret"]["secretName"],
        "user"
    );
    assert_eq!(
        mount_of(&pod, "/run/cloud-init/seed/network").0["secret"]["secretName"],
        "net"
    );

    let block = validate(&instance(), &claims("Block")).unwrap();
    assert_eq!(block.claims["data"].mode, VolumeMode::Block);
    let pod = serde_json::to_value(build::launcher_pod(&block, Accelerator::Kvm, "x").unwrap()).unwrap();
    let devices = &pod["spec"]["containers"][0]["volumeDevices"];
    assert_eq!(*devices, json!([{"name": "data", "devicePath": "/dev/data"}]));
}

#[test]
fn build_pod_tells_the_launcher_and_multus_the_same() {
    let pod = built(&instance(), Accelerator::Tcg);
    let networks: Value =
        serde_json::from_str(pod["metadata"]["annotations"][networks::ANNOTATION].as_str().unwrap()).unwrap();
    let expected = json!([
        {"name": "kubernest-masquerade", "namespace": "kubernest-system", "interface": "tap0",
         "cni-args": {"ports": [{"port": 6443, "protocol": "TCP"}]}},
        {"name": "customera", "namespace": "org-acme", "interface": "tap1", "mac": "02:00:10:01:00:0a"},
    ]);
    assert_eq!(networks, expected);
    let env = pod["spec"]["containers"][0]["env"].as_array().unwrap();
    assert_eq!((env.len(), &env[0]["name"]), (1, &json!(LAUNCH_ENV)));
    let launch: Launch = serde_json::from_str(env[0]["value"].as_str().unwrap()).unwrap();
    assert_eq!(launch.accelerator, Accelerator::Tcg);
    assert_eq!(launch.vmi.metadata.uid.as_deref(), Some("u-1"));
    assert_eq!(launch.vmi.annotations()["kept"], "yes");
    assert_eq!(launch.volumes["data"].capacity, 8 << 30);
    let taps: Vec<_> = launch
        .interfaces
        .iter()
        .map(|tap| (tap.name.as_str(), tap.tap.as_str(), tap.mac.as_str()))
        .collect();
    assert_eq!(taps[1], ("tenant", "tap1", "02:00:10:01:00:0a"));
    assert_eq!(
        launch.overhead_bytes,
        resources::overhead_bytes(2 << 30, 1, Accelerator::Tcg)
    );
}

#[test]
fn build_pod_requests_guest_and_overhead() {
    let mib = 1_u64 << 20;
    assert_eq!(
        resources::overhead_bytes(2 << 30, 1, Accelerator::Kvm),
        (25 + 60 + 10 + 8 + 4) * mib
    );
    assert_eq!(
        resources::overhead_bytes(2 << 30, 1, Accelerator::Tcg),
        (25 + 60 + 10 + 8 + 4 + 64) * mib
    );
    let list = built(&instance(), Accelerator::Kvm)["spec"]["containers"][0]["resources"].clone();
    let memory = (2048 + 107) * mib;
    assert_eq!(list["requests"]["memory"], memory.to_string());
    assert_eq!(list["requests"]["cpu"], "200m");
    assert_eq!(list["requests"]["devices.kubevirt.io/tun"], "1");
    assert_eq!(
        list["limits"],
        json!({"devices.kubevirt.io/tun": "1", "devices.kubevirt.io/kvm": "1"})
    );

    let mut asked = instance();
    asked.spec.domain.resources = read(json!({"requests": {"memory": "1Gi", "cpu": 1}, "limits": {"memory": "2Gi"}}));
    let list = built(&asked, Accelerator::Tcg)["spec"]["containers"][0]["resources"].clone();
    assert_eq!(list["requests"]["memory"], ((1024 + 171) * mib).to_string());
    assert_eq!(list["requests"]["cpu"], "1");
    assert_eq!(list["limits"]["memory"], ((2048 + 171) * mib).to_string());
    assert_eq!(list["limits"].get("devices.kubevirt.io/kvm"), None);
}

#[rstest]
#[case::no_nodes(Emulation::Auto, json!([]), Accelerator::Tcg)]
#[case::offered(Emulation::Auto, json!([{"zone": "a", "kvm": "110"}]), Accelerator::Kvm)]
#[case::none_left(Emulation::Auto, json!([{"zone": "a", "kvm": "0"}]), Accelerator::Tcg)]
#[case::elsewhere(Emulation::Auto, json!([{"zone": "a"}, {"zone": "b", "kvm": "110"}]), Accelerator::Tcg)]
#[case::cordoned(Emulation::Auto, json!([{"zone": "a", "kvm": "110", "cordoned": true}]), Accelerator::Tcg)]
#[case::always(Emulation::Always, json!([{"zone": "a", "kvm": "110"}]), Accelerator::Tcg)]
#[case::never(Emulation::Never, json!([]), Accelerator::Kvm)]
fn build_accelerator_is_what_a_node_offers(
    #[case] emulation: Emulation,
    #[case] nodes: Value,
    #[case] expected: Accelerator,
) {
    let nodes = nodes.as_array().unwrap().iter().map(|node| {
        let node = json!({
            "metadata": {"name": "n", "labels": {"kubevirt.io/schedulable": "true", "zone": node["zone"]}},
            "spec": {"unschedulable": node["cordoned"]},
            "status": {"allocatable": {"devices.kubevirt.io/kvm": node["kvm"].as_str().unwrap_or("0")}},
        });
        Arc::new(read::<Node>(node))
    });
    assert_eq!(
        resources::accelerator(emulation, &instance(), &nodes.collect::<Vec<_>>()),
        expected
    );
}

#[test]
fn validate_fills_in_kubevirts_defaults() {
    let bare: VirtualMachineInstance = read(json!({
        "metadata": {"name": "bare", "namespace": "n", "uid": "u-2"},
        "spec": {"domain": {"resources": {"requests": {"memory": "64M"}}, "devices": {}}},
    }));
    let machine = validate(&bare, &BTreeMap::new()).unwrap();
    assert_eq!((machine.guest_bytes, machine.cpus), (64_000_000, 1));
    let spec = machine.instance.spec;
    assert_eq!(spec.domain.memory.unwrap().guest.unwrap().0, "64M");
    assert_eq!(spec.networks.unwrap()[0].name, "default");
    assert_eq!(machine.nics.len(), 1);
    assert!(machine.nics[0].mac.starts_with("02:"));

    let mut alone = bare;
    alone.spec.domain.devices.autoattach_pod_interface = Some(false);
    assert_eq!(validate(&alone, &BTreeMap::new()).unwrap().nics, []);
}

#[rstest]
#[case::memory(json!({"/spec/domain/memory": null}), "spec.domain.memory.guest: no memory is given")]
#[case::negative(json!({"/spec/domain/memory/guest": "-1Gi"}), "spec.domain.memory.guest: must be more than 0")]
#[case::volume(json!({"/spec/volumes/0/name": "other"}), "spec.domain.devices.disks: there is no volume named 'os'")]
#[case::twice(json!({"/spec/volumes/1/name": "os"}), "spec.volumes[1].name: 'os' is there twice")]
#[case::source(json!({"/spec/volumes/0/emptyDisk": {"capacity": "1Gi"}}), "spec.volumes[0]: must have exactly one source")]
#[case::network(json!({"/spec/networks/1/name": "x"}), "spec.domain.devices.interfaces[1]: there is no network named")]
#[case::binding(json!({"/spec/domain/devices/interfaces/0/bridge": {}}), "spec.domain.devices.interfaces[0]: must be")]
fn validate_names_the_field(#[case] change: Value, #[case] expected: &str) {
    let mut value = serde_json::to_value(instance()).unwrap();
    for (path, wanted) in change.as_object().unwrap() {
        let (parent, key) = path.rsplit_once('/').unwrap();
        value.pointer_mut(parent).unwrap()[key] = wanted.clone();
    }
    let error = validate(&read(value), &claims("Filesystem")).unwrap_err();
    assert!(error.to_string().starts_with(expected), "{error}");
    assert_eq!(error.reason(), reasons::INVALID);
}

#[test]
fn validate_waits_for_the_claim() {
    let error = validate(&instance(), &BTreeMap::new()).unwrap_err();
    assert_eq!(error, Obstacle::ClaimMissing("cp-0-data".to_owned()));
}

fn now() -> Timestamp {
    Timestamp::from_second(1_000).unwrap()
}

fn in_phase(phase: &str) -> VirtualMachineInstance {
    let mut instance = instance();
    if !phase.is_empty() {
        instance.status = Some(read(json!({"phase": phase})));
    }
    instance
}

fn pod(extra: Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": "p", "namespace": "org-acme", "uid": "p-1"},
        "spec": {"containers": [{"name": "compute"}], "nodeName": "n1"},
        "status": {"phase": "Running", "podIP": "10.1.0.5", "podIPs": [{"ip": "10.1.0.5"}], "qosClass": "Burstable"},
    });
    for part in ["metadata", "spec", "status"] {
        for (key, value) in extra[part].as_object().into_iter().flatten() {
            pod[part][key] = value.clone();
        }
    }
    read(pod)
}

fn container(state: Value) -> Value {
    json!([{"name": "compute", "image": "i", "imageID": "i", "ready": false, "restartCount": 0, "state": state}])
}

fn ready(status: &str) -> Value {
    json!([{"type": "Ready", "status": status}])
}

#[rstest]
#[case::new("", None, "Pending", reasons::POD_NOT_EXISTS)]
#[case::made("Pending", Some(json!({"status": {"phase": "Pending"}})), "Scheduling", reasons::POD_CONDITION_MISSING)]
#[case::pulls("Scheduling", Some(json!({"status": {"conditions": ready("False"),
    "containerStatuses": container(json!({"waiting": {"reason": "ContainerCreating"}}))}})), "Scheduling", reasons::GUEST_NOT_RUNNING)]
#[case::boots("Scheduling", Some(json!({"status": {"conditions": ready("False"),
    "containerStatuses": container(json!({"running": {}}))}})), "Scheduled", reasons::GUEST_NOT_RUNNING)]
#[case::runs("Scheduled", Some(json!({"status": {"conditions": ready("True")}})), "Running", "")]
#[case::stays("Running", Some(json!({"status": {"conditions": ready("False")}})), "Running", reasons::GUEST_NOT_RUNNING)]
#[case::going("Running", Some(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"},
    "status": {"conditions": ready("True")}})), "Running", reasons::POD_TERMINATING)]
#[case::gone("Running", None, "Failed", reasons::POD_DELETED)]
#[case::gone_early("Scheduling", None, "Failed", reasons::POD_DELETED)]
#[case::stopped_from_outside("Running", Some(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"},
    "status": {"phase": "Succeeded"}})), "Failed", reasons::POD_DELETED)]
#[case::evicted("Running", Some(json!({"status": {"phase": "Failed", "reason": "Evicted", "message": "low memory"}})),
    "Failed", reasons::POD_EVICTED)]
#[case::preempted("Running", Some(json!({"status": {"phase": "Failed", "conditions": [
    {"type": "DisruptionTarget", "status": "True", "message": "preempted"}]}})), "Failed", reasons::POD_EVICTED)]
#[case::shutdown("Running", Some(json!({"status": {"phase": "Succeeded", "containerStatuses": container(json!(
    {"terminated": {"exitCode": 0, "message": "{\"reason\":\"GuestShutdown\",\"message\":\"powered off\"}"}}))}})),
    "Succeeded", "GuestShutdown")]
#[case::crashed("Running", Some(json!({"status": {"phase": "Failed", "containerStatuses": container(json!(
    {"terminated": {"exitCode": 1, "message": "{\"reason\":\"GuestCrashed\",\"message\":\"died\",\"serial\":[\"panic\"]}"}}))}})),
    "Failed", "GuestCrashed")]
#[case::killed("Running", Some(json!({"status": {"phase": "Failed", "containerStatuses": container(json!(
    {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}))}})), "Failed", "OOMKilled")]
#[case::refused_by_the_node("Scheduling", Some(json!({"status": {"phase": "Failed", "reason": "UnexpectedAdmissionError"}})),
    "Failed", "UnexpectedAdmissionError")]
fn status_phase_and_ready(
    #[case] before: &str,
    #[case] shape: Option<Value>,
    #[case] phase: &str,
    #[case] reason: &str,
) {
    let pod = shape.map(pod);
    let seen = Seen {
        pod: pod.as_ref(),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let instance = in_phase(before);
    let first = status(&instance, seen, now());
    assert_eq!(first.phase.as_deref(), Some(phase));
    let condition = conditions::get(&first.conditions, "Ready").unwrap();
    assert_eq!(condition.reason.as_deref().unwrap_or_default(), reason);
    assert_eq!(condition.status == "True", phase == "Running" && reason.is_empty());
    if phase == "Failed" {
        assert_eq!(first.reason.as_deref(), Some(reason));
    }
    assert_eq!(first.phase_transition_timestamps.len(), usize::from(phase != before));
    // At rest nothing changes, whatever the clock says.
    let again = VirtualMachineInstance {
        status: Some(first.clone()),
        ..instance
    };
    assert_eq!(status(&again, seen, Timestamp::from_second(9_000).unwrap()), first);
}

#[test]
fn status_keeps_the_guests_last_words() {
    let words = "{\"reason\":\"GuestCrashed\",\"message\":\"died\",\"serial\":[\"a\",\"panic\"]}";
    let pod = pod(json!({"status": {"phase": "Failed", "containerStatuses":
        container(json!({"terminated": {"exitCode": 1, "message": words}}))}}));
    let seen = Seen {
        pod: Some(&pod),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let status = status(&in_phase("Running"), seen, now());
    let ready = conditions::get(&status.conditions, "Ready").unwrap();
    assert_eq!(ready.message.as_deref(), Some("died; the guest said last: panic"));
    assert_eq!(status.console_tail.unwrap().lines, ["a", "panic"]);
}

#[test]
fn status_of_a_running_instance_is_complete() {
    let network_status = json!([
        {"name": "cbr0", "interface": "eth0", "ips": ["10.1.0.5"], "mac": "aa:aa:aa:aa:aa:aa"},
        {"name": "org-acme/customera", "interface": "tap1", "mac": "02:00:10:01:00:0b"},
    ]);
    let pod = pod(json!({
        "metadata": {"annotations": {"k8s.v1.cni.cncf.io/network-status": network_status.to_string()}},
        "status": {"conditions": ready("True")},
    }));
    let seen = Seen {
        pod: Some(&pod),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let status = status(&in_phase("Scheduled"), seen, now());
    assert_eq!(status.node_name.as_deref(), Some("n1"));
    assert_eq!(status.qos_class.as_deref(), Some("Burstable"));
    assert_eq!(
        status.active_pods,
        BTreeMap::from([("p-1".to_owned(), "n1".to_owned())])
    );
    assert_eq!(status.interfaces[0].ip_address.as_deref(), Some("10.1.0.5"));
    assert_eq!(status.interfaces[1].mac.as_deref(), Some("02:00:10:01:00:0b"));
    assert_eq!(status.interfaces[1].ip_address, None);
    let targets: Vec<_> = status
        .volume_status
        .iter()
        .map(|volume| volume.target.as_str())
        .collect();
    assert_eq!(targets, ["vda", "vdb", "", "sda"]);
    for (kind, expected) in [
        ("Synchronized", "True"),
        ("LiveMigratable", "False"),
        ("SoftwareEmulation", "True"),
    ] {
        assert_eq!(
            conditions::get(&status.conditions, kind).unwrap().status,
            expected,
            "{kind}"
        );
    }
}

#[test]
fn status_tells_what_hinders_the_pod() {
    let unschedulable = pod(
        json!({"spec": {"nodeName": null}, "status": {"phase": "Pending", "conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes are available"}]}}),
    );
    let seen = Seen {
        pod: Some(&unschedulable),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let first = status(&in_phase("Scheduling"), seen, now());
    let condition = conditions::is_false(&first.conditions, POD_SCHEDULED).unwrap();
    assert_eq!(condition.message.as_deref(), Some("0/2 nodes are available"));

    let pulls = pod(json!({"status": {"phase": "Pending", "containerStatuses":
        container(json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}))}}));
    let next = VirtualMachineInstance {
        status: Some(first),
        ..instance()
    };
    let seen = Seen {
        pod: Some(&pulls),
        ..seen
    };
    let second = status(&next, seen, now());
    assert_eq!(conditions::get(&second.conditions, POD_SCHEDULED), None);
    let condition = conditions::is_false(&second.conditions, "Synchronized").unwrap();
    assert_eq!(condition.reason.as_deref(), Some("ImagePullBackOff"));

    let obstacle = Obstacle::ClaimMissing("data".to_owned());
    let seen = Seen {
        pod: None,
        obstacle: Some(&obstacle),
        ..seen
    };
    let pending = status(&in_phase(""), seen, now());
    assert_eq!(pending.phase.as_deref(), Some(phase::PENDING));
    let condition = conditions::is_false(&pending.conditions, "Synchronized").unwrap();
    assert_eq!(condition.reason.as_deref(), Some(reasons::PVC_NOT_FOUND));
}

#[rstest]
#[case::runs(json!({"containerStatuses": container(json!({"running": {}}))}), NodeState::Up, false)]
#[case::node_silent(json!({"containerStatuses": container(json!({"running": {}}))}), NodeState::Unreachable, false)]
#[case::node_off(json!({"containerStatuses": container(json!({"running": {}}))}), NodeState::Dead, true)]
#[case::declared_failed_only(json!({"phase": "Failed", "containerStatuses": container(json!({"running": {}}))}), NodeState::Up, false)]
#[case::ended(json!({"phase": "Failed", "containerStatuses": container(json!({"terminated": {"exitCode": 0}}))}), NodeState::Up, true)]
#[case::never_admitted(json!({"phase": "Failed"}), NodeState::Up, true)]
fn status_process_is_surely_gone(#[case] shape: Value, #[case] node: NodeState, #[case] gone: bool) {
    assert_eq!(ending::surely_ended(&pod(json!({"status": shape})), node), gone);
}

#[test]
fn status_a_lost_node_fails_the_run_and_a_silent_one_does_not() {
    let pod = pod(json!({"status": {"conditions": ready("False")}}));
    let seen = Seen {
        pod: Some(&pod),
        node: NodeState::Unreachable,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let silent = status(&in_phase("Running"), seen, now());
    assert_eq!(silent.phase.as_deref(), Some("Running"));
    assert_eq!(
        conditions::get(&silent.conditions, "Ready").unwrap().reason.as_deref(),
        Some(reasons::NODE_UNREACHABLE)
    );
    let dead = status(
        &in_phase("Running"),
        Seen {
            node: NodeState::Dead,
            ..seen
        },
        now(),
    );
    assert_eq!(
        (dead.phase.as_deref(), dead.reason.as_deref()),
        (Some("Failed"), Some(reasons::NODE_LOST))
    );
}
