//! What is written for a set: instances are created and deleted, taken and released, its status follows; events tell
//! people. Nothing is decided here but whether a write is needed.

use std::collections::HashSet;
use std::sync::Arc;

use futures::future::join_all;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Patch, PatchParams};
use kube::{Resource, ResourceExt};
use kubernest_crds::kubevirt::v1::{
    VirtualMachineInstance, VirtualMachineInstanceReplicaSet as ReplicaSet, VirtualMachineInstanceReplicaSetStatus,
    vmirs_conditions,
};
use serde_json::json;

use super::dereference::{Seen, owns};
use super::plan::counts;
use super::{Error, build, reasons};
use crate::Context;
use crate::conditions::is_true;
use crate::names::MANAGER;
use crate::write::{self, Created};

/// Writes at the same time for one set.
const PARALLEL: usize = 16;

type Instances = [Arc<VirtualMachineInstance>];

/// What became of a claim; those that it was granted for are in `seen`.
#[derive(Debug, Default)]
pub struct Claimed {
    /// One changed or went meanwhile. Nothing else need change that wakes the set.
    pub missed: bool,
    /// The first that was refused.
    pub refused: Option<Error>,
}

/// Makes instances the set's own, and lets others go; one that is refused keeps none of the others waiting.
pub async fn claim(seen: &mut Seen, adopt: &Instances, release: &Instances, ctx: &Context) -> Claimed {
    let set = seen.set.clone();
    let own = set.controller_owner_ref(&()).map(|mut owner| {
        owner.block_owner_deletion = Some(true);
        owner
    });
    let adopt = adopt.iter().map(|one| {
        let owners = one.owner_references().iter().cloned().chain(own.clone());
        (one, owners.collect::<Vec<_>>(), "instance taken")
    });
    let release = release.iter().map(|one| {
        let owners = one.owner_references().iter();
        let others = owners.filter(|owner| Some(&owner.uid) != set.metadata.uid.as_ref());
        (one, others.cloned().collect(), "instance released")
    });
    let mut claimed = Claimed::default();
    for (one, owners, done) in adopt.chain(release) {
        match set_owners(one, owners, ctx).await {
            Ok(Some(written)) => {
                tracing::info!(instance = one.name_any(), "{done}");
                seen.replace(written);
            }
            Ok(None) => claimed.missed = true,
            Err(error) => {
                let answered = matches!(
                    error,
                    Error::Claim {
                        source: kube::Error::Api(_),
                        ..
                    }
                );
                if claimed.refused.is_none() {
                    warn(&set, &error, "ClaimInstance", ctx).await;
                    claimed.refused = Some(error);
                }
                // The others would fare no better.
                if !answered {
                    break;
                }
            }
        }
    }
    claimed
}

/// Bound to what was seen: the labels that decided may have changed. `None` when they may have.
async fn set_owners(
    one: &VirtualMachineInstance,
    owners: Vec<OwnerReference>,
    ctx: &Context,
) -> Result<Option<VirtualMachineInstance>, Error> {
    let (uid, version) = (one.uid(), one.resource_version());
    let change = json!({"metadata": {"uid": uid, "resourceVersion": version, "ownerReferences": owners}});
    let params = PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let instances = write::api::<VirtualMachineInstance>(&ctx.client, one);
    let instance = one.name_any();
    match instances.patch(&instance, &params, &Patch::Merge(change)).await {
        Ok(written) => Ok(Some(written)),
        Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => Ok(None),
        Err(source) => Err(Error::Claim { instance, source }),
    }
}

