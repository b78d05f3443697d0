//! The Secret with the key pair of a launcher's control port. Pure but for its name; who signs stands in [`crate::trust`].
//!
//! It is made before the pod, which cannot start without it, goes with the instance, and is never changed: one launcher,
//! one key. It is never read either, so no right to read people's Secrets is needed. Therefore one that stands there
//! already is never taken: it may be somebody else's, with a CA and a client of theirs. Each attempt to make a pod has a
//! random name of its own, which only that pod mentions. One that a crash between the two left behind is of no use to
//! anybody and goes with the instance, its owner: people's Secrets may not be deleted either.

use k8s_openapi::api::core::v1::Secret;
use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use kubernest_crds::labels;
use kubernest_pki::{RandomError, random_bytes};

use crate::names;
use crate::trust::{self, Issued};

/// A name for it that nobody had a chance to take.
///
/// # Errors
/// When the system gives no randomness.
pub fn name(instance: &VirtualMachineInstance) -> Result<String, RandomError> {
    let uid = instance.uid().unwrap_or_default();
    Ok(names::control_secret(&instance.name_any(), &uid, random_bytes()?))
}

/// Builds the Secret.
pub fn secret(name: String, instance: &VirtualMachineInstance, issued: &Issued) -> Secret {
    let uid = instance.uid().unwrap_or_default();
    let own = [
        (labels::MANAGED_BY, labels::MANAGED_BY_VALUE),
        (labels::CREATED_BY, &uid),
    ];
    Secret {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: instance.namespace(),
            labels: Some(own.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
            owner_references: instance.controller_owner_ref(&()).map(|mut owner| {
                owner.block_owner_deletion = Some(true);
                vec![owner]
            }),
            ..ObjectMeta::default()
        },
        type_: Some(trust::TLS.to_owned()),
        immutable: Some(true),
        data: Some(trust::pair(&issued.credential, &issued.ca_pem)),
        ..Secret::default()
    }
}
