//! VirtualMachineInstanceReplicaSet: as many instances of one template as are asked for, as a ReplicaSet keeps pods.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use super::virtualmachineinstance::{VirtualMachineInstanceCondition, VirtualMachineInstanceSpec};

/// Condition types of a VirtualMachineInstanceReplicaSet; one that does not hold is absent.
pub mod vmirs_conditions {
    /// An instance could not be made or deleted.
    pub const REPLICA_FAILURE: &str = "ReplicaFailure";
    /// The set is paused: instances may be added and removed by hand.
    pub const REPLICA_PAUSED: &str = "ReplicaPaused";
}

/// How many instances there are to be, and what they are made from.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstanceReplicaSet",
    plural = "virtualmachineinstancereplicasets",
    namespaced,
    shortname = "vmirs",
    shortname = "vmirss",
    category = "all",
    status = "VirtualMachineInstanceReplicaSetStatus",
    derive = "PartialEq",
    derive = "Default",
    doc = "A number of running virtual machines of one kind.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.labelSelector"
    ),
    printcolumn(
        name = "Desired",
        type_ = "integer",
        json_path = ".spec.replicas",
        description = "Instances asked for"
    ),
    printcolumn(
        name = "Current",
        type_ = "integer",
        json_path = ".status.replicas",
        description = "Instances that are there, without those that are over or being deleted"
    ),
    printcolumn(
        name = "Ready",
        type_ = "integer",
        json_path = ".status.readyReplicas",
        description = "Instances that are Ready"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineInstanceReplicaSetSpec {
    /// Instances asked for; below 0 is 0.
    #[serde(default = "one")]
    pub replicas: i32,
    /// Which instances count; it must match the labels of the template. An empty one is refused, as by Kubernetes' own sets: it
    /// would take every instance of the namespace.
    pub selector: LabelSelector,
    /// What an instance is made from. A change is of no effect on those that are there. A persistentVolumeClaim must be
    /// `readOnly`: all instances would write to one disk. `ephemeral` gives each an overlay of its own.
    pub template: ReplicaTemplate,
    /// Instances are neither made nor deleted.
    #[serde(default, skip_serializing_if = "is_false")]
    pub paused: bool,
}

/// What an instance of a set is made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaTemplate {
    /// Labels, annotations and beginning of the name of an instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<ReplicaMetadata>,
    /// Spec of an instance.
    pub spec: VirtualMachineInstanceSpec,
}

/// The part of object metadata that a replica set's template may carry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaMetadata {
    /// What the instances' names begin with. Default the set's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The same, where `name` is not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generate_name: Option<String>,
    /// Labels of the instance and of its launcher pod.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations of the instance.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Written by many tools as null; means nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<Time>,
}

/// What the controller saw last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VirtualMachineInstanceReplicaSetStatus {
    /// Instances that are there, without those that are over or being deleted.
    pub replicas: i32,
    /// Those of them that are Ready.
    pub ready_replicas: i32,
    /// Conditions, see [`vmirs_conditions`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<VirtualMachineInstanceCondition>,
    /// The selector in its written form, for the scale subresource and so for autoscalers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_selector: Option<String>,
}

fn one() -> i32 {
    1
}

fn is_false(value: &bool) -> bool {
    !*value
}
