//! Finds the instances of a set: in the cache, and before anything is made or deleted in the API server. Decides nothing.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use kubernest_crds::Selector;
use kubernest_crds::kubevirt::v1::{VirtualMachineInstance, VirtualMachineInstanceReplicaSet as ReplicaSet};

use super::validate::{self, Goal, Obstacle};
use crate::Context;
use crate::write;

/// A set and what is known of it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The set.
    pub set: Arc<ReplicaSet>,
    /// What it wants.
    pub goal: Result<Goal, Obstacle>,
    /// Its own instances, and those that it may take.
    pub instances: Vec<Arc<VirtualMachineInstance>>,
}

impl Seen {
    /// Picks from the instances of the set's namespace.
    pub fn new(set: Arc<ReplicaSet>, instances: Vec<Arc<VirtualMachineInstance>>) -> Self {
        let goal = validate::goal(&set.spec);
        let selector = goal.as_ref().ok().map(|goal| &goal.selector);
        let free = |one: &VirtualMachineInstance| {
            controller(one).is_none() && selector.is_some_and(|selector| selector.matches(one.labels()))
        };
        let instances = instances.into_iter().filter(|one| owns(&set, one) || free(one));
        let instances = instances.collect();
        Self { set, goal, instances }
    }

    /// Puts what was written in the place of what was seen.
    pub fn replace(&mut self, written: VirtualMachineInstance) {
        let uid = written.uid();
        if let Some(place) = self.instances.iter_mut().find(|one| one.uid() == uid) {
            *place = Arc::new(written);
        }
    }
}

/// What the caches know.
pub fn cached(set: Arc<ReplicaSet>, ctx: &Context) -> Seen {
    let all = ctx.stores.instances.state().into_iter();
    let instances = all
        .filter(|one| one.metadata.namespace == set.metadata.namespace)
        .collect();
    Seen::new(set, instances)
}

/// What the API server has now; `None` when the set is gone.
///
/// Own instances that match no more are in no list of those that do; they are as the cache has them, and writes to them
/// are bound to that version.
///
/// # Errors
/// When the API server cannot be asked.
pub async fn live(seen: &Seen, ctx: &Context) -> Result<Option<Seen>, kube::Error> {
    let sets: Api<ReplicaSet> = write::api(&ctx.client, &*seen.set);
    let found = sets.get_opt(&seen.set.name_any()).await?;
    let Some(set) = found.filter(|found| found.uid() == seen.set.uid()) else {
        return Ok(None);
    };
    let Ok(goal) = validate::goal(&set.spec) else {
        return Ok(Some(Seen::new(Arc::new(set), seen.instances.clone())));
    };
    let namespace = set.namespace().unwrap_or_default();
    let instances: Api<VirtualMachineInstance> = Api::namespaced(ctx.client.clone(), &namespace);
    let list = instances
        .list(&ListParams::default().labels(&goal.selector.to_string()))
        .await?;
    let mut all: Vec<_> = list.items.into_iter().map(Arc::new).collect();
    let astray = seen.instances.iter().filter(|one| !goal.selector.matches(one.labels()));
    let astray: Vec<_> = astray
        .filter(|one| all.iter().all(|other| other.uid() != one.uid()))
        .cloned()
        .collect();
    all.extend(astray);
    Ok(Some(Seen::new(Arc::new(set), all)))
}

/// Whose the instance is.
pub fn controller(instance: &VirtualMachineInstance) -> Option<&OwnerReference> {
    instance
        .owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true))
}

/// Whether the instance is this set's.
pub fn owns(set: &ReplicaSet, instance: &VirtualMachineInstance) -> bool {
    controller(instance).is_some_and(|owner| Some(&owner.uid) == set.metadata.uid.as_ref())
}

/// Whether the set may take such an instance, which is nobody's.
pub fn wants(set: &ReplicaSet, instance: &VirtualMachineInstance) -> bool {
    let selector = Selector::new(&set.spec.selector);
    set.namespace() == instance.namespace() && selector.is_ok_and(|selector| selector.matches(instance.labels()))
}
