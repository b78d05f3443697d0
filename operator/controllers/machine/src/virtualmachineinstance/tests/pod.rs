//! The launcher pod of a machine: rights, identity, mounts, networks, resources.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use kubernest_domain::{Accelerator, LAUNCH_ENV, Launch, VolumeMode};
use kubernest_pki::Credential;
use rstest::rstest;
use serde_json::{Value, json};

use super::super::validate::validate;
use super::super::{build, credentials, networks, resources};
use super::{claims, instance, machine, read};
use crate::Emulation;
use crate::trust::Issued;

fn built(instance: &VirtualMachineInstance, accelerator: Accelerator) -> Value {
    let pod = build::launcher_pod(&machine(instance), accelerator, "launcher@sha256:2", "pair").unwrap();
    serde_json::to_value(pod).unwrap()
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
        "vm.kubevirt.io/name": "customera-cp-0", "vmi.kubevirt.io/id": "customera-cp-0",
        "app.kubernetes.io/managed-by": "kubernest",
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
    let gates = json!([{"conditionType": "kubevirt.io/virtual-machine-unpaused"}]);
    assert_eq!(spec["readinessGates"], gates);
    let probe = &spec["containers"][0]["readinessProbe"];
    assert_eq!(probe["httpGet"], json!({"path": "/readyz", "port": 49080}));
    assert_eq!(probe["periodSeconds"], 2);
}

#[test]
fn build_pod_mounts_where_the_launcher_looks() {
    let pod = built(&instance(), Accelerator::Tcg);
    let (run, _) = mount_of(&pod, "/run/kubernest");
    assert_eq!(run["emptyDir"], json!({}));
    let (control, mount) = mount_of(&pod, "/run/control");
    assert_eq!(control["secret"], json!({"secretName": "pair", "defaultMode": 0o440}));
    assert_eq!(
        (&control["name"], &mount["readOnly"]),
        (&json!("kubernest-control"), &json!(true))
    );
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
    let pod = serde_json::to_value(build::launcher_pod(&block, Accelerator::Kvm, "x", "pair").unwrap()).unwrap();
    let devices = &pod["spec"]["containers"][0]["volumeDevices"];
    assert_eq!(*devices, json!([{"name": "data", "devicePath": "/dev/data"}]));
}

#[test]
fn build_pod_has_a_service_accounts_token_only_where_the_guest_is_to_have_it() {
    let plain = built(&instance(), Accelerator::Tcg);
    assert_eq!(plain["spec"]["serviceAccountName"], Value::Null);
    assert!(!plain.to_string().contains("serviceAccountToken\""), "{plain}");
    let mut asked = instance();
    let account = json!({"name": "robot", "serviceAccount": {"serviceAccountName": "robot-account"}});
    asked.spec.volumes.as_mut().unwrap().push(read(account));
    let pod = built(&asked, Accelerator::Tcg);
    assert_eq!(pod["spec"]["serviceAccountName"], "robot-account");
    assert_eq!(pod["spec"]["automountServiceAccountToken"], false, "nowhere else");
    let (volume, mount) = mount_of(&pod, "/run/volumes/robot");
    assert_eq!(mount["readOnly"], true);
    let sources = json!([
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
    ]);
    assert_eq!(volume["projected"], json!({"defaultMode": 0o440, "sources": sources}));
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
}

#[test]
fn build_pod_asks_for_the_guests_network_where_one_is_chosen() {
    let asked = |cidr: &str| {
        let mut chosen = instance();
        chosen.spec.networks.as_mut().unwrap()[0].pod = Some(read(json!({"vmNetworkCIDR": cidr})));
        chosen.spec.domain.devices.interfaces.as_mut().unwrap()[0].ports = None;
        let pod = built(&chosen, Accelerator::Tcg);
        let networks = pod["metadata"]["annotations"][networks::ANNOTATION].as_str().unwrap();
        serde_json::from_str::<Value>(networks).unwrap()[0]["cni-args"].clone()
    };
    assert_eq!(asked("10.10.10.7/24"), json!({"network": "10.10.10.0/24"}));
    assert_eq!(asked("10.0.2.0/24"), Value::Null);
}

