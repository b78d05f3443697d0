//! Back-off between attempts to start: how a failed instance is counted, and for how long no new one is made.
//!
//! 10 s after the first failure, doubling to 300 s (KubeVirt's bounds). A pod deleted, evicted or lost with its node is no
//! failure of the machine, and neither is a guest that ended well. A failure after a run of at least 300 s starts the
//! count anew: whatever ails it is not the start. Pure.

use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt;
use kubernest_crds::kubevirt::v1::{StartFailure, VirtualMachineInstance, phase};

use crate::conditions::seconds;
use crate::virtualmachineinstance::{is_disruption, phase_of};

/// Wait after the first failure, in seconds.
const FIRST_SECONDS: i64 = 10;
/// Longest wait, in seconds; a run of this length clears the count.
pub const MOST_SECONDS: i64 = 300;

/// The count after looking at the instance (`None`: there is none).
pub fn count(
    before: Option<&StartFailure>,
    instance: Option<&VirtualMachineInstance>,
    now: Timestamp,
) -> Option<StartFailure> {
    let Some(instance) = instance else {
        return before.cloned();
    };
    let uid = instance.uid();
    let reason = instance
        .status
        .as_ref()
        .and_then(|status| status.reason.as_deref())
        .unwrap_or_default();
    match phase_of(instance) {
        // A failure is counted before its instance is deleted; one that comes after was asked for, whatever its exit code.
        _ if instance.metadata.deletion_timestamp.is_some() => before.cloned(),
        phase::FAILED if before.is_some_and(|before| before.last_failed_vmi_uid == uid) => before.cloned(),
        phase::FAILED if is_disruption(reason) => before.cloned(),
        phase::FAILED => {
            let lasted = started(instance)
                .zip(ended(instance))
                .is_some_and(|(from, to)| to - from >= MOST_SECONDS);
            let previous = before
                .filter(|_| !lasted)
                .map_or(0, |before| before.consecutive_fail_count);
            let failures = previous.saturating_add(1);
            let from = ended(instance)
                .and_then(|second| Timestamp::from_second(second).ok())
                .unwrap_or(now);
            let retry = from.as_second().saturating_add(delay_seconds(failures));
            Some(StartFailure {
                consecutive_fail_count: failures,
                last_failed_vmi_uid: uid,
                retry_after_timestamp: Timestamp::from_second(retry).ok().map(seconds),
            })
        }
        phase::SUCCEEDED => None,
        phase::RUNNING if settles_in(instance, now).is_none() => None,
        _ => before.cloned(),
    }
}

/// How long until the running instance has run long enough to clear the count; `None` once it has.
pub fn settles_in(instance: &VirtualMachineInstance, now: Timestamp) -> Option<Duration> {
    left(started(instance)?.saturating_add(MOST_SECONDS), now)
}

/// How long no instance is to be made; `None` when one may.
pub fn wait(failure: Option<&StartFailure>, now: Timestamp) -> Option<Duration> {
    left(failure?.retry_after_timestamp.as_ref()?.0.as_second(), now)
}

fn left(second: i64, now: Timestamp) -> Option<Duration> {
    let until = Timestamp::from_second(second).ok()?;
    Duration::try_from(until.duration_since(now))
        .ok()
        .filter(|left| !left.is_zero())
}

fn delay_seconds(failures: i32) -> i64 {
    let doublings = u32::try_from(failures.saturating_sub(1)).unwrap_or_default().min(16);
    (FIRST_SECONDS << doublings).min(MOST_SECONDS)
}

fn started(instance: &VirtualMachineInstance) -> Option<i64> {
    since(instance, phase::RUNNING)
}

fn ended(instance: &VirtualMachineInstance) -> Option<i64> {
    since(instance, phase::FAILED)
}

fn since(instance: &VirtualMachineInstance, phase: &str) -> Option<i64> {
    let transitions = &instance.status.as_ref()?.phase_transition_timestamps;
    let transition = transitions.iter().find(|transition| transition.phase == phase)?;
    Some(transition.phase_transition_timestamp.0.as_second())
}
