//! From a validated cluster and what exists to the objects that should: pure, without a client.

pub mod addons;
pub mod bootstrap;
pub mod flags;
pub mod kubeconfig;
pub mod network;
pub mod pki;
pub mod policies;
pub mod slots;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;
use kubernest_crds::{TenantCluster, labels};

use super::validate::Validated;

/// Labels of everything that belongs to the cluster.
pub fn cluster_labels(cluster: &str) -> BTreeMap<String, String> {
    BTreeMap::from([
        (labels::CLUSTER.to_owned(), cluster.to_owned()),
        (labels::MANAGED_BY.to_owned(), labels::MANAGED_BY_VALUE.to_owned()),
    ])
}

/// Metadata of a namespaced object of the cluster: labelled, and owned so that its changes wake the controller.
pub fn metadata(valid: &Validated, name: String) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(valid.namespace.clone()),
        labels: Some(cluster_labels(&valid.name)),
        owner_references: Some(vec![OwnerReference {
            api_version: TenantCluster::api_version(&()).into_owned(),
            kind: TenantCluster::kind(&()).into_owned(),
            name: valid.name.clone(),
            uid: valid.uid.clone(),
            controller: Some(true),
            // Deletion is ours (finalizer), in our order; the garbage collector only cleans up after us.
            block_owner_deletion: Some(false),
        }]),
        ..ObjectMeta::default()
    }
}
