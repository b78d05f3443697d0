//! What to do next for one VirtualMachine. Pure: the whole life of a machine is this table.
//!
//! | machine | instance | step |
//! |---|---|---|
//! | being deleted | there | delete it |
//! | being deleted | gone | release the machine |
//! | Halted | there | delete it |
//! | Always | none, no back-off | create it |
//! | Always | over | delete it, then as above |

use std::time::Duration;

use jiff::Timestamp;
use kubernest_crds::kubevirt::v1::{StartFailure, VirtualMachine, VirtualMachineInstance, phase};

use super::failure;
use super::validate::Strategy;
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
    match (strategy, instance) {
        (None, _) => Step::Rest,
        (Some(_), Some(_)) if goes => Step::Rest,
        (Some(Strategy::Halted), None) => Step::Rest,
        (Some(Strategy::Halted), Some(_)) => Step::Delete,
        (Some(Strategy::Always), None) => failure::wait(failing, now).map_or(Step::Create, Step::Wait),
        (Some(Strategy::Always), Some(instance)) if is_final(phase_of(instance)) => Step::Delete,
        // The count of failures is cleared once the instance has run for long enough.
        (Some(Strategy::Always), Some(instance)) if failing.is_some() && phase_of(instance) == phase::RUNNING => {
            failure::settles_in(instance, now).map_or(Step::Rest, Step::Wait)
        }
        (Some(Strategy::Always), Some(_)) => Step::Rest,
    }
}