#[test]
fn build_pod_requests_guest_and_overhead() {
    let mib = 1_u64 << 20;
    assert_eq!(
        resources::overhead_bytes(2 << 30, 1, Accelerator::Kvm),
        (20 + 60 + 20 + 8 + 4) * mib
    );
    assert_eq!(
        resources::overhead_bytes(2 << 30, 1, Accelerator::Tcg),
        (20 + 60 + 20 + 8 + 4 + 512 + 103) * mib
    );
    let list = built(&instance(), Accelerator::Kvm)["spec"]["containers"][0]["resources"].clone();
    let memory = (2048 + 112) * mib;
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
    assert_eq!(list["requests"]["memory"], ((1024 + 727) * mib).to_string());
    assert_eq!(list["requests"]["cpu"], "1");
    assert_eq!(list["limits"]["memory"], ((2048 + 727) * mib).to_string());
    assert_eq!(list["limits"].get("devices.kubevirt.io/kvm"), None);
}

#[test]
fn build_pod_with_dedicated_processors_is_guaranteed_them() {
    let mib = 1_u64 << 20;
    let mut pinned = instance();
    let cpu = json!({"cores": 2, "dedicatedCpuPlacement": true, "isolateEmulatorThread": true});
    pinned.spec.domain.cpu = read(cpu);
    let pod = built(&pinned, Accelerator::Kvm);
    let expected = json!({"zone": "a", "kubevirt.io/schedulable": "true", "kubevirt.io/cpumanager": "true"});
    assert_eq!(pod["spec"]["nodeSelector"], expected);
    let list = &pod["spec"]["containers"][0]["resources"];
    let asked = json!({
        "cpu": "3", "memory": ((2048 + 112 + 100) * mib).to_string(),
        "devices.kubevirt.io/tun": "1", "devices.kubevirt.io/kvm": "1",
    });
    assert_eq!((&list["requests"], &list["limits"]), (&asked, &asked));
    // Its own limit counts, unless the guest would not fit.
    for (memory, counts) in [("4Gi", 4096), ("1Gi", 2048)] {
        pinned.spec.domain.resources = read(json!({"limits": {"memory": memory}}));
        let list = &built(&pinned, Accelerator::Kvm)["spec"]["containers"][0]["resources"];
        let bytes = json!(((counts + 112 + 100) * mib).to_string());
        assert_eq!(
            (&list["requests"]["memory"], &list["limits"]["memory"]),
            (&bytes, &bytes)
        );
    }
}

#[rstest]
#[case::guaranteed(true, "Guaranteed", false)]
#[case::changed_by_somebody(true, "Burstable", true)]
#[case::wants_none(false, "Burstable", false)]
fn build_pod_that_got_no_claim_to_processors_is_known(
    #[case] dedicated: bool,
    #[case] class: &str,
    #[case] expected: bool,
) {
    let mut instance = instance();
    instance.spec.domain.cpu = read(json!({"dedicatedCpuPlacement": dedicated}));
    let pod = read(json!({"status": {"qosClass": class}}));
    assert_eq!(resources::shares_processors(&instance.spec, &pod), expected);
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
            "metadata": {"name": "n", "labels": {
                "kubevirt.io/schedulable": "true", "zone": node["zone"], "kubevirt.io/cpumanager": "false",
            }},
            "spec": {"unschedulable": node["cordoned"]},
            "status": {"allocatable": {"devices.kubevirt.io/kvm": node["kvm"].as_str().unwrap_or("0")}},
        });
        Arc::new(read::<Node>(node))
    });
    assert_eq!(
        resources::accelerator(emulation, &instance(), &nodes.clone().collect::<Vec<_>>()),
        expected
    );
    let mut pinned = instance();
    pinned.spec.domain.cpu = read(json!({"dedicatedCpuPlacement": true}));
    if emulation == Emulation::Auto {
        let chosen = resources::accelerator(emulation, &pinned, &nodes.collect::<Vec<_>>());
        assert_eq!(chosen, Accelerator::Tcg, "none of them gives processors away");
    }
}

