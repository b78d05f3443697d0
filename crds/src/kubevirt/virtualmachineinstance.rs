//! VirtualMachineInstance: one run of a machine, mortal like a pod.

use k8s_openapi::api::core::v1::{
    Affinity, HTTPGetAction, PodDNSConfig, TCPSocketAction, Toleration, TopologySpreadConstraint,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use super::domain::DomainSpec;
use super::guest_agent::GuestOsInfo;
use super::volume::{Network, Volume};

/// Finalizer of an instance: held until its process is surely gone.
pub const VMI_FINALIZER: &str = "kubevirt.io/foregroundDeleteVirtualMachine";

/// Condition of a launcher pod, and its readiness gate: its guest does not stand still (KubeVirt's word).
pub const UNPAUSED: &str = "kubevirt.io/virtual-machine-unpaused";

/// Condition types of an instance.
pub mod vmi_conditions {
    /// The guest runs and its readiness probe, if any, succeeds.
    pub const READY: &str = "Ready";
    /// The guest is paused.
    pub const PAUSED: &str = "Paused";
    /// The guest agent is connected.
    pub const AGENT_CONNECTED: &str = "AgentConnected";
    /// Live migration is possible; always False here.
    pub const LIVE_MIGRATABLE: &str = "LiveMigratable";
    /// The launcher pod could be made as asked.
    pub const SYNCHRONIZED: &str = "Synchronized";
    /// The guest runs without hardware virtualisation.
    pub const SOFTWARE_EMULATION: &str = "SoftwareEmulation";
}

/// One virtual machine's shape, devices and place.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstance",
    plural = "virtualmachineinstances",
    namespaced,
    shortname = "vmi",
    shortname = "vmis",
    category = "all",
    status = "VirtualMachineInstanceStatus",
    derive = "PartialEq",
    derive = "Default",
    doc = "A running virtual machine.",
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "IP", type_ = "string", json_path = ".status.interfaces[0].ipAddress"),
    printcolumn(name = "NodeName", type_ = "string", json_path = ".status.nodeName"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].status"
    ),
    printcolumn(
        name = "Live-Migratable",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='LiveMigratable')].status",
        priority = "1"
    ),
    printcolumn(
        name = "Paused",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Paused')].status",
        priority = "1"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineInstanceSpec {
    /// The virtual hardware.
    pub domain: DomainSpec,
    /// CPU architecture; only `amd64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// Disks' and filesystems' sources.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<Vec<Volume>>,
    /// Networks that interfaces attach to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<Network>>,
    /// Seconds between the ACPI power button and pulling the plug. Default 30.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termination_grace_period_seconds: Option<i64>,
    /// Host name of the guest as DHCP and cloud-init tell it; the instance's name when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Subdomain of the pod, one DNS label. Names with dots, which KubeVirt's admission lets in, are refused: no pod has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subdomain: Option<String>,
    /// Where the guest's DNS settings come from, as in a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_policy: Option<String>,
    /// DNS settings, as in a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_config: Option<PodDNSConfig>,
    /// Labels that the node must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<BTreeMap<String, String>>,
    /// Scheduling rules, as in a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// Taints tolerated, as in a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tolerations: Option<Vec<Toleration>>,
    /// Spreading rules, as in a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology_spread_constraints: Option<Vec<TopologySpreadConstraint>>,
    /// Priority, as in a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
    /// Scheduler, as in a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduler_name: Option<String>,
    /// How the guest starts: running when not given, with `Paused` standing still until it is unpaused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_strategy: Option<String>,
    /// Who may log in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_credentials: Option<Vec<AccessCredential>>,
    /// The instance is Ready while this succeeds; without it as soon as the guest runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness_probe: Option<Box<Probe>>,
    /// The guest is stopped when this fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub liveness_probe: Option<Box<Probe>>,
    /// What an eviction does; only `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eviction_strategy: Option<String>,
}

impl VirtualMachineInstanceSpec {
    /// Whether this interface is on a network's layer 2, where its addresses are its guest's affair.
    pub fn is_bridged(&self, interface: &str) -> bool {
        let mut all = self.domain.devices.interfaces.iter().flatten();
        all.any(|one| one.name == interface && one.bridge.is_some())
    }
}

/// A way to log in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessCredential {
    /// Public keys of SSH.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_public_key: Option<SshPublicKeyCredential>,
}

/// Public keys of SSH for the image's default user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SshPublicKeyCredential {
    /// Where they are.
    pub source: SshPublicKeySource,
    /// How the guest gets them.
    pub propagation_method: SshPublicKeyPropagation,
}

/// Where keys are; exactly one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SshPublicKeySource {
    /// A Secret, each of whose keys holds lines of `authorized_keys`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<AccessCredentialSecret>,
}

/// A Secret.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessCredentialSecret {
    /// Its name.
    pub secret_name: String,
}

/// How the guest gets keys; exactly one, and a volume of that form.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SshPublicKeyPropagation {
    /// In the meta data of cloud-init's NoCloud.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_cloud: Option<ByCloudInit>,
    /// In the meta data of the config drive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_drive: Option<ByCloudInit>,
}

/// By cloud-init, when the guest starts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ByCloudInit {}