/// Deletes, then creates; `seen` has afterwards what is there.
pub async fn scale(seen: &mut Seen, delete: &Instances, create: usize, ctx: &Context) -> Result<(), Error> {
    for batch in delete.chunks(PARALLEL) {
        let outcomes = join_all(batch.iter().map(|one| delete_one(&seen.set, one, ctx))).await;
        let gone: HashSet<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
        seen.instances.retain(|one| !gone.contains(&one.metadata.uid));
        outcomes.into_iter().collect::<Result<Vec<_>, _>>()?;
    }
    let mut taken: HashSet<String> = seen.instances.iter().chain(delete).map(|one| one.name_any()).collect();
    let set = seen.set.clone();
    let mut names = build::names(&set).filter(|name| taken.insert(name.clone()));
    // As many again each time, so that what is refused is not asked for often.
    let (mut missing, mut batch) = (create, 1);
    while missing > 0 {
        let next: Vec<String> = names.by_ref().take(batch.min(missing)).collect();
        let outcomes = join_all(next.into_iter().map(|name| create_one(&set, name, ctx))).await;
        let made = outcomes
            .iter()
            .filter_map(|outcome| outcome.as_ref().ok().cloned().flatten());
        let before = seen.instances.len();
        seen.instances.extend(made.map(Arc::new));
        missing = missing.saturating_sub(seen.instances.len() - before);
        outcomes.into_iter().collect::<Result<Vec<_>, _>>()?;
        batch = (batch * 2).min(PARALLEL);
    }
    Ok(())
}

/// Deletes one; its own finalizer holds it until its process is gone. Returns its uid.
async fn delete_one(set: &ReplicaSet, one: &VirtualMachineInstance, ctx: &Context) -> Result<Option<String>, Error> {
    let (name, uid) = (one.name_any(), one.uid());
    match ctx.applier.delete(one).await {
        Ok(()) => {
            tracing::info!(instance = name, "instance is deleted");
            let note = format!("Deleted the instance {name} ({})", uid.clone().unwrap_or_default());
            ctx.events.normal(set, reasons::DELETED, "DeleteInstance", &note).await;
            Ok(uid)
        }
        Err(error) => {
            let error = Error::Delete(error);
            warn(set, &error, "DeleteInstance", ctx).await;
            Err(error)
        }
    }
}

/// Creates one, or finds the one that was made meanwhile; `None` when its name is of no use.
async fn create_one(set: &ReplicaSet, name: String, ctx: &Context) -> Result<Option<VirtualMachineInstance>, Error> {
    match write::create(&ctx.client, &build::instance(set, name)).await {
        Ok(Created::New(one)) => {
            tracing::info!(instance = one.name_any(), "instance created");
            let note = format!("Created the instance {}", one.name_any());
            ctx.events.normal(set, reasons::CREATED, "CreateInstance", &note).await;
            Ok(Some(one))
        }
        Ok(Created::Existing(one)) => Ok(Some(one).filter(|one| owns(set, one) && counts(one))),
        Ok(Created::Lost) => Ok(None),
        Err(error) => {
            let error = Error::Create(error);
            warn(set, &error, "CreateInstance", ctx).await;
            Err(error)
        }
    }
}

async fn warn(set: &ReplicaSet, error: &Error, action: &str, ctx: &Context) {
    if let Some(trouble) = error.trouble() {
        ctx.events.warning(set, trouble.reason, action, &trouble.message).await;
    }
}

/// Writes the status if it differs.
pub async fn status(
    set: &ReplicaSet,
    wanted: &VirtualMachineInstanceReplicaSetStatus,
    ctx: &Context,
) -> Result<(), Error> {
    if set.status.as_ref() == Some(wanted) {
        return Ok(());
    }
    let Some(written) = write::status(&ctx.client, set, wanted).await.map_err(Error::Status)? else {
        return Ok(());
    };
    ctx.fresh.wrote(&written);
    let paused =
        |status: &VirtualMachineInstanceReplicaSetStatus| is_true(&status.conditions, vmirs_conditions::REPLICA_PAUSED);
    match (set.status.as_ref().is_some_and(paused), paused(wanted)) {
        (false, true) => ctx.events.normal(set, reasons::NOW_PAUSED, "Pause", "Paused").await,
        (true, false) => ctx.events.normal(set, reasons::NOW_RESUMED, "Resume", "Resumed").await,
        _ => {}
    }
    Ok(())
}
