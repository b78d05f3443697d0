//! The Secret with the key pair of a launcher's control port. Pure; who signs stands in [`crate::trust`].
//!
//! It is made before the pod, which cannot start without it, goes with the instance, and is never changed: one launcher,
//! one key. It is never read either, so no right to read people's Secrets is needed; one that a crash left behind has
//! the same names in it and the same CA behind it, and is as good.

use k8s_openapi::api::core::v1::Secret;
use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use kubernest_crds::labels;

use crate::names;
use crate::trust::{self, Issued};

/// Builds the Secret.
pub fn secret(instance: &VirtualMachineInstance, issued: &Issued) -> Secret {
    let uid = instance.uid().unwrap_or_default();
    let own = [
        (labels::MANAGED_BY, labels::MANAGED_BY_VALUE),
        (labels::CREATED_BY, &uid),
    ];
    Secret {
        metadata: ObjectMeta {
            name: Some(names::control_secret(&instance.name_any(), &uid)),
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
