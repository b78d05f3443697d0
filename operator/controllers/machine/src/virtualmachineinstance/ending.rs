//! Reads from a launcher pod whether the run is over, why, and whether its process is surely gone; and how it is ended.
//!
//! Pure. A pod that was deleted, evicted or lost with its node under a running guest is no fault of the guest: those
//! reasons are kept apart ([`is_disruption`]) so that the machine is made again without back-off.

use k8s_openapi::api::core::v1::{ContainerStateTerminated, Pod, PodStatus};
use kubernest_crds::kubevirt::v1::{VirtualMachineInstance, phase};
use kubernest_domain::{Termination, TerminationReason};

use super::build::{self, CONTAINER};
use super::reasons;
use crate::stores::NodeState;

/// Pod status reasons by which the kubelet ends a healthy pod for the node's sake (pkg/kubelet/eviction, nodeshutdown,
/// preemption).
const NODE_REASONS: [&str; 4] = ["Evicted", "Preempting", "Terminated", "NodeShutdown"];

/// Reason of a run that ended as asked.
const STOPPED: &str = "Stopped";

/// What is known of a run whose reason is [`reasons::OOM_KILLED`].
const KILLED: &str =
    "a process of the launcher pod was killed, as the pod took more memory than its limit or than its node had";

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Succeeded or Failed.
    pub phase: &'static str,
    /// One word, of [`reasons`] or the pod's own.
    pub reason: String,
    /// A sentence.
    pub message: String,
    /// The guest's last lines, oldest first.
    pub serial: Vec<String>,
}

impl Ending {
    fn failed(reason: &str, message: String) -> Self {
        Self {
            phase: phase::FAILED,
            reason: reason.to_owned(),
            message,
            serial: Vec::new(),
        }
    }
}

/// How the run ended, if it did. `pod` is `None` when the pod that the instance had is gone; `asked` when the instance
/// itself is being deleted.
pub fn ending(pod: Option<&Pod>, node: NodeState, asked: bool) -> Option<Ending> {
    let Some(pod) = pod else {
        return Some(Ending::failed(
            reasons::POD_DELETED,
            "the launcher pod was deleted".to_owned(),
        ));
    };
    let status = pod.status.clone().unwrap_or_default();
    let over = is_over(&status);
    // Whoever evicts or preempts a pod says so in it, and deletes it.
    if over && let Some(why) = disruption(&status) {
        return Some(Ending::failed(reasons::POD_EVICTED, why));
    }
    if !asked && over && pod.metadata.deletion_timestamp.is_some() {
        return Some(Ending::failed(
            reasons::POD_DELETED,
            "the launcher pod was deleted".to_owned(),
        ));
    }
    if over {
        let ending = by_termination(&status);
        return Some(if ending.reason == STOPPED && nobody_asked(pod) {
            let message = "the guest did not answer its liveness probe and was stopped".to_owned();
            Ending {
                serial: ending.serial,
                ..Ending::failed(reasons::PROBE_FAILED, message)
            }
        } else {
            ending
        });
    }
    (node == NodeState::Dead).then(|| {
        let node = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.as_deref())
            .unwrap_or_default();
        Ending::failed(
            reasons::NODE_LOST,
            format!("node {node} is gone or was declared out of service"),
        )
    })
}

/// With how many seconds of grace the pod of an instance that is over, or shall be, is to be deleted now; `None` when it
/// is not: it goes already, or is kept for its log.
///
/// A pod that goes already is deleted again when its instance was given less time since (a forced stop after one that
/// hangs); Kubernetes only ever shortens.
pub fn deletion(instance: &VirtualMachineInstance, pod: &Pod, node: NodeState) -> Option<u32> {
    let asked = instance.metadata.deletion_timestamp.is_some();
    let grace = grace(instance, pod);
    if pod.metadata.deletion_timestamp.is_some() {
        let left = pod.metadata.deletion_grace_period_seconds;
        return (asked && left.is_some_and(|left| left > i64::from(grace))).then_some(grace);
    }
    (asked || !surely_ended(pod, node)).then_some(grace)
}

/// What the pod is given: the guest's time and the launcher's own.
///
/// Less than the pod was made with means that the instance was given less time since. The launcher does not know of that
/// and goes by its own, so time of its own would only be more for the guest. Never 0, by which Kubernetes would forget
/// the pod while its process runs.
fn grace(instance: &VirtualMachineInstance, pod: &Pod) -> u32 {
    let whole = build::pod_grace_seconds(&instance.spec);
    let made_with = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    let grace = if made_with.is_some_and(|made_with| whole < made_with) {
        build::guest_grace_seconds(&instance.spec).max(1)
    } else {
        whole
    };
    u32::try_from(grace).unwrap_or(u32::MAX)
}

