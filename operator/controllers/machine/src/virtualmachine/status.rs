//! The status of a VirtualMachine as a function of the machine and its instance. Pure.
//!
//! What hinders an instance is repeated here, so that who looks at the machine need not look further.

use jiff::Timestamp;
use kube::ResourceExt;
use kubernest_crds::kubevirt::v1::{
    StartFailure, StateChangeRequest, VirtualMachine, VirtualMachineInstance,
    VirtualMachineInstanceCondition as Condition, VirtualMachineStatus, phase, printable_status, vm_conditions,
    vmi_conditions,
};

use super::validate::Strategy;
use super::{build, failure, plan, reasons, requests};
use crate::conditions::{FALSE, TRUE, clear, get, is_false, is_true, set};
use crate::names::{ANNOTATION_TEMPLATE_HASH, ANNOTATION_VM_GENERATION};
use crate::virtualmachineinstance::{self as instances, POD_SCHEDULED, is_final, phase_of};

/// What went wrong with the machine itself, rather than with its instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// One word.
    pub reason: &'static str,
    /// A sentence.
    pub message: String,
}

impl Trouble {
    /// A trouble.
    pub fn new(reason: &'static str, message: String) -> Self {
        Self { reason, message }
    }
}

/// What a status follows from.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    /// What the machine wants; `None` when that is not supported.
    pub strategy: Option<Strategy>,
    /// Its instance, as it stands after this reconcile's writes.
    pub instance: Option<&'a VirtualMachineInstance>,
    /// What went wrong.
    pub trouble: Option<&'a Trouble>,
}

/// The status that `machine` should have.
pub fn status(machine: &VirtualMachine, seen: Seen<'_>, now: Timestamp) -> VirtualMachineStatus {
    let previous = machine.status.clone().unwrap_or_default();
    let requests = requests::pending(machine, seen.strategy, seen.instance);
    let start_failure = plan::failing(machine, seen.strategy, seen.instance, now);
    let mut all = previous.conditions;
    set_ready(&mut all, seen.instance, start_failure.as_ref(), now);
    set_failure(&mut all, seen, &requests, now);
    set_restart_required(&mut all, machine, seen.instance, now);
    repeat(&mut all, seen.instance);
    let instance_status = seen.instance.and_then(|instance| instance.status.as_ref());
    let ready = instance_status.is_some_and(|status| is_true(&status.conditions, vmi_conditions::READY));
    VirtualMachineStatus {
        created: seen.instance.is_some(),
        ready,
        printable_status: Some(printable(machine, seen, &requests, start_failure.as_ref(), now).to_owned()),
        run_strategy: in_force(previous.run_strategy, seen),
        conditions: all,
        state_change_requests: requests,
        start_failure,
        observed_generation: seen.instance.and_then(|instance| {
            instance
                .annotations()
                .get(ANNOTATION_VM_GENERATION)
                .and_then(|generation| generation.parse().ok())
        }),
        desired_generation: machine.metadata.generation,
    }
}

/// The strategy in force. One that starts a machine once is so only when the start is made: until then a start is due.
fn in_force(before: Option<String>, seen: Seen<'_>) -> Option<String> {
    let strategy = seen.strategy?;
    let made = seen
        .instance
        .is_some_and(|instance| instance.metadata.deletion_timestamp.is_none());
    match strategy {
        Strategy::Once | Strategy::RerunOnFailure if !made => before,
        _ => Some(strategy.as_str().to_owned()),
    }
}

/// KubeVirt's order: the first that holds.
fn printable(
    machine: &VirtualMachine,
    seen: Seen<'_>,
    requests: &[StateChangeRequest],
    start_failure: Option<&StartFailure>,
    now: Timestamp,
) -> &'static str {
    let conditions = seen
        .instance
        .and_then(|instance| instance.status.as_ref())
        .map(|status| status.conditions.as_slice());
    let conditions = conditions.unwrap_or_default();
    let reason = |kind: &str| is_false(conditions, kind).and_then(|condition| condition.reason.as_deref());
    let trouble = reason(vmi_conditions::SYNCHRONIZED).unwrap_or_default();
    let phase = seen.instance.map(phase_of);
    let starts = matches!(phase, Some("" | phase::PENDING | phase::SCHEDULING | phase::SCHEDULED));
    let over = phase.is_some_and(is_final);
    let none = seen.instance.is_none();
    // Whether another instance follows one that is over, or there is to be one.
    let followed = match seen.strategy {
        Some(strategy) if none => plan::starts(machine, strategy),
        Some(Strategy::Always) => true,
        Some(Strategy::RerunOnFailure | Strategy::Manual) => requests::start_is_due(requests),
        Some(Strategy::Halted | Strategy::Once) | None => false,
    };
    // An instance that is over and to be followed by another is no stop.
    let stops = seen.instance.is_some_and(|instance| {
        let halted = seen.strategy == Some(Strategy::Halted);
        let goes = instance.metadata.deletion_timestamp.is_some() || requests::stops(requests, instance);
        halted || (goes && !(over && followed))
    });
    if machine.metadata.deletion_timestamp.is_some() {
        printable_status::TERMINATING
    } else if stops {
        printable_status::STOPPING
    } else if phase == Some(phase::RUNNING) && is_true(conditions, vmi_conditions::PAUSED) {
        printable_status::PAUSED
    } else if phase == Some(phase::RUNNING) {
        printable_status::RUNNING
    } else if starts && trouble == instances::reasons::PVC_NOT_FOUND {
        printable_status::PVC_NOT_FOUND
    } else if starts && reason(POD_SCHEDULED).is_some() {
        printable_status::UNSCHEDULABLE
    } else if starts
        && matches!(
            trouble,
            "ErrImagePull" | "InvalidImageName" | "ErrImageNeverPull" | "ImageInspectError"
        )
    {
        printable_status::ERR_IMAGE_PULL
    } else if starts && trouble == "ImagePullBackOff" {
        printable_status::IMAGE_PULL_BACK_OFF
    } else if starts {
        printable_status::STARTING
    } else if followed && failure::wait(start_failure, now).is_some() {
        printable_status::CRASH_LOOP_BACK_OFF
    } else if (over || none) && followed {
        printable_status::STARTING
    } else if over || none {
        printable_status::STOPPED
    } else {
        printable_status::UNKNOWN
    }
}

