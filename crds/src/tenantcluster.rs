//! TenantCluster: a whole Kubernetes cluster, as its owner asks for it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema, Resource};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use crate::quantity::Quantity;

/// Finalizer of a TenantCluster: held until its machines are gone and its VNI is given back.
pub const TENANT_FINALIZER: &str = "kubernest.io/tenantcluster";
/// Pool name that stands for the control plane in labels and slot tables.
pub const CONTROL_PLANE_POOL: &str = "control-plane";

/// Condition types of a TenantCluster.
pub mod conditions {
    /// Everything that was asked for runs.
    pub const READY: &str = "Ready";
    /// The tenant's VNI and addresses are allocated.
    pub const NETWORK_READY: &str = "NetworkReady";
    /// Every CA, key and certificate exists.
    pub const PKI_READY: &str = "PKIReady";
    /// The tenant's API server answers `/readyz`.
    pub const CONTROL_PLANE_READY: &str = "ControlPlaneReady";
    /// Network, DNS and access rules are applied inside the tenant.
    pub const ADDONS_READY: &str = "AddonsReady";
    /// Every slot is a Ready node of the tenant.
    pub const NODES_READY: &str = "NodesReady";
    /// The tenant's host name is routed to its API server.
    pub const INGRESS_READY: &str = "IngressReady";
}

/// Reasons of conditions of a TenantCluster.
pub mod reasons {
    /// The condition holds.
    pub const AVAILABLE: &str = "Available";
    /// Work towards it goes on; the message says what is waited for.
    pub const IN_PROGRESS: &str = "InProgress";
    /// An earlier condition must hold first; the message names it.
    pub const WAITING: &str = "Waiting";
    /// Virtual machines are not running yet.
    pub const MACHINES_STARTING: &str = "MachinesStarting";
    /// The tenant's API server doesn't answer yet.
    pub const API_SERVER_STARTING: &str = "APIServerStarting";
    /// Nodes haven't joined or are not Ready.
    pub const NODES_NOT_READY: &str = "NodesNotReady";
    /// The object can't be carried out as written; the message names the field.
    pub const INVALID: &str = "Invalid";
    /// The last attempt failed and is tried again; the message says at which step.
    pub const ERROR: &str = "Error";
    /// No free VNI or address range is left.
    pub const EXHAUSTED: &str = "Exhausted";
    /// The cluster is being deleted.
    pub const DELETING: &str = "Deleting";
    /// Somebody deleted what has the tenant's state.
    pub const LOSING_DATA: &str = "LosingData";
}

/// What the owner of a tenant cluster asks for. Only `version` is required.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "kubernest.io",
    version = "v1alpha1",
    kind = "TenantCluster",
    plural = "tenantclusters",
    namespaced,
    shortname = "tc",
    category = "kubernest",
    status = "TenantClusterStatus",
    derive = "PartialEq",
    doc = "A whole Kubernetes cluster whose nodes are virtual machines in this cluster.",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.version"),
    printcolumn(
        name = "Nodes",
        type_ = "string",
        json_path = ".status.nodes",
        description = "Nodes ready of nodes wanted"
    ),
    printcolumn(name = "Endpoint", type_ = "string", json_path = ".status.endpoint"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].message",
        priority = "1"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct TenantClusterSpec {
    /// Kubernetes version, for example `v1.35.4`; one that the operator has a node image for.
    #[schemars(regex(pattern = r"^v[0-9]+\.[0-9]+\.[0-9]+$"))]
    pub version: String,
    /// The machines of the control plane.
    #[serde(default)]
    pub control_plane: ControlPlane,
    /// Groups of worker machines. One pool `default` of one worker when not given.
    #[serde(default = "default_node_pools")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub node_pools: Vec<NodePool>,
    /// Addresses inside the tenant.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("is immutable: make a new TenantCluster to change it"))]
    pub network: TenantNetwork,
    /// Who signs the tenant's certificates.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("is immutable: make a new TenantCluster to change it"))]
    pub pki: Pki,
    /// How the tenant's API server is reached from outside.
    #[serde(default)]
    pub access: Access,
}

/// The machines of the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ControlPlane {
    /// Number of machines; odd, because etcd needs a majority. More than 1 is not supported yet.
    pub replicas: i32,
    /// Virtual CPUs of each.
    pub cpu: i32,
    /// Memory of each.
    pub memory: Quantity,
    /// Data disk of each: etcd, audit log, kubelet and container state.
    pub storage: Storage,
}

impl Default for ControlPlane {
    fn default() -> Self {
        Self {
            replicas: 1,
            cpu: 2,
            memory: "2Gi".into(),
            storage: Storage::default(),
        }
    }
}

/// A data disk, one PersistentVolumeClaim per slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Storage {
    /// Size of the claim.
    pub size: Quantity,
    /// StorageClass of the claim; the outer cluster's default class when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_class_name: Option<String>,
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            size: "8Gi".into(),
            storage_class_name: None,
        }
    }
}

/// A group of worker machines of one shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodePool {
    /// Name of the pool, part of its machines' and nodes' names.
    #[schemars(length(min = 1, max = 40), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// Number of machines.
    #[serde(default = "one")]
    pub replicas: i32,
    /// Virtual CPUs of each.
    #[serde(default = "one")]
    pub cpu: i32,
    /// Memory of each.
    #[serde(default = "default_pool_memory")]
    pub memory: Quantity,
    /// Data disk of each: kubelet and container state.
    #[serde(default)]
    pub storage: Storage,
    /// Labels of the pool's nodes.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Taints of the pool's nodes.
    #[serde(default)]
    pub taints: Vec<Taint>,
}

