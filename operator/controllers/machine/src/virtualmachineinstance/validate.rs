//! Turns an instance, defaulted as KubeVirt defaults it, into a [`Machine`] that a pod can be built from, or says by
//! field what is in the way.
//!
//! Admission refuses most of this earlier; here it holds for whatever reached the API server. No client, no clock.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use kubernest_crds::kubevirt::v1::{
    Cpu, Disk, DiskTarget, GuestNetwork, Interface, Masquerade, Memory, Network, PodNetwork, Port,
    VirtualMachineInstance, VirtualMachineInstanceSpec, Volume, start_strategy,
};
use kubernest_crds::quantity::Quantity;
use kubernest_domain::{ClaimedVolume, VolumeMode};

use crate::names;

/// Name that KubeVirt gives the interface and network it adds.
const DEFAULT_NETWORK: &str = "default";

/// An instance that can be run: every reference resolved, every quantity read.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The instance with defaults filled in.
    pub instance: VirtualMachineInstance,
    /// Memory of the guest in bytes.
    pub guest_bytes: u64,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Interfaces with their networks, in the order of the spec.
    pub nics: Vec<Nic>,
    /// The claims among the volumes, by volume name.
    pub claims: BTreeMap<String, ClaimedVolume>,
}

/// An interface and what it attaches to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Name in the spec.
    pub name: String,
    /// MAC address, lower case with colons.
    pub mac: String,
    /// Its binding.
    pub binding: Binding,
}

/// How an interface attaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Binding {
    /// Behind the pod's address.
    Masquerade {
        /// What is forwarded; everything if there are none.
        ports: Vec<Port>,
        /// The guest's addresses.
        network: GuestNetwork,
    },
    /// A network of Multus: namespace and name of its NetworkAttachmentDefinition.
    Bridge(String, String),
}

/// Why an instance gets no launcher pod now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// The spec is wrong; only a new instance mends it.
    #[error("{field}: {problem}")]
    Invalid {
        /// Path below the instance.
        field: String,
        /// What is wrong and what is expected.
        problem: String,
    },
    /// A claim does not exist yet.
    #[error("PersistentVolumeClaim {0} does not exist: create it, the machine starts then")]
    ClaimMissing(String),
    /// The API server refuses the pod: a quota, a policy, a bad name in the spec. Tried again later.
    #[error("the launcher pod is refused: {0}")]
    Refused(String),
    /// The launcher pod as the API server would store it has no claim to processors of its own.
    #[error(
        "failed to guarantee pod resources: something in this cluster changes launcher pods, so that their requests are not \
         their limits and no node would give them processors of their own"
    )]
    NotGuaranteed,
    /// The launcher cannot have its certificate now. Tried again later.
    #[error("the launcher cannot have its certificate: {0}")]
    Uncertified(String),
}

impl Obstacle {
    /// Reason of the Synchronized condition.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => super::reasons::INVALID,
            Self::ClaimMissing(_) => super::reasons::PVC_NOT_FOUND,
            Self::NotGuaranteed => super::reasons::NOT_GUARANTEED,
            Self::Refused(_) | Self::Uncertified(_) => super::reasons::FAILED_CREATE,
        }
    }
}

fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Obstacle {
    Obstacle::Invalid {
        field: field.into(),
        problem: problem.into(),
    }
}

/// Reads the instance; `claims` are those that exist, by claim name.
///
/// # Errors
/// The first [`Obstacle`] in the order of the spec.
pub fn validate(
    instance: &VirtualMachineInstance,
    claims: &BTreeMap<String, PersistentVolumeClaim>,
) -> Result<Machine, Obstacle> {
    let mut instance = instance.clone();
    instance.status = None;
    let guest_bytes = default_memory(&mut instance)?;
    default_network(&mut instance);
    default_topology(&mut instance);
    default_disks(&mut instance);
    check_volumes(&instance)?;
    check_probes(&instance)?;
    let nics = nics(&instance)?;
    let claims = resolve_claims(&instance, claims)?;
    let cpus = instance.spec.domain.cpu.as_ref().map_or(1, |cpu| cpu.count());
    Ok(Machine {
        instance,
        guest_bytes,
        cpus,
        nics,
        claims,
    })
}

/// memory.guest, else requests.memory, else limits.memory, as KubeVirt's mutating webhook does.
fn default_memory(instance: &mut VirtualMachineInstance) -> Result<u64, Obstacle> {
    let domain = &mut instance.spec.domain;
    let from = [&domain.resources.requests, &domain.resources.limits].map(|list| list.get("memory").cloned());
    let guest = domain
        .memory
        .as_ref()
        .and_then(|memory| memory.guest.clone())
        .or_else(|| from.into_iter().flatten().next());
    let field = "spec.domain.memory.guest";
    let guest = guest.ok_or_else(|| invalid(field, "no memory is given; set it, or resources.requests.memory"))?;
    let bytes = bytes(field, &guest)?;
    domain.memory.get_or_insert_with(Memory::default).guest = Some(guest);
    Ok(bytes)
}

