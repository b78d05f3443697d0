//! VirtualMachine: a machine that is started, stopped and survives its node, by making VirtualMachineInstances.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use super::virtualmachineinstance::{VirtualMachineInstanceCondition, VirtualMachineInstanceSpec};

/// Finalizer of a VirtualMachine: held until its instance is gone.
pub const VM_FINALIZER: &str = "kubevirt.io/virtualMachineControllerFinalize";

/// Condition types of a VirtualMachine; those of its instance stand beside them.
pub mod vm_conditions {
    /// The instance is Ready.
    pub const READY: &str = "Ready";
    /// The last attempt to make or stop the instance failed.
    pub const FAILURE: &str = "Failure";
    /// The template differs from what runs.
    pub const RESTART_REQUIRED: &str = "RestartRequired";
}

/// When the machine runs, and what it is made from.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachine",
    plural = "virtualmachines",
    namespaced,
    shortname = "vm",
    shortname = "vms",
    category = "all",
    status = "VirtualMachineStatus",
    derive = "PartialEq",
    derive = "Default",
    doc = "A virtual machine that can be started and stopped.",
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.printableStatus"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].status"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineSpec {
    /// Deprecated by KubeVirt: use `runStrategy`. True is `Always`, false is `Halted`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<bool>,
    /// When the machine runs; excludes `running`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_strategy: Option<String>,
    /// What the instance is made from.
    pub template: VirtualMachineInstanceTemplate,
}

/// Values of `spec.runStrategy`.
pub mod run_strategy {
    /// An instance always runs; it is made again whenever it ends.
    pub const ALWAYS: &str = "Always";
    /// No instance runs.
    pub const HALTED: &str = "Halted";
    /// Started and stopped through the API only.
    pub const MANUAL: &str = "Manual";
    /// Made again when it failed, not when it ended well.
    pub const RERUN_ON_FAILURE: &str = "RerunOnFailure";
    /// Started once.
    pub const ONCE: &str = "Once";
}

/// What an instance is made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineInstanceTemplate {
    /// Labels and annotations of the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<TemplateMetadata>,
    /// Spec of the instance.
    pub spec: VirtualMachineInstanceSpec,
}

/// The part of object metadata that a template may carry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TemplateMetadata {
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
pub struct VirtualMachineStatus {
    /// An instance exists.
    #[serde(skip_serializing_if = "is_false")]
    pub created: bool,
    /// The instance is Ready.
    #[serde(skip_serializing_if = "is_false")]
    pub ready: bool,
    /// One word for people, see [`printable_status`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub printable_status: Option<String>,
    /// Strategy in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_strategy: Option<String>,
    /// Conditions, see [`vm_conditions`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<VirtualMachineInstanceCondition>,
    /// Requests made through the API and not carried out yet.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub state_change_requests: Vec<StateChangeRequest>,
    /// Set while instances fail to start, see [`StartFailure`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_failure: Option<StartFailure>,
    /// Generation that the running instance was made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Generation of the spec.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_generation: Option<i64>,
}

/// Words of a [`StateChangeRequest`].
pub mod state_change {
    /// Action: make an instance.
    pub const START: &str = "Start";
    /// Action: delete the instance of the request's uid.
    pub const STOP: &str = "Stop";
    /// Key in the data of a start: with [`TRUE`] the guest stands still until it is unpaused.
    pub const PAUSED: &str = "paused";
    /// A value in the data of a start.
    pub const TRUE: &str = "true";
}

/// A start or stop asked for through the API, see [`state_change`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StateChangeRequest {
    /// `Start` or `Stop`.
    pub action: String,
    /// Options of the request.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub data: BTreeMap<String, String>,
    /// Instance to stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

/// Back-off between attempts to start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StartFailure {
    /// Failures since the last success.
    pub consecutive_fail_count: i32,
    /// The instance that failed last.
    #[serde(rename = "lastFailedVMIUID", default, skip_serializing_if = "Option::is_none")]
    pub last_failed_vmi_uid: Option<String>,
    /// No attempt before this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_timestamp: Option<Time>,
}

/// Values of `status.printableStatus`; the first that holds is shown.
pub mod printable_status {
    /// Being deleted.
    pub const TERMINATING: &str = "Terminating";
    /// The instance is being stopped.
    pub const STOPPING: &str = "Stopping";
    /// The instance is paused.
    pub const PAUSED: &str = "Paused";
    /// The instance runs.
    pub const RUNNING: &str = "Running";
    /// A claim that it needs does not exist.
    pub const PVC_NOT_FOUND: &str = "ErrorPvcNotFound";
    /// No node can take it.
    pub const UNSCHEDULABLE: &str = "ErrorUnschedulable";
    /// Waits for its volumes.
    pub const PROVISIONING: &str = "Provisioning";
    /// An image can't be pulled.
    pub const ERR_IMAGE_PULL: &str = "ErrImagePull";
    /// An image can't be pulled; trying again later.
    pub const IMAGE_PULL_BACK_OFF: &str = "ImagePullBackOff";
    /// The instance is being started.
    pub const STARTING: &str = "Starting";
    /// Instances fail to start; trying again later.
    pub const CRASH_LOOP_BACK_OFF: &str = "CrashLoopBackOff";
    /// No instance.
    pub const STOPPED: &str = "Stopped";
    /// None of the others.
    pub const UNKNOWN: &str = "Unknown";
}

fn is_false(value: &bool) -> bool {
    !*value
}
