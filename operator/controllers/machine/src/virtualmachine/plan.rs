//! What to do next for one VirtualMachine. Pure: the whole life of a machine is this table.
//!
//! | machine | instance | step |
//! |---|---|---|
//! | being deleted | there | delete it |
//! | being deleted | gone | release the machine |
//! | Halted | there | delete it |
//! | Halted | none, a paused start is due | turn the machine on: it is Always then |
//! | Always | none, no back-off | create it |
//! | Always | over, or to be stopped | delete it, then as above |
//! | RerunOnFailure | none, new to this strategy or a start is due, no back-off | create it |
//! | RerunOnFailure | over | delete it; a start is due if it failed |
//! | RerunOnFailure | to be stopped | delete it, however it ends |
//! | Manual | none, a start is due | create it |
//! | Manual | to be stopped | delete it |
//! | Once | none, new to this strategy | create it |
//!
//! What is due, and which instance is to be stopped, stands in [`super::requests`]. A restart is a stop and a start.

use std::time::Duration;

use jiff::Timestamp;
use kubernest_crds::kubevirt::v1::{StartFailure, StateChangeRequest, VirtualMachine, VirtualMachineInstance, phase};

use super::validate::Strategy;
use super::{failure, requests};
use crate::virtualmachineinstance::{is_final, phase_of};

/// Finalizer by which a user asks that what a machine owns stays (`kubectl delete --cascade=orphan`).
const ORPHAN_FINALIZER: &str = "orphan";

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
    /// Change the strategy of a halted machine to Always.
    TurnOn,
    /// The instance is gone: the machine may go.
    Release,
}

/// Decides; `instance` is the machine's own, `failing` what [`failing`] says.
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
        return match strategy {
            Strategy::Halted if requests::start_is_due(&left(machine, strategy)) => Step::TurnOn,
            _ if starts(machine, strategy) => failure::wait(failing, now).map_or(Step::Create, Step::Wait),
            _ => Step::Rest,
        };
    };
    if goes {
        return Step::Rest;
    }
    let stopped = requests::stops(&requests::pending(machine, Some(strategy), Some(instance)), instance);
    let over = match strategy {
        Strategy::Halted => true,
        Strategy::Always | Strategy::RerunOnFailure => stopped || is_final(phase_of(instance)),
        Strategy::Manual => stopped,
        Strategy::Once => false,
    };
    if over {
        return Step::Delete;
    }
    // The count of failures is cleared once the instance has run for long enough.
    if failing.is_some() && phase_of(instance) == phase::RUNNING {
        return failure::settles_in(instance, now).map_or(Step::Rest, Step::Wait);
    }
    Step::Rest
}

/// Whether a machine without an instance is to have one.
pub fn starts(machine: &VirtualMachine, strategy: Strategy) -> bool {
    let in_force = machine
        .status
        .as_ref()
        .and_then(|status| status.run_strategy.as_deref());
    let new = || in_force != Some(strategy.as_str());
    let due = || requests::start_is_due(&left(machine, strategy));
    match strategy {
        Strategy::Always => true,
        Strategy::Halted => false,
        Strategy::Once => new(),
        Strategy::RerunOnFailure => new() || due(),
        Strategy::Manual => due(),
    }
}

/// Whether the next instance is to stand still at first.
pub fn starts_paused(machine: &VirtualMachine, strategy: Strategy) -> bool {
    requests::start_is_paused(&left(machine, strategy))
}

/// The failures that count for the back-off, after looking at the instance. One that is to be stopped is none of them:
/// whoever restarts a machine does not want to wait.
pub fn failing(
    machine: &VirtualMachine,
    strategy: Option<Strategy>,
    instance: Option<&VirtualMachineInstance>,
    now: Timestamp,
) -> Option<StartFailure> {
    let before = machine.status.as_ref().and_then(|status| status.start_failure.as_ref());
    let pending = requests::pending(machine, strategy, instance);
    match strategy {
        // Nothing is repeated by itself.
        Some(Strategy::Halted | Strategy::Once | Strategy::Manual) => None,
        _ if instance.is_some_and(|instance| requests::stops(&pending, instance)) => before.cloned(),
        _ => failure::count(before, instance, now),
    }
}

/// The requests that are left once there is no instance.
fn left(machine: &VirtualMachine, strategy: Strategy) -> Vec<StateChangeRequest> {
    requests::pending(machine, Some(strategy), None)
}
