//! Tables of the instance's pure decisions: what is valid, what pod is built, what status follows from what pod.

mod pod;
mod status;
mod validate;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use serde_json::{Value, json};

use super::validate::{Machine, validate as validated};

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
    validated(instance, &claims("Filesystem")).unwrap()
}
