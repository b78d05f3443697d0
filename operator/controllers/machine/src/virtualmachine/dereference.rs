//! Finds the instance of a VirtualMachine: in the cache, and before the machine may go in the API server. Decides nothing.

use std::sync::Arc;

use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance};

use crate::Context;

/// The instance of the machine's name, whoever made it.
///
/// # Errors
/// When the API server cannot be asked.
pub async fn instance(
    machine: &VirtualMachine,
    ctx: &Context,
) -> Result<Option<Arc<VirtualMachineInstance>>, kube::Error> {
    let name = machine.name_any();
    let mut reference = ObjectRef::<VirtualMachineInstance>::new(&name);
    reference.namespace = machine.namespace();
    match ctx.stores.instances.get(&reference) {
        Some(instance) => Ok(Some(instance)),
        // Not there yet, or gone: only the API server knows, and a create would tell as well.
        None if machine.metadata.deletion_timestamp.is_some() => {
            let api = Api::namespaced(ctx.client.clone(), machine.namespace().as_deref().unwrap_or_default());
            Ok(api.get_opt(&name).await?.map(Arc::new))
        }
        None => Ok(None),
    }
}

/// Whether the instance is this machine's.
pub fn owns(machine: &VirtualMachine, instance: &VirtualMachineInstance) -> bool {
    let uid = machine.metadata.uid.as_ref();
    instance
        .owner_references()
        .iter()
        .any(|owner| owner.controller == Some(true) && Some(&owner.uid) == uid)
}
