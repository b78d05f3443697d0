//! The instances that a set's template describes, and their names. Pure: the same set gives the same.

use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};
use kubernest_crds::kubevirt::v1::{
    VMI_FINALIZER, VirtualMachineInstance, VirtualMachineInstanceReplicaSet as ReplicaSet,
};
use sha2::{Digest, Sha256};

/// Characters of a suffix, those of Kubernetes' generated names (apimachinery `pkg/util/rand`): none makes a word.
const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
/// Length of a suffix, and most of what stands before it (apiserver `pkg/storage/names`).
const SUFFIX: usize = 5;
const BASE: usize = 63 - SUFFIX;

/// Builds an instance, finalizer and owner included.
pub fn instance(set: &ReplicaSet, name: String) -> VirtualMachineInstance {
    let template = set.spec.template.metadata.clone().unwrap_or_default();
    let metadata = ObjectMeta {
        name: Some(name),
        namespace: set.namespace(),
        labels: Some(template.labels),
        annotations: Some(template.annotations),
        finalizers: Some(vec![VMI_FINALIZER.to_owned()]),
        owner_references: set.controller_owner_ref(&()).map(|mut owner| {
            owner.block_owner_deletion = Some(true);
            vec![owner]
        }),
        ..ObjectMeta::default()
    };
    VirtualMachineInstance {
        metadata,
        spec: set.spec.template.spec.clone(),
        status: None,
    }
}

/// The names of the set's instances, endless and always the same: the next is the first that is not taken. So whoever
/// makes what is missing in an older list names what was made since, and the API server refuses it. (Only a name that was
/// freed in between tells two lists apart; that two operators read lists at the same time is the Lease's to prevent.)
pub fn names(set: &ReplicaSet) -> impl Iterator<Item = String> {
    let template = set.spec.template.metadata.clone().unwrap_or_default();
    let given = [template.name, template.generate_name].into_iter().flatten();
    let base = given
        .into_iter()
        .find(|name| !name.is_empty())
        .unwrap_or_else(|| set.name_any());
    let base: String = base.chars().take(BASE).collect();
    let uid = set.uid().unwrap_or_default();
    (0_u64..).map(move |index| {
        let digest = Sha256::digest(format!("{uid}/{index}"));
        let letters = digest
            .iter()
            .zip(0..SUFFIX)
            .map(|(byte, _)| usize::from(*byte) % LETTERS.len());
        let suffix: String = letters
            .filter_map(|at| LETTERS.get(at))
            .map(|byte| char::from(*byte))
            .collect();
        format!("{base}{suffix}")
    })
}