#[test]
fn build_pod_asks_the_launcher_first_and_then_the_guest() {
    let plain = built(&instance(), Accelerator::Tcg)["spec"]["containers"][0].clone();
    assert_eq!(plain["readinessProbe"]["httpGet"]["path"], "/readyz");
    assert_eq!((plain.get("startupProbe"), plain.get("livenessProbe")), (None, None));
    let mut probed = instance();
    probed.spec.readiness_probe = read(json!({"httpGet": {"port": 8080}, "periodSeconds": 5}));
    probed.spec.liveness_probe = read(json!({"tcpSocket": {"port": 22}, "failureThreshold": 6}));
    let container = built(&probed, Accelerator::Tcg)["spec"]["containers"][0].clone();
    assert_eq!(container["startupProbe"]["httpGet"]["path"], "/readyz");
    assert_eq!(
        container["readinessProbe"],
        json!({"httpGet": {"port": 8080}, "periodSeconds": 5})
    );
    assert_eq!(
        container["livenessProbe"],
        json!({"tcpSocket": {"port": 22}, "failureThreshold": 6})
    );
}

#[test]
fn build_pod_asks_the_agent_through_the_launcher() {
    let mut probed = instance();
    probed.spec.readiness_probe = read(json!({"exec": {"command": ["cat", "/run/up"]}, "timeoutSeconds": 5}));
    probed.spec.liveness_probe = read(json!({"guestAgentPing": {}, "periodSeconds": 30}));
    let container = built(&probed, Accelerator::Tcg)["spec"]["containers"][0].clone();
    let launcher = "/usr/local/bin/kubernest-launcher";
    assert_eq!(
        container["readinessProbe"],
        json!({"exec": {"command": [launcher, "probe", "--timeout-seconds", "5", "--", "cat", "/run/up"]},
            "timeoutSeconds": 6})
    );
    assert_eq!(
        container["livenessProbe"],
        json!({"exec": {"command": [launcher, "probe", "--timeout-seconds", "1"]}, "timeoutSeconds": 2,
            "periodSeconds": 30})
    );
    assert_eq!(container["startupProbe"]["httpGet"]["path"], "/readyz");
}

#[test]
fn build_secret_of_the_control_port_belongs_to_the_instance() {
    let issued = Issued {
        credential: Credential {
            chain_pem: "certificate".to_owned(),
            key_pem: "key".to_owned(),
            not_after: jiff::Timestamp::UNIX_EPOCH,
        },
        ca_pem: "ca".to_owned(),
    };
    let name = credentials::name(&instance()).unwrap();
    assert_ne!(
        credentials::name(&instance()).unwrap(),
        name,
        "nobody can make it first"
    );
    let secret = serde_json::to_value(credentials::secret(name, &instance(), &issued)).unwrap();
    let metadata = &secret["metadata"];
    let pod = built(&instance(), Accelerator::Tcg);
    let (prefix, attempt) = metadata["name"].as_str().unwrap().rsplit_once('-').unwrap();
    assert_eq!(prefix.strip_suffix("-control"), pod["metadata"]["name"].as_str());
    assert!(attempt.len() == 8 && attempt.bytes().all(|byte| byte.is_ascii_hexdigit()));
    assert_eq!(metadata["namespace"], "org-acme");
    assert_eq!(metadata["ownerReferences"], pod["metadata"]["ownerReferences"]);
    let expected = json!({"app.kubernetes.io/managed-by": "kubernest", "kubevirt.io/created-by": "u-1"});
    assert_eq!(metadata["labels"], expected);
    assert_eq!(
        (&secret["type"], &secret["immutable"]),
        (&json!("kubernetes.io/tls"), &json!(true))
    );
    let keys: Vec<_> = secret["data"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["ca.crt", "tls.crt", "tls.key"]);
}
