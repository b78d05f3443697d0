//! Taking things away: a slot, or the whole cluster. Needs a client.
//!
//! A machine goes first, and nothing of its slot goes before it is surely gone: a disk must not be given back, nor an
//! address, while a guest may still use it. A VirtualMachine is gone only when its instance's process is (machine half).

use std::collections::BTreeSet;

use kube::{Api, ResourceExt, api::DeleteParams, core::DynamicObject};
use kubernest_crds::TenantCluster;
use kubernest_runtime::{Applier, ApplyError};

use super::{
    build::{
        network::nad_kind,
        slots::{claim_name, secret_name},
    },
    dereference::{self, DereferenceError, Observed},
    inner::{self, InnerError},
    link::Link,
};

/// Machines that a message names at most.
const NAMED: usize = 5;

/// Why something was not taken away.
#[derive(Debug, thiserror::Error)]
pub enum TeardownError {
    /// What exists can't be read.
    #[error("what is left can't be read")]
    Read(#[source] DereferenceError),
    /// A deletion was refused.
    #[error("deleting failed")]
    Delete(#[source] ApplyError),
    /// The deletion of the tenant network was refused.
    #[error("deleting the NetworkAttachmentDefinition failed")]
    Attachment(#[source] kube::Error),
    /// The tenant's node.
    #[error("the node can't be removed from the tenant")]
    Node(#[source] InnerError),
}

/// Removes slots that exist and are not in `wanted`, as far as that is possible now; those that still are there.
pub async fn surplus(
    applier: &Applier,
    observed: &Observed,
    wanted: &BTreeSet<String>,
    link: Option<&Link>,
) -> Result<Vec<String>, TeardownError> {
    let mut leaving = Vec::new();
    for slot in observed.slots().into_keys().filter(|slot| !wanted.contains(slot)) {
        if let Some(machine) = observed.machines.get(&slot) {
            applier.delete(machine).await.map_err(TeardownError::Delete)?;
        } else if let Some(link) = link.filter(|link| link.view().version.is_some()) {
            // The Secret is the record that there is something to remove: it goes last.
            inner::delete_node(link, &slot).await.map_err(TeardownError::Node)?;
            if let Some(claim) = observed.claims.get(&claim_name(&slot)) {
                applier.delete(claim).await.map_err(TeardownError::Delete)?;
            }
            if let Some(secret) = observed.secrets.get(&secret_name(&slot)) {
                applier.delete(secret).await.map_err(TeardownError::Delete)?;
            }
        }
        leaving.push(slot);
    }
    Ok(leaving)
}

/// Takes the cluster down as far as that is possible now; what is waited for, or nothing when all is gone.
pub async fn cluster(applier: &Applier, cluster: &TenantCluster) -> Result<Option<String>, TeardownError> {
    let observed = dereference::dereference(applier.client(), cluster)
        .await
        .map_err(TeardownError::Read)?;
    let delete = TeardownError::Delete;
    for machine in observed.machines.values() {
        applier.delete(machine).await.map_err(delete)?;
    }
    if !observed.machines.is_empty() {
        return Ok(Some(names("virtual machines", observed.machines.keys())));
    }
    for claim in observed.claims.values() {
        applier.delete(claim).await.map_err(delete)?;
    }
    for secret in observed.secrets.values() {
        applier.delete(secret).await.map_err(delete)?;
    }
    for name in observed.attachments.keys() {
        delete_attachment(applier, cluster, name).await?;
    }
    for service in observed.services.values() {
        applier.delete(service).await.map_err(delete)?;
    }
    // Finalizers of others (kubernetes.io/pvc-protection) may hold some; read again what really is left.
    let left = dereference::dereference(applier.client(), cluster)
        .await
        .map_err(TeardownError::Read)?;
    for (what, keys) in [
        ("claims", left.claims.keys().collect::<Vec<_>>()),
        ("Secrets", left.secrets.keys().collect()),
        ("NetworkAttachmentDefinitions", left.attachments.keys().collect()),
        ("Services", left.services.keys().collect()),
    ] {
        if !keys.is_empty() {
            return Ok(Some(names(what, keys.into_iter())));
        }
    }
    // Users may have machines of their own on the network: they must not find themselves on that of whoever has the VNI
    // next. (A pod that joined it in another way is unplugged by its node's agent.)
    let strangers = dereference::strangers(applier.client(), cluster, &cluster.name_any())
        .await
        .map_err(TeardownError::Read)?;
    if !strangers.is_empty() {
        let what = "virtual machines that users put on its network (stop or delete them)";
        return Ok(Some(names(what, strangers.iter())));
    }
    // Last, so that nobody gets the VNI while anything of ours could still use it.
    let all = dereference::all_allocations(applier.client())
        .await
        .map_err(TeardownError::Read)?;
    let uid = cluster.uid().unwrap_or_default();
    for allocation in all.iter().filter(|allocation| allocation.spec.owner.uid == uid) {
        applier.delete(allocation).await.map_err(delete)?;
    }
    Ok(None)
}

async fn delete_attachment(applier: &Applier, cluster: &TenantCluster, name: &str) -> Result<(), TeardownError> {
    let namespace = cluster.namespace().unwrap_or_default();
    let api = Api::<DynamicObject>::namespaced_with(applier.client().clone(), &namespace, &nad_kind());
    match api.delete(name, &DeleteParams::background()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other.map(drop).map_err(TeardownError::Attachment),
    }
}

fn names<'a>(what: &str, names: impl Iterator<Item = &'a String>) -> String {
    let all: Vec<&str> = names.map(String::as_str).collect();
    let more = if all.len() > NAMED {
        format!(" and {} more", all.len() - NAMED)
    } else {
        String::new()
    };
    format!(
        "waits for {what} to be gone: {}{more}",
        all.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ")
    )
}