/// A taint of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Taint {
    /// Key, as labels have them.
    pub key: String,
    /// Value; may be empty.
    #[serde(default)]
    pub value: String,
    /// What happens to pods that don't tolerate it.
    pub effect: TaintEffect,
}

/// Effects that Kubernetes knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs, reason = "Kubernetes' own names")]
pub enum TaintEffect {
    NoSchedule,
    PreferNoSchedule,
    NoExecute,
}

/// Addresses inside the tenant. The node CIDR and the VNI are allocated by the operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TenantNetwork {
    /// Pod network inside the tenant.
    pub cni: Cni,
    /// Addresses of pods; each node takes a /24 of it.
    #[serde(rename = "podCIDR")]
    pub pod_cidr: String,
    /// Addresses of Services.
    #[serde(rename = "serviceCIDR")]
    pub service_cidr: String,
}

impl Default for TenantNetwork {
    fn default() -> Self {
        Self {
            cni: Cni::Flannel,
            pod_cidr: "10.10.0.0/16".into(),
            service_cidr: "10.11.0.0/16".into(),
        }
    }
}

/// Pod networks that a tenant can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Cni {
    /// flannel over VXLAN.
    #[default]
    Flannel,
    /// Calico; known by name, refused until it is supported.
    Calico,
}

/// Who signs the tenant's certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Pki {
    /// The issuer.
    pub issuer: Issuer,
}

/// Issuers that a tenant can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Issuer {
    /// CA keys in Secrets of the outer cluster.
    #[default]
    Embedded,
    /// Vault or OpenBao; known by name, refused until it is supported.
    Vault,
}

/// How the tenant's API server is reached from outside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Access {
    /// Host name of the API server; `<name>.<namespace>.<base domain>` when empty.
    pub hostname: String,
}

/// One word for people; machines read the conditions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Accepted, nothing made yet.
    #[default]
    Pending,
    /// Machines and the control plane come up.
    Provisioning,
    /// Everything asked for runs.
    Ready,
    /// It was Ready, or its API server answers, but something asked for doesn't run now.
    Degraded,
    /// It can't be carried out; the Ready condition says why.
    Failed,
    /// It is being taken down.
    Deleting,
}

/// What the operator saw last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TenantClusterStatus {
    /// One word for people.
    pub phase: Phase,
    /// Generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Kubernetes version that the API server reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// `ready/wanted` nodes, for the printer column.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<String>,
    /// URL that users reach the API server at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// VXLAN network identifier of the tenant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
    /// Addresses of the tenant's nodes.
    #[serde(rename = "nodeCIDR", skip_serializing_if = "Option::is_none")]
    pub node_cidr: Option<String>,
    /// Route that the ingress serves for this tenant, while a machine of its control plane is Ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress: Option<IngressRoute>,
    /// One row a slot.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub slots: Vec<Slot>,
    /// Certificates and when they end.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub certificates: Vec<Certificate>,
    /// Conditions, see [`conditions`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// Route from a host name (TLS SNI) to an address inside the outer cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IngressRoute {
    /// Host name that clients ask for.
    pub host: String,
    /// ClusterIP of the tenant's API Service.
    pub address: String,
    /// Port of that Service.
    pub port: u16,
}

/// What a slot is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SlotRole {
    /// Runs etcd and the control plane.
    ControlPlane,
    /// Runs the tenant's workload.
    Worker,
}

impl SlotRole {
    /// The value of the role label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ControlPlane => "control-plane",
            Self::Worker => "worker",
        }
    }
}

/// A slot: an identity that outlives its virtual machine, pod and host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Slot {
    /// Name of the virtual machine and of the node.
    pub name: String,
    /// What it is for.
    pub role: SlotRole,
    /// Node pool, or `control-plane`.
    pub pool: String,
    /// Address on the tenant network.
    pub ip: String,
    /// MAC address on the tenant network.
    pub mac: String,
    /// The virtual machine runs.
    pub machine_ready: bool,
    /// The node is Ready in the tenant.
    pub node_ready: bool,
}

/// When a certificate ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Certificate {
    /// Which one, for example `ca` or `customera-cp-0/kube-apiserver`.
    pub name: String,
    /// End of validity.
    pub not_after: Time,
}

fn one() -> i32 {
    1
}

fn default_pool_memory() -> Quantity {
    "1Gi".into()
}

fn default_node_pools() -> Vec<NodePool> {
    vec![NodePool {
        name: "default".into(),
        replicas: 1,
        cpu: 1,
        memory: default_pool_memory(),
        storage: Storage::default(),
        labels: BTreeMap::new(),
        taints: Vec::new(),
    }]
}

impl TenantCluster {
    /// Whether an owner reference of this `apiVersion` and `kind` names one, of whatever version.
    pub fn is_named_by(api_version: &str, kind: &str) -> bool {
        let (group, _) = api_version.split_once('/').unwrap_or_default();
        group == Self::group(&()) && kind == Self::kind(&())
    }

    /// Whether it was there before `other`, whose host name it then keeps; the name decides between those of one second.
    pub fn is_senior_to(&self, other: &Self) -> bool {
        let age = |cluster: &Self| {
            let metadata = &cluster.metadata;
            let created = metadata.creation_timestamp.as_ref().map(|time| time.0);
            (created, metadata.namespace.clone(), metadata.name.clone())
        };
        age(self) < age(other)
    }

    /// Host name of the API server under the installation's base domain.
    pub fn host(&self, base_domain: &str) -> String {
        if !self.spec.access.hostname.is_empty() {
            return self.spec.access.hostname.clone();
        }
        let name = self.metadata.name.as_deref().unwrap_or_default();
        let namespace = self.metadata.namespace.as_deref().unwrap_or_default();
        format!("{name}.{namespace}.{base_domain}")
    }
}
