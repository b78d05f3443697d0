//! What an instance must be to be run.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use rstest::rstest;
use serde_json::{Value, json};

use super::super::validate::{Obstacle, validate};
use super::super::{networks, reasons};
use super::{claims, instance, read};

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

    let mut busy = bare.clone();
    busy.spec
        .domain
        .resources
        .limits
        .insert("cpu".to_owned(), "2500m".into());
    assert_eq!(
        validate(&busy, &BTreeMap::new()).unwrap().cpus,
        3,
        "sockets by the limit, rounded up"
    );

    let mut plain = bare.clone();
    plain.spec.volumes = Some(vec![read(json!({"name": "scratch", "emptyDisk": {"capacity": "1Gi"}}))]);
    let disks = validate(&plain, &BTreeMap::new())
        .unwrap()
        .instance
        .spec
        .domain
        .devices
        .disks;
    assert_eq!(disks.unwrap()[0].name, "scratch", "a volume that nobody uses is a disk");

    let mut alone = bare;
    alone.spec.domain.devices.autoattach_pod_interface = Some(false);
    assert_eq!(validate(&alone, &BTreeMap::new()).unwrap().nics, []);
}

#[rstest]
#[case::memory(json!({"/spec/domain/memory": null}), "spec.domain.memory.guest: no memory is given")]
#[case::negative(json!({"/spec/domain/memory/guest": "-1Gi"}), "spec.domain.memory.guest: must be more than 0")]
#[case::paused_and_probed(json!({"/spec/startStrategy": "Paused", "/spec/livenessProbe": {"tcpSocket": {"port": 22}}}),
    "spec.startStrategy: Paused with a livenessProbe is not supported")]
#[case::nothing_to_run(json!({"/spec/readinessProbe": {"exec": {}}}), "spec.readinessProbe.exec.command: must not be empty")]
#[case::volume(json!({"/spec/volumes/0/name": "other"}), "spec.domain.devices.disks: there is no volume named 'os'")]
#[case::twice(json!({"/spec/volumes/1/name": "os"}), "spec.volumes[1].name: 'os' is there twice")]
#[case::source(json!({"/spec/volumes/0/emptyDisk": {"capacity": "1Gi"}}), "spec.volumes[0]: must have exactly one source")]
#[case::accounts(json!({
        "/spec/volumes/2/secret": null, "/spec/volumes/2/serviceAccount": {"serviceAccountName": "a"},
        "/spec/volumes/3/cloudInitNoCloud": null, "/spec/volumes/3/serviceAccount": {"serviceAccountName": "b"}}),
    "spec.volumes: must have max one serviceAccount volume set")]
#[case::account(json!({"/spec/volumes/2/secret": null, "/spec/volumes/2/serviceAccount": {}}),
    "spec.volumes: must name the service account")]
#[case::network(json!({"/spec/networks/1/name": "x"}), "spec.domain.devices.interfaces[1]: there is no network named")]
#[case::guest_network(json!({"/spec/networks/0/pod": {"vmNetworkCIDR": "10.0.2.0/31"}}),
    "spec.networks[0].pod.vmNetworkCIDR: less than 4 addresses on network")]
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

/// A chosen network must be clear of nodes and pods; the default is nobody's choice.
#[rstest]
#[case("192.168.7.0/24", None)]
#[case("10.0.2.0/24", None)]
#[case("10.244.1.0/28", Some("10.244.1.0/28 overlaps 10.244.1.0/24"))]
#[case("10.244.0.0/16", Some("10.244.0.0/16 overlaps 10.244.1.0/24"))]
#[case("192.0.2.0/24", Some("192.0.2.0/24 overlaps 192.0.2.10/32"))]
fn validate_guest_network_clear_of_the_cluster(#[case] cidr: &str, #[case] expected: Option<&str>) {
    let nodes: Vec<Node> = ["10.0.2.0/24", "10.244.1.0/24"]
        .map(|pods| {
            read(json!({
                "spec": {"podCIDRs": [pods, "fd00::/64"]},
                "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.10"}, {"type": "Hostname", "address": "n"}]},
            }))
        })
        .into();
    let mut chosen = instance();
    chosen.spec.networks.as_mut().unwrap()[0].pod = Some(read(json!({"vmNetworkCIDR": cidr})));
    let machine = validate(&chosen, &claims("Filesystem")).unwrap();
    let answer = networks::clear_of_the_cluster(machine, nodes.iter()).map(|_| ());
    let expected = expected.map(|why| {
        format!("spec.networks[0].pod.vmNetworkCIDR: {why}, where nodes or pods of this cluster are: choose another")
    });
    assert_eq!(answer.as_ref().err().map(ToString::to_string), expected);
    assert!(
        answer
            .err()
            .is_none_or(|obstacle| obstacle.reason() == reasons::INVALID)
    );
}

#[test]
fn validate_waits_for_the_claim() {
    let error = validate(&instance(), &BTreeMap::new()).unwrap_err();
    assert_eq!(error, Obstacle::ClaimMissing("cp-0-data".to_owned()));
}