fn bytes(field: &str, quantity: &Quantity) -> Result<u64, Obstacle> {
    let value = quantity.value().map_err(|error| invalid(field, error.to_string()))?;
    u64::try_from(value)
        .ok()
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| invalid(field, "must be more than 0"))
}

/// A disk for each volume that is neither disk nor share (KubeVirt's rule).
fn default_disks(instance: &mut VirtualMachineInstance) {
    let devices = &mut instance.spec.domain.devices;
    let mut used: Vec<&str> = devices.disks.iter().flatten().map(|disk| disk.name.as_str()).collect();
    used.extend(devices.filesystems.iter().flatten().map(|share| share.name.as_str()));
    let volumes = instance.spec.volumes.iter().flatten();
    let unused: Vec<Disk> = volumes
        .filter(|volume| !used.contains(&volume.name.as_str()))
        .map(|volume| Disk {
            name: volume.name.clone(),
            disk: Some(DiskTarget::default()),
            ..Disk::default()
        })
        .collect();
    if !unused.is_empty() {
        devices.disks.get_or_insert_default().extend(unused);
    }
}

/// Sockets by the processor time that the pod may have, or asks for, when the user gave no topology (KubeVirt's rule).
fn default_topology(instance: &mut VirtualMachineInstance) {
    let domain = &mut instance.spec.domain;
    let cpu = domain.cpu.clone().unwrap_or_default();
    let given = [cpu.sockets, cpu.cores, cpu.threads];
    if given.iter().any(|number| number.is_some_and(|number| number > 0)) {
        return;
    }
    let resources = &domain.resources;
    let time = resources.limits.get("cpu").or_else(|| resources.requests.get("cpu"));
    let sockets = time.and_then(|time| u32::try_from(time.value().ok()?).ok());
    if let Some(sockets) = sockets.filter(|sockets| *sockets > 0) {
        domain.cpu = Some(Cpu {
            sockets: Some(sockets),
            ..cpu
        });
    }
}

/// One masquerade interface on the pod network when the user gave neither interfaces nor networks.
fn default_network(instance: &mut VirtualMachineInstance) {
    let devices = &mut instance.spec.domain.devices;
    let none = devices.interfaces.as_ref().is_none_or(Vec::is_empty);
    let unattached = instance.spec.networks.as_ref().is_none_or(Vec::is_empty);
    if none && unattached && devices.autoattach_pod_interface != Some(false) {
        devices.interfaces = Some(vec![Interface {
            name: DEFAULT_NETWORK.to_owned(),
            masquerade: Some(Masquerade {}),
            ..Interface::default()
        }]);
        instance.spec.networks = Some(vec![Network {
            name: DEFAULT_NETWORK.to_owned(),
            pod: Some(PodNetwork::default()),
            multus: None,
        }]);
    }
}

fn check_volumes(instance: &VirtualMachineInstance) -> Result<(), Obstacle> {
    let volumes = instance.spec.volumes.as_deref().unwrap_or_default();
    let mut names = BTreeSet::new();
    for (index, volume) in volumes.iter().enumerate() {
        if !names.insert(volume.name.as_str()) {
            return Err(invalid(
                format!("spec.volumes[{index}].name"),
                format!("'{}' is there twice", volume.name),
            ));
        }
        if sources(volume) != 1 {
            return Err(invalid(
                format!("spec.volumes[{index}]"),
                "must have exactly one source type set",
            ));
        }
    }
    if service_accounts(&instance.spec).count() > 1 {
        return Err(invalid("spec.volumes", "must have max one serviceAccount volume set"));
    }
    if service_accounts(&instance.spec).any(str::is_empty) {
        return Err(invalid("spec.volumes", "must name the service account"));
    }
    let devices = &instance.spec.domain.devices;
    let disks = devices.disks.iter().flatten().map(|disk| ("disks", disk.name.as_str()));
    let shares = devices
        .filesystems
        .iter()
        .flatten()
        .map(|share| ("filesystems", share.name.as_str()));
    for (list, name) in disks.chain(shares) {
        if !names.contains(name) {
            return Err(invalid(
                format!("spec.domain.devices.{list}"),
                format!("there is no volume named '{name}'"),
            ));
        }
    }
    Ok(())
}

/// A probe of another host would be the kubelet's, from the node's own network.
fn check_probes(instance: &VirtualMachineInstance) -> Result<(), Obstacle> {
    let spec = &instance.spec;
    for (name, probe) in [
        ("readinessProbe", &spec.readiness_probe),
        ("livenessProbe", &spec.liveness_probe),
    ] {
        let Some(probe) = probe else { continue };
        let http = probe.http_get.as_ref().and_then(|get| get.host.as_deref());
        let tcp = probe.tcp_socket.as_ref().and_then(|socket| socket.host.as_deref());
        if [http, tcp].into_iter().flatten().any(|host| !host.is_empty()) {
            return Err(invalid(format!("spec.{name}"), "host is not supported"));
        }
        if probe.exec.as_ref().is_some_and(|exec| exec.command.is_empty()) {
            return Err(invalid(format!("spec.{name}.exec.command"), "must not be empty"));
        }
    }
    let paused = spec.start_strategy.as_deref() == Some(start_strategy::PAUSED);
    if paused && spec.liveness_probe.is_some() {
        let why = "Paused with a livenessProbe is not supported: the guest would be ended for standing still";
        return Err(invalid("spec.startStrategy", why));
    }
    Ok(())
}

