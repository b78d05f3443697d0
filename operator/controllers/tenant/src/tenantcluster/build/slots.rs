//! The cluster's slots, and each one's VirtualMachine and data disk. A slot's name, address, MAC and disk outlive its
//! machine. What the machine runs is in its bootstrap Secret (`bootstrap.rs`).

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use k8s_openapi::{
    api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec, VolumeResourceRequirements},
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};
use kubernest_bootstrap::{DATA_DISK_SERIAL, SHARE_TAG};
use kubernest_crds::{SlotRole, Taint, kubevirt::v1 as kv, labels};

use super::{
    metadata,
    network::{API_PORT, Network},
};
use crate::options::NodeImage;
use crate::tenantcluster::validate::{FIRST_CONTROL_PLANE_INDEX, FIRST_POOL_INDEX, LAST_INDEX, Shape, Validated};

/// Port of the kubelet. A masquerade interface without ports forwards all; so workers name the one that must answer.
const KUBELET_PORT: i32 = 10250;
/// Seconds that a guest has to stop kubelet and etcd in order.
const GRACE_SECONDS: i64 = 60;
/// Name of the root disk's volume.
const ROOT: &str = "root";

/// A slot: an identity and what stands behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Name of VirtualMachine and Node.
    pub name: String,
    /// What it is for.
    pub role: SlotRole,
    /// Node pool, or `control-plane`.
    pub pool: String,
    /// Address on the tenant network.
    pub ip: Ipv4Addr,
    /// MAC address on the tenant network.
    pub mac: String,
    /// Shape of its machine.
    pub shape: Shape,
    /// Labels of its node.
    pub labels: BTreeMap<String, String>,
    /// Taints of its node.
    pub taints: Vec<Taint>,
}

/// No host index is left for a slot.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "no address is left for {slot} in {node_cidr}: machines that are being removed hold theirs until they are gone"
)]
pub struct NoAddress {
    slot: String,
    node_cidr: String,
}

/// The slots that should exist, control plane first. `taken` are the host indices of slots that exist, whether they
/// should or not.
pub fn plan(valid: &Validated, network: &Network, taken: &BTreeMap<String, u8>) -> Result<Vec<Slot>, NoAddress> {
    let mut used: Vec<u8> = taken.values().copied().collect();
    let mut slots = Vec::new();
    for pool in &valid.pools {
        for ordinal in 0..pool.replicas {
            let name = format!("{}-{}-{ordinal}", valid.name, pool.infix);
            let first = if pool.control_plane {
                FIRST_CONTROL_PLANE_INDEX
            } else {
                FIRST_POOL_INDEX
            };
            let index = match taken.get(&name) {
                Some(index) => *index,
                None => (first..=LAST_INDEX)
                    .find(|index| !used.contains(index))
                    .ok_or_else(|| NoAddress {
                        slot: name.clone(),
                        node_cidr: network.node_cidr.to_string(),
                    })?,
            };
            used.push(index);
            slots.push(Slot {
                name,
                role: if pool.control_plane {
                    SlotRole::ControlPlane
                } else {
                    SlotRole::Worker
                },
                pool: pool.name.clone(),
                ip: network.address(index),
                mac: network.mac(index),
                shape: pool.shape.clone(),
                labels: pool.labels.clone(),
                taints: pool.taints.clone(),
            });
        }
    }
    Ok(slots)
}

impl Slot {
    /// Whether it runs the control plane.
    pub fn is_control_plane(&self) -> bool {
        self.role == SlotRole::ControlPlane
    }
}

/// Labels that lead from any object of a slot to the slot.
pub fn slot_labels(cluster: &str, slot: &Slot) -> BTreeMap<String, String> {
    let mut all = super::cluster_labels(cluster);
    all.insert(labels::SLOT.to_owned(), slot.name.clone());
    all.insert(labels::POOL.to_owned(), slot.pool.clone());
    all.insert(labels::ROLE.to_owned(), slot.role.as_str().to_owned());
    all
}

/// Metadata of an object of a slot. The address is written on each, so that it survives the loss of any of them.
pub fn slot_metadata(valid: &Validated, slot: &Slot, name: String) -> ObjectMeta {
    ObjectMeta {
        labels: Some(slot_labels(&valid.name, slot)),
        annotations: Some(BTreeMap::from([(labels::NODE_IP.to_owned(), slot.ip.to_string())])),
        ..metadata(valid, name)
    }
}

/// Name of a slot's data claim.
pub fn claim_name(slot: &str) -> String {
    format!("{slot}-data")
}

/// Name of a slot's bootstrap Secret.
pub fn secret_name(slot: &str) -> String {
    format!("{slot}-bootstrap")
}

