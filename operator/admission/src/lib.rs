//! Admission decisions: what of a TenantCluster or of KubeVirt's kinds is refused, field by field, and what a new
//! instance gets that it does not say itself.
//!
//! Pure functions of the object, the object before, and what this installation can do. No client, no clock, no I/O:
//! whether a StorageClass or Secret exists is the controllers' to find out.

mod addresses;
mod decision;
mod machine;
mod names;
mod parse;
mod path;
mod tenantcluster;

pub use addresses::MACHINE_LINK;
pub use decision::{Cause, Decision, Report, reasons};
pub use machine::{MAX_PRESET_NAME, Mutation, Preset, complete as complete_machine, mutate};

use ipnet::Ipv4Net;
use serde_json::Value;

/// What this installation can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    /// Kubernetes versions that there is a node image for, as `v1.35.4`.
    pub versions: Vec<String>,
    /// Addresses that tenants' nodes get theirs from.
    pub node_cidr_pool: Ipv4Net,
    /// Domain that host names of tenants end in.
    pub base_domain: String,
}

/// An object to decide upon.
#[derive(Clone, Copy, Debug)]
pub struct Review<'a> {
    /// The object as it shall become.
    pub object: &'a Value,
    /// The object as it is; `None` when it is created.
    pub old: Option<&'a Value>,
    /// The request is Kubernest's own, so rules that only bind users don't apply.
    pub own_request: bool,
}

impl Review<'_> {
    /// Nothing of the spec changes, or the object is on its way out: refusing it would only get in the way of
    /// finalizers and metadata.
    fn is_moot(&self) -> bool {
        let deleting = self
            .object
            .pointer("/metadata/deletionTimestamp")
            .is_some_and(|time| !time.is_null());
        deleting || self.old.is_some_and(|old| old.get("spec") == self.object.get("spec"))
    }
}

/// The spec of a VirtualMachineInstance with its gaps filled as KubeVirt fills them; `firmware.uuid` apart, which is drawn
/// by chance.
pub fn defaulted_instance(object: &Value) -> Option<Value> {
    let mut spec = object.get("spec")?.clone();
    machine::fill_defaults(&mut spec, machine::BRIDGE);
    Some(spec)
}

/// Whether there are rules for a kind.
pub fn has_rules(kind: &str) -> bool {
    rules(kind).is_some()
}

fn rules(kind: &str) -> Option<fn(&Installation, Review<'_>) -> Decision> {
    Some(match kind {
        "TenantCluster" => tenantcluster::decide,
        "VirtualMachine" => machine::decide_virtual_machine,
        "VirtualMachineInstance" => machine::decide_virtual_machine_instance,
        "VirtualMachineInstancePreset" => machine::decide_preset,
        "VirtualMachineInstanceReplicaSet" => machine::decide_replica_set,
        _ => return None,
    })
}

/// Decides upon an object by its kind; `None` for kinds that Kubernest has no rules for.
pub fn admit(installation: &Installation, kind: &str, review: Review<'_>) -> Option<Decision> {
    let decide = rules(kind)?;
    if let Some(refused) = machine::guard(kind, review) {
        return Some(refused);
    }
    if review.is_moot() {
        return Some(Decision::default());
    }
    Some(decide(installation, review))
}

#[cfg(test)]
mod tests;