/// Ready repeats the instance's; while it is not, the most telling of what the instance reports.
fn set_ready(
    all: &mut Vec<Condition>,
    instance: Option<&VirtualMachineInstance>,
    failing: Option<&StartFailure>,
    now: Timestamp,
) {
    let type_ = vm_conditions::READY;
    let Some(instance) = instance else {
        let message = match failing.and_then(|failing| failing.retry_after_timestamp.as_ref()) {
            Some(retry) => format!("no instance exists; the next is started at {}", retry.0),
            None => "no instance exists".to_owned(),
        };
        return set(all, type_, FALSE, reasons::NO_INSTANCE, &message, now);
    };
    let theirs = instance
        .status
        .as_ref()
        .map(|status| status.conditions.as_slice())
        .unwrap_or_default();
    let hindrance = [vmi_conditions::SYNCHRONIZED, POD_SCHEDULED]
        .iter()
        .find_map(|kind| is_false(theirs, kind));
    match hindrance.or_else(|| get(theirs, vmi_conditions::READY)) {
        Some(found) => {
            let (reason, message) = (found.reason.as_deref().unwrap_or_default(), found.message.as_deref());
            let status = if found.type_ == vmi_conditions::READY {
                &found.status
            } else {
                FALSE
            };
            set(all, type_, status, reason, message.unwrap_or_default(), now);
        }
        None => set(
            all,
            type_,
            FALSE,
            instances::reasons::POD_NOT_EXISTS,
            "the launcher pod is being made",
            now,
        ),
    }
}

/// Failure stands from a failed run, or failed step, until an instance runs or none is wanted.
fn set_failure(all: &mut Vec<Condition>, seen: Seen<'_>, requests: &[StateChangeRequest], now: Timestamp) {
    let type_ = vm_conditions::FAILURE;
    if let Some(trouble) = seen.trouble {
        return set(all, type_, TRUE, trouble.reason, &trouble.message, now);
    }
    let stops = seen
        .instance
        .is_some_and(|instance| instance.metadata.deletion_timestamp.is_some() || requests::stops(requests, instance));
    let status = seen.instance.and_then(|instance| instance.status.as_ref());
    match status.and_then(|status| status.phase.as_deref()) {
        // Remembered from before its deletion, or no failure but a stop that was asked for.
        Some(phase::FAILED) if stops => {}
        Some(phase::FAILED) if seen.strategy.is_some_and(|strategy| strategy != Strategy::Halted) => {
            let ready = status.and_then(|status| get(&status.conditions, vmi_conditions::READY));
            let reason = status
                .and_then(|status| status.reason.as_deref())
                .unwrap_or(reasons::INSTANCE_FAILED);
            let message = ready.and_then(|ready| ready.message.as_deref()).unwrap_or_default();
            set(all, type_, TRUE, reason, message, now);
        }
        Some(phase::RUNNING | phase::SUCCEEDED) => clear(all, type_),
        _ if seen.strategy == Some(Strategy::Halted) => clear(all, type_),
        // A trouble of the machine's own is over once it is not found any more; a failed run is remembered.
        _ => {
            let own = get(all, type_)
                .and_then(|condition| condition.reason.as_deref())
                .is_some_and(reasons::is_own);
            if own {
                clear(all, type_);
            }
        }
    }
}

fn set_restart_required(
    all: &mut Vec<Condition>,
    machine: &VirtualMachine,
    instance: Option<&VirtualMachineInstance>,
    now: Timestamp,
) {
    let running = instance.filter(|instance| !is_final(phase_of(instance)));
    let made_from = running.and_then(|instance| instance.annotations().get(ANNOTATION_TEMPLATE_HASH).cloned());
    let wanted = build::template_hash(&machine.spec.template.spec).ok();
    if made_from.is_some() && made_from != wanted {
        let message = "the template was changed since the instance was started; the change takes effect when it is \
                       started again";
        set(
            all,
            vm_conditions::RESTART_REQUIRED,
            TRUE,
            reasons::TEMPLATE_CHANGED,
            message,
            now,
        );
    } else {
        clear(all, vm_conditions::RESTART_REQUIRED);
    }
}

/// All that the instance says, but what the machine says itself (KubeVirt's list); nothing of an instance that is gone.
fn repeat(all: &mut Vec<Condition>, instance: Option<&VirtualMachineInstance>) {
    let own = |condition: &Condition| {
        let own = [
            vm_conditions::READY,
            vm_conditions::FAILURE,
            vm_conditions::RESTART_REQUIRED,
        ];
        own.contains(&condition.type_.as_str())
    };
    let status = instance.and_then(|instance| instance.status.as_ref());
    let theirs = status.into_iter().flat_map(|status| &status.conditions);
    all.retain(own);
    all.extend(theirs.filter(|condition| !own(condition)).cloned());
}
