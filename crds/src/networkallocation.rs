//! NetworkAllocation: one VNI and one node CIDR, taken by one TenantCluster.
//!
//! The object's name is derived from the VNI and it is created, never applied, so the API server's uniqueness of names
//! makes the allocation atomic: two operators can't take the same number. It is cluster-scoped because a VNI is.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is allocated, and to whom.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "kubernest.io",
    version = "v1alpha1",
    kind = "NetworkAllocation",
    plural = "networkallocations",
    shortname = "na",
    category = "kubernest",
    derive = "PartialEq",
    doc = "A VXLAN network identifier and node address range taken by one TenantCluster.",
    printcolumn(name = "VNI", type_ = "integer", json_path = ".spec.vni"),
    printcolumn(name = "Node CIDR", type_ = "string", json_path = ".spec.nodeCIDR"),
    printcolumn(name = "Namespace", type_ = "string", json_path = ".spec.owner.namespace"),
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.owner.name"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct NetworkAllocationSpec {
    /// VXLAN network identifier (RFC 7348), 24 bits.
    #[schemars(range(min = 1, max = 16777215))]
    pub vni: u32,
    /// Addresses of the tenant's nodes on its own layer 2 network, in CIDR notation.
    #[serde(rename = "nodeCIDR")]
    pub node_cidr: String,
    /// The TenantCluster that holds it.
    pub owner: AllocationOwner,
}

/// The TenantCluster that holds a [`NetworkAllocation`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AllocationOwner {
    /// Its namespace: only launcher pods of this namespace may join the network.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID, so that a cluster of the same name made later isn't mistaken for it.
    pub uid: String,
}

impl NetworkAllocation {
    /// Name of the object that stands for a VNI.
    pub fn name_for(vni: u32) -> String {
        format!("vni-{vni}")
    }

    /// The object that takes `vni` for `owner`.
    pub fn take(vni: u32, node_cidr: String, owner: AllocationOwner) -> Self {
        Self {
            metadata: ObjectMeta {
                name: Some(Self::name_for(vni)),
                labels: Some([(crate::labels::MANAGED_BY.into(), crate::labels::MANAGED_BY_VALUE.into())].into()),
                ..ObjectMeta::default()
            },
            spec: NetworkAllocationSpec { vni, node_cidr, owner },
        }
    }
}
