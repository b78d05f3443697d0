//! The launcher pod's readiness gate, by which a guest that stands still is in no Service (KubeVirt's gate and words).
//!
//! Pure. Open from the start, so that it costs a pod no time; that of a guest that is started paused stays shut. The kubelet
//! reads it and says in the pod's readiness what follows. A pod without it, of an earlier version, is left alone.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition, PodReadinessGate};
use kubernest_crds::kubevirt::v1::{
    UNPAUSED, VirtualMachineInstance, VirtualMachineInstanceStatus, phase, vmi_conditions,
};

use super::status::{pod_condition, starts_paused};
use super::{ending, is_final};
use crate::conditions::{self, FALSE, TRUE, is_true};

/// The gates of a new pod.
pub fn gates() -> Vec<PodReadinessGate> {
    vec![PodReadinessGate {
        condition_type: UNPAUSED.to_owned(),
    }]
}

/// Whether the pod says that its guest stands still.
pub fn is_shut(pod: &Pod) -> bool {
    pod_condition(pod, UNPAUSED).is_some_and(|condition| condition.status == FALSE)
}

/// What the gate's condition is to become, with `status` as the instance's; `None` where it says so, or no longer matters.
pub fn change(
    instance: &VirtualMachineInstance,
    status: &VirtualMachineInstanceStatus,
    pod: &Pod,
    now: Timestamp,
) -> Option<PodCondition> {
    let phase = status.phase.as_deref().unwrap_or_default();
    let gates = pod.spec.iter().flat_map(|spec| spec.readiness_gates.iter().flatten());
    let gated = gates.into_iter().any(|gate| gate.condition_type == UNPAUSED);
    let goes = instance.metadata.deletion_timestamp.is_some() || pod.metadata.deletion_timestamp.is_some();
    if !gated || goes || is_final(phase) || pod.status.as_ref().is_some_and(ending::is_over) {
        return None;
    }
    let open = pod_condition(pod, UNPAUSED).is_some_and(|condition| condition.status == TRUE);
    let stands_still =
        is_true(&status.conditions, vmi_conditions::PAUSED) || phase != phase::RUNNING && starts_paused(instance);
    let (status, reason, message) = match (open, stands_still) {
        (true, true) => (FALSE, "Paused", "the virtual machine is paused"),
        (false, false) => (TRUE, "NotPaused", "the virtual machine is not paused"),
        _ => return None,
    };
    Some(PodCondition {
        type_: UNPAUSED.to_owned(),
        status: status.to_owned(),
        last_transition_time: Some(conditions::seconds(now)),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        ..PodCondition::default()
    })
}