/// Names of the service accounts whose token the guest is to have; empty where one is not named.
pub fn service_accounts(spec: &VirtualMachineInstanceSpec) -> impl Iterator<Item = &str> {
    let sources = spec
        .volumes
        .iter()
        .flatten()
        .filter_map(|volume| volume.service_account.as_ref());
    sources.map(|source| source.service_account_name.as_deref().unwrap_or_default())
}

fn sources(volume: &Volume) -> usize {
    [
        volume.container_disk.is_some(),
        volume.cloud_init_no_cloud.is_some(),
        volume.cloud_init_config_drive.is_some(),
        volume.persistent_volume_claim.is_some(),
        volume.ephemeral.is_some(),
        volume.empty_disk.is_some(),
        volume.secret.is_some(),
        volume.config_map.is_some(),
        volume.service_account.is_some(),
    ]
    .into_iter()
    .filter(|set| *set)
    .count()
}

fn nics(instance: &VirtualMachineInstance) -> Result<Vec<Nic>, Obstacle> {
    let networks = instance.spec.networks.as_deref().unwrap_or_default();
    let interfaces = instance.spec.domain.devices.interfaces.as_deref().unwrap_or_default();
    let uid = instance.uid().unwrap_or_default();
    let mut nics = Vec::with_capacity(interfaces.len());
    for (index, interface) in interfaces.iter().enumerate() {
        let field = format!("spec.domain.devices.interfaces[{index}]");
        let at = networks.iter().position(|network| network.name == interface.name);
        let at = at.ok_or_else(|| invalid(&field, format!("there is no network named '{}'", interface.name)))?;
        let network = &networks[at];
        let binding = match (&interface.masquerade, &interface.bridge, &network.pod, &network.multus) {
            (Some(_), None, Some(pod), None) => Binding::Masquerade {
                ports: interface.ports.clone().unwrap_or_default(),
                network: pod
                    .guest_network()
                    .map_err(|why| invalid(format!("spec.networks[{at}].pod.vmNetworkCIDR"), why.to_string()))?,
            },
            (None, Some(_), None, Some(multus)) => {
                let own = instance.namespace().unwrap_or_default();
                let (namespace, name) = multus
                    .network_name
                    .split_once('/')
                    .unwrap_or((own.as_str(), multus.network_name.as_str()));
                Binding::Bridge(namespace.to_owned(), name.to_owned())
            }
            _ => {
                let problem = "must be masquerade on the pod network or bridge on a network of Multus";
                return Err(invalid(field, problem));
            }
        };
        let given = interface
            .mac_address
            .as_ref()
            .map(|mac| mac.to_ascii_lowercase().replace('-', ":"));
        let mac = given.unwrap_or_else(|| names::mac(&uid, &interface.name));
        nics.push(Nic {
            name: interface.name.clone(),
            mac,
            binding,
        });
    }
    Ok(nics)
}

fn resolve_claims(
    instance: &VirtualMachineInstance,
    claims: &BTreeMap<String, PersistentVolumeClaim>,
) -> Result<BTreeMap<String, ClaimedVolume>, Obstacle> {
    let mut resolved = BTreeMap::new();
    for volume in instance.spec.volumes.iter().flatten() {
        let Some(source) = volume.claim() else {
            continue;
        };
        let claim = claims
            .get(&source.claim_name)
            .ok_or_else(|| Obstacle::ClaimMissing(source.claim_name.clone()))?;
        let spec = claim.spec.clone().unwrap_or_default();
        let requested = spec
            .resources
            .and_then(|resources| resources.requests?.get("storage").cloned());
        let field = format!(
            "PersistentVolumeClaim {}: spec.resources.requests.storage",
            source.claim_name
        );
        let requested = requested.ok_or_else(|| invalid(&field, "is missing"))?;
        let mode = match spec.volume_mode.as_deref() {
            Some("Block") => VolumeMode::Block,
            _ => VolumeMode::Filesystem,
        };
        let capacity = bytes(&field, &Quantity(requested.0))?;
        resolved.insert(volume.name.clone(), ClaimedVolume { mode, capacity });
    }
    Ok(resolved)
}

/// The interfaces alone, for the status of an instance whose claims are of no more interest; none if they are wrong.
pub fn interfaces(instance: &VirtualMachineInstance) -> Vec<Nic> {
    let mut instance = instance.clone();
    default_network(&mut instance);
    nics(&instance).unwrap_or_default()
}