/// The claim for a slot's data disk. Size and class are those of its making: claims can't shrink or move.
pub fn claim(valid: &Validated, slot: &Slot) -> PersistentVolumeClaim {
    let storage = &slot.shape.storage;
    PersistentVolumeClaim {
        metadata: slot_metadata(valid, slot, claim_name(&slot.name)),
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            storage_class_name: storage.storage_class_name.clone(),
            resources: Some(VolumeResourceRequirements {
                requests: Some(BTreeMap::from([(
                    "storage".to_owned(),
                    Quantity(storage.size.0.clone()),
                )])),
                ..VolumeResourceRequirements::default()
            }),
            ..PersistentVolumeClaimSpec::default()
        }),
        ..PersistentVolumeClaim::default()
    }
}

/// The machine of a slot. `console_request` asks the machine half for the guest's last console lines.
pub fn machine(valid: &Validated, slot: &Slot, console_request: Option<&str>) -> kv::VirtualMachine {
    let mut metadata = slot_metadata(valid, slot, slot.name.clone());
    if let Some(request) = console_request {
        let annotations = metadata.annotations.get_or_insert_default();
        annotations.insert(labels::CONSOLE_TAIL_REQUEST.to_owned(), request.to_owned());
    }
    kv::VirtualMachine {
        metadata,
        spec: kv::VirtualMachineSpec {
            run_strategy: Some(kubernest_crds::kubevirt::v1::run_strategy::ALWAYS.to_owned()),
            running: None,
            template: kv::VirtualMachineInstanceTemplate {
                metadata: Some(kv::TemplateMetadata {
                    labels: slot_labels(&valid.name, slot),
                    annotations: template_annotations(&valid.image),
                    ..kv::TemplateMetadata::default()
                }),
                spec: instance(valid, slot),
            },
        },
        status: None,
    }
}

/// The image that [`machine`] made a machine from.
pub fn image_of(machine: &kv::VirtualMachine) -> Option<NodeImage> {
    let template = &machine.spec.template;
    let boot = template.spec.domain.firmware.as_ref()?.kernel_boot.as_ref()?;
    let annotations = template.metadata.as_ref().map(|metadata| &metadata.annotations);
    let emulation = annotations.and_then(|annotations| annotations.get(labels::EMULATION_KERNEL_ARGS));
    Some(NodeImage {
        image: boot.container.as_ref()?.image.clone(),
        kernel_args: boot.kernel_args.clone().unwrap_or_default(),
        emulation_kernel_args: emulation.cloned().unwrap_or_default(),
    })
}

/// Nobody but us decides upon a node's machine, so presets of the namespace are none of its business.
fn template_annotations(image: &NodeImage) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::from([(kv::PRESET_EXCLUDE.to_owned(), "true".to_owned())]);
    if !image.emulation_kernel_args.is_empty() {
        annotations.insert(
            labels::EMULATION_KERNEL_ARGS.to_owned(),
            image.emulation_kernel_args.clone(),
        );
    }
    annotations
}

fn instance(valid: &Validated, slot: &Slot) -> kv::VirtualMachineInstanceSpec {
    let image = valid.image.image.clone();
    let kernel_boot = kv::KernelBoot {
        kernel_args: Some(valid.image.kernel_args.clone()).filter(|args| !args.is_empty()),
        container: Some(kv::KernelBootContainer {
            image: image.clone(),
            kernel_path: Some("/boot/vmlinuz".to_owned()),
            initrd_path: Some("/boot/initrd.img".to_owned()),
            image_pull_policy: Some("IfNotPresent".to_owned()),
            image_pull_secret: None,
        }),
    };
    kv::VirtualMachineInstanceSpec {
        domain: kv::DomainSpec {
            cpu: Some(kv::Cpu {
                cores: Some(slot.shape.cpu),
                ..kv::Cpu::default()
            }),
            memory: Some(kv::Memory {
                guest: Some(slot.shape.memory.clone()),
                ..kv::Memory::default()
            }),
            firmware: Some(kv::Firmware {
                kernel_boot: Some(kernel_boot),
                ..kv::Firmware::default()
            }),
            devices: devices(slot),
            ..kv::DomainSpec::default()
        },
        volumes: Some(vec![
            kv::Volume {
                name: ROOT.to_owned(),
                container_disk: Some(kv::ContainerDiskSource {
                    image,
                    image_pull_policy: Some("IfNotPresent".to_owned()),
                    ..kv::ContainerDiskSource::default()
                }),
                ..kv::Volume::default()
            },
            kv::Volume {
                name: DATA_DISK_SERIAL.to_owned(),
                persistent_volume_claim: Some(kv::PersistentVolumeClaimSource {
                    claim_name: claim_name(&slot.name),
                    read_only: None,
                }),
                ..kv::Volume::default()
            },
            kv::Volume {
                name: SHARE_TAG.to_owned(),
                secret: Some(kv::SecretVolumeSource {
                    secret_name: Some(secret_name(&slot.name)),
                    ..kv::SecretVolumeSource::default()
                }),
                ..kv::Volume::default()
            },
        ]),
        networks: Some(vec![
            kv::Network {
                name: "default".to_owned(),
                pod: Some(kv::PodNetwork::default()),
                multus: None,
            },
            kv::Network {
                name: "tenant".to_owned(),
                pod: None,
                multus: Some(kv::MultusNetwork {
                    network_name: valid.name.clone(),
                }),
            },
        ]),
        termination_grace_period_seconds: Some(GRACE_SECONDS),
        ..kv::VirtualMachineInstanceSpec::default()
    }
}

