//! The instance that a VirtualMachine's template describes. Pure: the same machine gives the same instance.

use std::collections::BTreeMap;

use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};
use kubernest_crds::kubevirt::v1::{
    VMI_FINALIZER, VirtualMachine, VirtualMachineInstance, VirtualMachineInstanceSpec, start_strategy,
};
use sha2::{Digest, Sha256};

use crate::names::{self, ANNOTATION_TEMPLATE_HASH, ANNOTATION_VM_GENERATION};

/// Builds the instance, finalizer and owner included; `paused` lets the guest stand still at first, which is no change of
/// the template.
///
/// # Errors
/// When the template cannot be written as JSON.
pub fn instance(machine: &VirtualMachine, paused: bool) -> Result<VirtualMachineInstance, serde_json::Error> {
    let template = machine.spec.template.metadata.clone().unwrap_or_default();
    let mut annotations = template.annotations;
    annotations.extend(BTreeMap::from([
        (
            ANNOTATION_VM_GENERATION.to_owned(),
            machine.metadata.generation.unwrap_or_default().to_string(),
        ),
        (
            ANNOTATION_TEMPLATE_HASH.to_owned(),
            template_hash(&machine.spec.template.spec)?,
        ),
    ]));
    let metadata = ObjectMeta {
        name: Some(machine.name_any()),
        namespace: machine.namespace(),
        labels: Some(template.labels),
        annotations: Some(annotations),
        finalizers: Some(vec![VMI_FINALIZER.to_owned()]),
        owner_references: machine.controller_owner_ref(&()).map(|mut owner| {
            owner.block_owner_deletion = Some(true);
            vec![owner]
        }),
        ..ObjectMeta::default()
    };
    let mut spec = machine.spec.template.spec.clone();
    // One that is drawn anew at each start would be another computer to its guest.
    let firmware = spec.domain.firmware.get_or_insert_default();
    firmware.uuid = firmware.uuid.take().or_else(|| machine.uid());
    if paused {
        spec.start_strategy = Some(start_strategy::PAUSED.to_owned());
    }
    Ok(VirtualMachineInstance {
        metadata,
        spec,
        status: None,
    })
}

/// Tells two template specs apart; fields are written in a fixed order, maps sorted.
///
/// # Errors
/// When the spec cannot be written as JSON.
pub fn template_hash(spec: &VirtualMachineInstanceSpec) -> Result<String, serde_json::Error> {
    Ok(names::hex(&Sha256::digest(serde_json::to_vec(spec)?)[..8]))
}
