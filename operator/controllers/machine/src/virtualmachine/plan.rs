//! What to do next for one VirtualMachine. Pure: the whole life of a machine is this table.
//!
//! | machine | instance | step |
//! |---|---|---|
//! | being deleted | there | delete it |
//! | being deleted | gone | release the machine |
//! | Halted | there | delete it |
//! | Always | none, no back-off | create it |
//! | Always | over | delete it, then as above |
//! | RerunOnFailure | none, new to this strategy or a start is due, no back-off | create it |
//! | RerunOnFailure | over | delete it; a start is due if it failed |
//! | Once | none, new to this strategy | create it |

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use kubernest_crds::kubevirt::v1::{StartFailure, StateChangeRequest, VirtualMachine, VirtualMachineInstance, phase};

use super::failure;
use super::validate::Strategy;
use crate::virtualmachineinstance::{is_final, phase_of};

/// Finalizer by which a user asks that what a machine owns stays (`kubectl delete --cascade=orphan`).
const ORPHAN_FINALIZER: &str = "orphan";

/// Action of a request to start (KubeVirt's word).
const START: &str = "Start";

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing until something changes.
    Rest,
    /// Nothing until this time has passed.
    Wait(Duration),
    /// Make the instance.
    Create,
    /// Delete the instance.
    Delete,
    /// The instance is gone: the machine may go.
    Release,
}

/// Decides; `instance` is the machine's own.
pub fn step(
    machine: &VirtualMachine,
    strategy: Option<Strategy>,
    instance: Option<&VirtualMachineInstance>,
    failing: Option<&StartFailure>,
    now: Timestamp,
) -> Step {
    let goes = instance.is_some_and(|instance| instance.metadata.deletion_timestamp.is_some());
    if machine.metadata.deletion_timestamp.is_some() {
        let orphan = machine
            .metadata
            .finalizers
            .iter()
            .flatten()
            .any(|name| name == ORPHAN_FINALIZER);
        return match instance {
            None => Step::Release,
            Some(_) if orphan => Step::Release,
            Some(_) if goes => Step::Rest,
            Some(_) => Step::Delete,
        };
    }
    let Some(strategy) = strategy else { return Step::Rest };
    let Some(instance) = instance else {
        return if starts(machine, strategy) {
            failure::wait(failing, now).map_or(Step::Create, Step::Wait)
        } else {
            Step::Rest
        };
    };
    if goes {
        return Step::Rest;
    }
    let over = match strategy {
        Strategy::Halted => true,
        Strategy::Always | Strategy::RerunOnFailure => is_final(phase_of(instance)),
        Strategy::Once => false,
    };
    if over {
        return Step::Delete;
    }
    // The count of failures is cleared once the instance has run for long enough.
    if strategy != Strategy::Once && failing.is_some() && phase_of(instance) == phase::RUNNING {
        return failure::settles_in(instance, now).map_or(Step::Rest, Step::Wait);
    }
    Step::Rest
}

/// Whether a machine without an instance is to have one.
pub fn starts(machine: &VirtualMachine, strategy: Strategy) -> bool {
    let status = machine.status.as_ref();
    let new = || status.and_then(|status| status.run_strategy.as_deref()) != Some(strategy.as_str());
    match strategy {
        Strategy::Always => true,
        Strategy::Halted => false,
        Strategy::Once => new(),
        Strategy::RerunOnFailure => new() || status.is_some_and(|status| start_is_due(&status.state_change_requests)),
    }
}

/// What is still to be done: a start, once an instance failed that is to be followed by another, until that one is there.
pub fn requests(
    before: &[StateChangeRequest],
    strategy: Option<Strategy>,
    instance: Option<&VirtualMachineInstance>,
) -> Vec<StateChangeRequest> {
    let mut requests = before.to_vec();
    let made = instance.filter(|instance| instance.metadata.deletion_timestamp.is_none());
    match (strategy, made.map(phase_of)) {
        // Not to be told, or nothing there that could fail or follow.
        (None, _) | (Some(Strategy::RerunOnFailure), None) => {}
        (Some(Strategy::RerunOnFailure), Some(phase::FAILED)) if start_is_due(before) => {}
        (Some(Strategy::RerunOnFailure), Some(phase::FAILED)) => requests.push(StateChangeRequest {
            action: START.to_owned(),
            data: BTreeMap::new(),
            uid: None,
        }),
        _ => requests.retain(|request| request.action != START),
    }
    requests
}

/// Whether a start is among the requests.
pub fn start_is_due(requests: &[StateChangeRequest]) -> bool {
    requests.iter().any(|request| request.action == START)
}
