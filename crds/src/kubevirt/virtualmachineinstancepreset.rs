//! VirtualMachineInstancePreset: settings that instances get when they are made, by their labels. KubeVirt deprecated it;
//! it is kept for manifests that use it. What one can cost is bounded: a name has 63 characters at most (it becomes part of
//! an annotation, which no instance could have otherwise), a spec 32 KiB, and an instance gets 32 of them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::domain::DomainSpec;

/// Annotation of an instance that wants no preset, with the value `true` (KubeVirt's name).
pub const PRESET_EXCLUDE: &str = "virtualmachineinstancepresets.admission.kubevirt.io/exclude";
/// What the annotation of an instance that got a preset begins with; the preset's name follows (KubeVirt's name).
pub const PRESET_APPLIED: &str = "virtualmachinepreset.kubevirt.io/";
/// Annotation of an instance that says which presets were left out because they contradict it, and in what.
pub const PRESET_CONFLICTS: &str = "kubernest.io/preset-conflicts";

/// Settings, and whose they are.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstancePreset",
    plural = "virtualmachineinstancepresets",
    namespaced,
    shortname = "vmipreset",
    shortname = "vmipresets",
    category = "all",
    derive = "PartialEq",
    derive = "Default",
    doc = "Settings that new virtual machine instances with matching labels get. Deprecated by KubeVirt."
)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineInstancePresetSpec {
    /// Labels of the instances that get it; an empty selector means all of the namespace.
    pub selector: LabelSelector,
    /// What they get, where they say nothing themselves: `resources.requests`, `cpu`, `firmware`, `clock`, `features` and
    /// `devices.watchdog`. Nothing else is applied. The preset's name has 63 characters at most, its spec 32 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomainSpec>,
}
