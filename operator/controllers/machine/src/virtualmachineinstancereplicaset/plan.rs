//! What to do next for one set. Pure.
//!
//! | set | instances | step |
//! |---|---|---|
//! | paused, being deleted, or at odds with itself | any | rest |
//! | any other | a matching one without controller, not being deleted | make it the set's own |
//! | | an own one that does not match any more, not being deleted | let it go |
//! | | an own one that is over, [`SPACE`] after it was made or where it is one too many | delete it |
//! | | an own one that is over, earlier | leave it in its replacement's place |
//! | | too many own ones that count | delete those not Ready, then the youngest |
//! | | too few own ones that count | make the missing |
//!
//! Claims go first, since they change what counts; those that are refused keep nothing else from being done.
//!
//! One counts that matches, is not over and not being deleted: a replacement waits for no end. What is over is deleted
//! before others are made, since it may fill a quota.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::ResourceExt;
use kubernest_crds::kubevirt::v1::{VirtualMachineInstance, vmi_conditions};

use super::dereference::{Seen, controller, owns};
use super::validate::Goal;
use crate::conditions::{get, is_false, is_true};
use crate::virtualmachineinstance::{is_final, phase_of, reasons::POD_TERMINATING};

/// Most instances that one reconcile makes, and that it deletes (KubeVirt's burst).
pub const BURST: usize = 250;

/// From an instance's creation to that of its replacement: a guest that ends at once is not made anew as fast as can be.
pub const SPACE: Duration = Duration::from_secs(10);

type Instances = Vec<Arc<VirtualMachineInstance>>;

/// The next step.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Nothing until something changes.
    Rest,
    /// Change whose instances are.
    Claim {
        /// To be the set's own.
        adopt: Instances,
        /// To be nobody's.
        release: Instances,
    },
    /// Change how many there are.
    Scale {
        /// To be deleted.
        delete: Instances,
        /// How many to make.
        create: usize,
    },
}

/// Decides.
pub fn step(seen: &Seen, now: Timestamp) -> Step {
    let Some(goal) = active(seen) else { return Step::Rest };
    let adopt = staying(seen, |one| {
        controller(one).is_none() && goal.selector.matches(one.labels())
    });
    let release = staying(seen, |one| owns(&seen.set, one) && !goal.selector.matches(one.labels()));
    match adopt.is_empty() && release.is_empty() {
        true => scale(seen, now),
        false => Step::Claim { adopt, release },
    }
}

/// Decides, whatever is left to be claimed: only own ones that match are looked at.
pub fn scale(seen: &Seen, now: Timestamp) -> Step {
    let Some(goal) = active(seen) else { return Step::Rest };
    let mut counted = counted(seen, goal);
    let missing = goal.replicas.saturating_sub(counted.len());
    let (mut lingering, mut delete): (Instances, Instances) = ended(seen, goal)
        .into_iter()
        .partition(|one| lingers(one, now).is_some());
    delete.extend(lingering.drain(missing.min(lingering.len())..));
    let create = (missing - lingering.len()).min(BURST);
    if counted.len() > goal.replicas {
        counted.sort_by_cached_key(|one| (is_ready(one), Reverse((born(one), one.name_any()))));
        delete.extend(counted.drain(..counted.len() - goal.replicas).cloned());
    }
    delete.truncate(BURST);
    match (delete.len(), create) {
        (0, 0) => Step::Rest,
        _ => Step::Scale { delete, create },
    }
}

/// What a set wants that does not rest.
fn active(seen: &Seen) -> Option<&Goal> {
    let rests = seen.set.spec.paused || seen.set.metadata.deletion_timestamp.is_some();
    seen.goal.as_ref().ok().filter(|_| !rests)
}

/// Those that are wanted and not being deleted.
fn staying(seen: &Seen, wanted: impl Fn(&VirtualMachineInstance) -> bool) -> Instances {
    let all = seen.instances.iter();
    all.filter(|one| one.metadata.deletion_timestamp.is_none() && wanted(one))
        .cloned()
        .collect()
}

/// Own ones that are over and still there.
fn ended(seen: &Seen, goal: &Goal) -> Instances {
    let own = |one: &VirtualMachineInstance| owns(&seen.set, one) && goal.selector.matches(one.labels());
    staying(seen, |one| own(one) && is_over(one))
}

/// How long the first that lingers does, if nothing else happens.
pub fn wake(seen: &Seen, now: Timestamp) -> Option<Duration> {
    let goal = active(seen)?;
    ended(seen, goal).iter().filter_map(|one| lingers(one, now)).min()
}

/// How long an instance that is over stands in its replacement's place. Clocks that differ by more than that don't matter.
fn lingers(instance: &VirtualMachineInstance, now: Timestamp) -> Option<Duration> {
    let age = now.duration_since(born(instance)?.0).unsigned_abs();
    SPACE
        .checked_sub(age)
        .filter(|left| is_final(phase_of(instance)) && !left.is_zero())
}

/// The instances that count.
pub fn counted<'a>(seen: &'a Seen, goal: &Goal) -> Vec<&'a Arc<VirtualMachineInstance>> {
    let own = seen.instances.iter().filter(|one| owns(&seen.set, one));
    own.filter(|one| goal.selector.matches(one.labels()) && counts(one))
        .collect()
}

/// Whether an own instance is one of those asked for.
pub fn counts(instance: &VirtualMachineInstance) -> bool {
    instance.metadata.deletion_timestamp.is_none() && !is_over(instance)
}

/// Whether an instance is Ready.
pub fn is_ready(instance: &VirtualMachineInstance) -> bool {
    let status = instance.status.as_ref();
    status.is_some_and(|status| is_true(&status.conditions, vmi_conditions::READY))
}

/// Whether the run is over, or will be: its pod is being deleted.
fn is_over(instance: &VirtualMachineInstance) -> bool {
    let status = instance.status.as_ref();
    let ready = status.and_then(|status| is_false(&status.conditions, vmi_conditions::READY));
    is_final(phase_of(instance)) || ready.is_some_and(|ready| ready.reason.as_deref() == Some(POD_TERMINATING))
}

fn born(instance: &VirtualMachineInstance) -> Option<Time> {
    instance.metadata.creation_timestamp.clone()
}

/// All of an instance that a set's decisions look at: if that stays, no set need look again.
pub fn standing(instance: &VirtualMachineInstance) -> impl PartialEq + use<'_> {
    let status = instance.status.as_ref();
    let ready = status.and_then(|status| get(&status.conditions, vmi_conditions::READY));
    let owners: &[OwnerReference] = instance.owner_references();
    (
        is_final(phase_of(instance)),
        ready.map(|ready| (&ready.status, &ready.reason)),
        instance.metadata.deletion_timestamp.is_some(),
        instance.labels(),
        owners,
        &instance.metadata.uid,
    )
}