/// A container that was told to stop though its pod stays: the kubelet does that for a liveness probe only.
fn nobody_asked(pod: &Pod) -> bool {
    let mut containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    pod.metadata.deletion_timestamp.is_none() && containers.any(|container| container.liveness_probe.is_some())
}

/// Whether a failed instance with this reason was disturbed from outside, rather than failing by itself.
pub fn is_disruption(reason: &str) -> bool {
    [reasons::POD_DELETED, reasons::POD_EVICTED, reasons::NODE_LOST].contains(&reason)
}

/// Whether no process of the pod can be running: it is over and no container runs, or its node is off.
///
/// The phase alone proves nothing: Kubernetes' pod garbage collector sets it for nodes that do not answer.
pub fn surely_ended(pod: &Pod, node: NodeState) -> bool {
    let status = pod.status.clone().unwrap_or_default();
    let running = |state: &k8s_openapi::api::core::v1::ContainerStatus| {
        state.state.as_ref().is_some_and(|state| state.running.is_some())
    };
    node == NodeState::Dead || is_over(&status) && !status.container_statuses.iter().flatten().any(running)
}

/// Whether the pod's phase is a final one; its addresses are not its own any more then.
pub fn is_over(status: &PodStatus) -> bool {
    matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
}

fn disruption(status: &PodStatus) -> Option<String> {
    let message = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let conditions = status.conditions.iter().flatten();
    let target = conditions
        .into_iter()
        .find(|condition| condition.type_ == "DisruptionTarget" && condition.status == "True");
    if let Some(target) = target {
        return Some(message(&target.message).unwrap_or_else(|| "the launcher pod was evicted".to_owned()));
    }
    let reason = status.reason.as_deref()?;
    NODE_REASONS
        .contains(&reason)
        .then(|| message(&status.message).unwrap_or_else(|| format!("the node ended the launcher pod: {reason}")))
}

/// The launcher's last words, else the kubelet's.
fn by_termination(status: &PodStatus) -> Ending {
    let succeeded = status.phase.as_deref() == Some("Succeeded");
    let phase = if succeeded { phase::SUCCEEDED } else { phase::FAILED };
    let terminated = terminated(status);
    if let Some(words) = terminated.and_then(|state| Termination::from_json(state.message.as_deref()?)) {
        let reason = match words.reason {
            TerminationReason::GuestShutdown => "GuestShutdown",
            TerminationReason::GuestCrashed => "GuestCrashed",
            TerminationReason::GuestPaused => "GuestPaused",
            TerminationReason::Stopped => STOPPED,
            TerminationReason::LaunchFailed => "LaunchFailed",
        };
        // The launcher sees qemu end without a word, where the kernel has chosen it.
        let killed = terminated.is_some_and(|state| state.reason.as_deref() == Some(reasons::OOM_KILLED));
        if killed
            && matches!(
                words.reason,
                TerminationReason::GuestCrashed | TerminationReason::LaunchFailed
            )
        {
            return Ending {
                serial: words.serial,
                ..Ending::failed(
                    reasons::OOM_KILLED,
                    format!("{KILLED}; the launcher: {}", words.message),
                )
            };
        }
        return Ending {
            phase,
            reason: reason.to_owned(),
            message: words.message,
            serial: words.serial,
        };
    }
    let reason = terminated
        .and_then(|state| state.reason.clone())
        .or_else(|| status.reason.clone());
    let message = match terminated {
        Some(state) if state.reason.as_deref() == Some(reasons::OOM_KILLED) => KILLED.to_owned(),
        Some(state) => format!("the launcher ended with code {} and without a word", state.exit_code),
        None => status
            .message
            .clone()
            .unwrap_or_else(|| "the launcher never started".to_owned()),
    };
    let reason = reason.unwrap_or_else(|| reasons::POD_FAILED.to_owned());
    Ending {
        phase,
        reason,
        message,
        serial: Vec::new(),
    }
}

fn terminated(status: &PodStatus) -> Option<&ContainerStateTerminated> {
    let compute = status
        .container_statuses
        .iter()
        .flatten()
        .find(|container| container.name == CONTAINER)?;
    compute.state.as_ref()?.terminated.as_ref()
}
