//! What was asked for through the API (`status.stateChangeRequests`) and is still to be done. Pure.
//!
//! | request | done, and dropped, when |
//! |---|---|
//! | Stop of an instance | that instance is gone |
//! | Start | an instance is there that is not to be stopped |
//! | Start of a halted machine | it is paused: the machine was turned on, then as above; else at once |
//! | any, of a machine that is to run once | at once: it knows neither |
//!
//! RerunOnFailure writes a Start of its own: from the moment an instance failed until the next one is there, because an
//! instance that is gone tells nothing. A Stop of the instance that failed says that none shall follow.

use std::collections::BTreeMap;

use kubernest_crds::kubevirt::v1::{
    StateChangeRequest, VirtualMachine, VirtualMachineInstance, phase, run_strategy,
    state_change::{PAUSED, START, STOP, TRUE},
};

use super::validate::Strategy;
use crate::virtualmachineinstance::phase_of;

/// What is still to be done, with `instance` as it is now.
pub fn pending(
    machine: &VirtualMachine,
    strategy: Option<Strategy>,
    instance: Option<&VirtualMachineInstance>,
) -> Vec<StateChangeRequest> {
    let before = written(machine);
    let strategy = match strategy {
        // Not to be told.
        None => return before.to_vec(),
        Some(Strategy::Once) => return Vec::new(),
        Some(strategy) => strategy,
    };
    let stopped = instance.is_some_and(|instance| stops(before, instance));
    let made = instance.filter(|instance| instance.metadata.deletion_timestamp.is_none() && !stopped);
    let failed = strategy == Strategy::RerunOnFailure && made.is_some_and(|made| phase_of(made) == phase::FAILED);
    let keeps = |request: &&StateChangeRequest| match request.action.as_str() {
        _ if fault(machine, request).is_some() => false,
        STOP => instance.is_some_and(|instance| request.uid == instance.metadata.uid),
        _ if strategy == Strategy::Halted => is_paused(request) && was_halted(machine),
        _ => made.is_none() || failed,
    };
    let mut pending: Vec<_> = before.iter().filter(keeps).cloned().collect();
    if failed && !start_is_due(&pending) {
        pending.push(StateChangeRequest {
            action: START.to_owned(),
            data: BTreeMap::new(),
            uid: None,
        });
    }
    pending
}

/// Whether a start is among the requests.
pub fn start_is_due(requests: &[StateChangeRequest]) -> bool {
    requests.iter().any(|request| request.action == START)
}

/// Whether a start among the requests wants the guest to stand still.
pub fn start_is_paused(requests: &[StateChangeRequest]) -> bool {
    requests
        .iter()
        .any(|request| request.action == START && is_paused(request))
}

/// Whether this very instance is to be stopped.
pub fn stops(requests: &[StateChangeRequest], instance: &VirtualMachineInstance) -> bool {
    let uid = instance.metadata.uid.as_ref();
    let mut requests = requests.iter();
    uid.is_some() && requests.any(|request| request.action == STOP && request.uid.as_ref() == uid)
}

/// Why requests of the machine are dropped without being carried out, a sentence each.
pub fn faults(machine: &VirtualMachine) -> Vec<String> {
    let faults = written(machine).iter().filter_map(|request| fault(machine, request));
    faults.collect()
}

fn fault(machine: &VirtualMachine, request: &StateChangeRequest) -> Option<String> {
    let names_none = || request.uid.as_deref().is_none_or(str::is_empty);
    let probed = || machine.spec.template.spec.liveness_probe.is_some();
    match request.action.as_str() {
        STOP if names_none() => Some("a Stop request has no uid: it must name the instance to stop".to_owned()),
        START if is_paused(request) && probed() => {
            let why = "cannot start paused: a guest that stands still would be ended by its livenessProbe";
            Some(why.to_owned())
        }
        START | STOP => None,
        other => Some(format!("there is no request {other:?}: it must be {START} or {STOP}")),
    }
}

fn written(machine: &VirtualMachine) -> &[StateChangeRequest] {
    machine
        .status
        .as_ref()
        .map(|status| status.state_change_requests.as_slice())
        .unwrap_or_default()
}

fn is_paused(request: &StateChangeRequest) -> bool {
    request.data.get(PAUSED).is_some_and(|value| value == TRUE)
}

/// Whether no other strategy than Halted was in force so far: a start that was left over from one must not turn on a
/// machine that somebody just halted.
fn was_halted(machine: &VirtualMachine) -> bool {
    let in_force = machine
        .status
        .as_ref()
        .and_then(|status| status.run_strategy.as_deref());
    in_force.is_none_or(|strategy| strategy == run_strategy::HALTED)
}