fn devices(slot: &Slot) -> kv::Devices {
    let virtio = || {
        Some(kv::DiskTarget {
            bus: Some("virtio".to_owned()),
            read_only: None,
        })
    };
    let port = if slot.is_control_plane() {
        kv::Port {
            name: Some("api".to_owned()),
            port: i32::from(API_PORT),
            protocol: Some("TCP".to_owned()),
        }
    } else {
        kv::Port {
            name: Some("kubelet".to_owned()),
            port: KUBELET_PORT,
            protocol: Some("TCP".to_owned()),
        }
    };
    kv::Devices {
        disks: Some(vec![
            kv::Disk {
                name: ROOT.to_owned(),
                disk: virtio(),
                ..kv::Disk::default()
            },
            kv::Disk {
                name: DATA_DISK_SERIAL.to_owned(),
                disk: virtio(),
                serial: Some(DATA_DISK_SERIAL.to_owned()),
                ..kv::Disk::default()
            },
        ]),
        filesystems: Some(vec![kv::Filesystem {
            name: SHARE_TAG.to_owned(),
            virtiofs: Some(kv::Virtiofs::default()),
        }]),
        interfaces: Some(vec![
            kv::Interface {
                name: "default".to_owned(),
                masquerade: Some(kv::Masquerade::default()),
                ports: Some(vec![port]),
                ..kv::Interface::default()
            },
            kv::Interface {
                name: "tenant".to_owned(),
                bridge: Some(kv::Bridge::default()),
                mac_address: Some(slot.mac.clone()),
                ..kv::Interface::default()
            },
        ]),
        rng: Some(kv::Rng::default()),
        autoattach_graphics_device: Some(false),
        ..kv::Devices::default()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;
    use crate::tenantcluster::validate::{
        tests::{cluster, options},
        validate,
    };

    pub(crate) fn network() -> Network {
        Network {
            vni: 4097,
            node_cidr: "100.64.0.0/24".parse().unwrap(),
        }
    }

    fn valid(replicas: u32) -> Validated {
        let spec = json!({"version": "v1.35.4", "nodePools": [{"name": "a", "replicas": replicas}, {"name": "b"}]});
        validate(&cluster(spec), &options()).unwrap()
    }

    #[test]
    fn plan_slots_gives_fixed_indices() {
        let slots = plan(&valid(2), &network(), &BTreeMap::new()).unwrap();
        let table: Vec<_> = slots
            .iter()
            .map(|slot| (slot.name.as_str(), slot.ip.to_string()))
            .collect();
        assert_eq!(
            table,
            [
                ("customera-cp-0", "100.64.0.10".to_owned()),
                ("customera-a-0", "100.64.0.20".to_owned()),
                ("customera-a-1", "100.64.0.21".to_owned()),
                ("customera-b-0", "100.64.0.22".to_owned()),
            ]
        );
        assert_eq!(slots[0].mac, "02:00:10:01:00:0a");
    }

    #[test]
    fn plan_slots_keeps_what_exists_and_fills_gaps() {
        let taken = BTreeMap::from([("customera-b-0".to_owned(), 22), ("customera-a-0".to_owned(), 20)]);
        let slots = plan(&valid(2), &network(), &taken).unwrap();
        let ip = |name: &str| slots.iter().find(|slot| slot.name == name).unwrap().ip.to_string();
        assert_eq!(
            (ip("customera-b-0"), ip("customera-a-1")),
            ("100.64.0.22".into(), "100.64.0.21".into())
        );
    }

    #[test]
    fn plan_slots_never_reuses_the_address_of_a_slot_that_is_going() {
        let taken = BTreeMap::from([("customera-old-0".to_owned(), 20)]);
        let slots = plan(&valid(1), &network(), &taken).unwrap();
        assert!(slots.iter().all(|slot| slot.ip != network().address(20)));
    }

    #[test]
    fn plan_image_of_a_machine_is_the_one_it_was_made_from() {
        let valid = valid(1);
        let slot = plan(&valid, &network(), &BTreeMap::new()).unwrap().remove(0);
        assert_eq!(image_of(&machine(&valid, &slot, None)), Some(valid.image));
    }

    #[test]
    fn plan_machine_of_the_control_plane() {
        let valid = valid(1);
        let slots = plan(&valid, &network(), &BTreeMap::new()).unwrap();
        insta::assert_yaml_snapshot!(machine(&valid, &slots[0], None));
    }
}