/// A question to the guest; exactly one of them. The kubelet asks `httpGet` and `tcpSocket` at the pod's address, and a
/// masquerade interface leads them to the guest; `exec` and `guestAgentPing` go through the guest agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// Does a command in the guest exit with 0? One that outlasts `timeoutSeconds` counts as failed and runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<GuestExec>,
    /// Does the guest agent answer? That of a guest that was paused by a user counts as answering.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_agent_ping: Option<GuestAgentPing>,
    /// Does a GET succeed? `host` is refused: the kubelet would ask it from the node's own network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_get: Option<HTTPGetAction>,
    /// Is a connection accepted? `host` is refused: the kubelet would ask it from the node's own network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_socket: Option<TCPSocketAction>,
    /// Seconds between the guest's start and the first question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial_delay_seconds: Option<i32>,
    /// Seconds to wait for an answer. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<i32>,
    /// Seconds between questions. Default 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub period_seconds: Option<i32>,
    /// Answers in a row that make it succeed. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub success_threshold: Option<i32>,
    /// Failures in a row that make it fail. Default 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_threshold: Option<i32>,
}

impl Probe {
    /// Whether it goes through the guest agent.
    pub fn asks_the_agent(&self) -> bool {
        self.exec.is_some() || self.guest_agent_ping.is_some()
    }
}

/// What is run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestExec {
    /// A program in the guest and its arguments; no shell reads them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
}

/// The agent is asked whether it is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GuestAgentPing {}

/// What the controller saw last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VirtualMachineInstanceStatus {
    /// See [`phase`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// When each phase began.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub phase_transition_timestamps: Vec<PhaseTransition>,
    /// Why the phase is what it is, in one word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Conditions, see [`vmi_conditions`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<VirtualMachineInstanceCondition>,
    /// Node that the launcher pod runs on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Launcher pods by UID, with their node.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub active_pods: BTreeMap<String, String>,
    /// Address of the launcher pod (Kubernest's own; KubeVirt has none): where `kubernest-api` reaches console and screen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launcher_address: Option<String>,
    /// Interfaces, in the order of the spec.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<InterfaceStatus>,
    /// Volumes, in the order of the spec.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volume_status: Vec<VolumeStatus>,
    /// The guest's operating system, as its agent told when it connected; gone when the agent is.
    #[serde(rename = "guestOSInfo", skip_serializing_if = "Option::is_none")]
    pub guest_os_info: Option<GuestOsInfo>,
    /// Quality of service class of the launcher pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qos_class: Option<String>,
    /// Last lines of the serial console, answered to a request (see `labels::CONSOLE_TAIL_REQUEST`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console_tail: Option<ConsoleTail>,
}

/// Values of `spec.startStrategy`.
pub mod start_strategy {
    /// The guest stands still until it is unpaused.
    pub const PAUSED: &str = "Paused";
}

/// Values of `status.phase`.
pub mod phase {
    /// Accepted; no launcher pod yet.
    pub const PENDING: &str = "Pending";
    /// The launcher pod exists and isn't running.
    pub const SCHEDULING: &str = "Scheduling";
    /// The launcher runs and starts the guest.
    pub const SCHEDULED: &str = "Scheduled";
    /// The guest runs.
    pub const RUNNING: &str = "Running";
    /// The guest ended by itself or as asked.
    pub const SUCCEEDED: &str = "Succeeded";
    /// The guest or its launcher ended otherwise.
    pub const FAILED: &str = "Failed";
    /// The node can't be reached.
    pub const UNKNOWN: &str = "Unknown";
}

/// When a phase began.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PhaseTransition {
    /// The phase.
    pub phase: String,
    /// Its beginning.
    pub phase_transition_timestamp: Time,
}

/// A condition in KubeVirt's shape (like a pod's, without observedGeneration).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineInstanceCondition {
    /// Type.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// When it was looked at last; null when unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_probe_time: Option<Time>,
    /// When the status changed last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<Time>,
    /// One word why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// A sentence why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// An interface as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct InterfaceStatus {
    /// Name in the spec.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// First address: that of its pod, or of one on a bridge the guest's own word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_address: Option<String>,
    /// All of them; of one on a bridge those that the guest agent tells.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ip_addresses: Vec<String>,
    /// MAC address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Name in the guest, when the guest agent says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface_name: Option<String>,
    /// Where this is known from: `domain`, `guest-agent`, `multus-status`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub info_source: Option<String>,
}

impl InterfaceStatus {
    const GUEST_AGENT: &str = "guest-agent";

    /// Whether the guest agent has told of it.
    pub fn is_told_by_agent(&self) -> bool {
        let sources = self.info_source.iter().flat_map(|sources| sources.split(", "));
        sources.into_iter().any(|source| source == Self::GUEST_AGENT)
    }

    /// Says so, or no more.
    pub fn set_told_by_agent(&mut self, told: bool) {
        let sources = self.info_source.iter().flat_map(|sources| sources.split(", "));
        let mut sources: Vec<&str> = sources.filter(|source| *source != Self::GUEST_AGENT).collect();
        if told {
            // KubeVirt's order.
            sources.insert(sources.len().min(1), Self::GUEST_AGENT);
        }
        self.info_source = (!sources.is_empty()).then(|| sources.join(", "));
    }
}

/// A volume as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VolumeStatus {
    /// Name in the spec.
    pub name: String,
    /// Device in the guest, for example `vda`.
    pub target: String,
}

/// Last lines of the serial console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ConsoleTail {
    /// The request that this answers.
    pub request: String,
    /// At most 20 lines of at most 200 bytes.
    pub lines: Vec<String>,
}
