//! The status of a set as a function of the set and its instances. Pure.

use jiff::Timestamp;
use kubernest_crds::kubevirt::v1::{VirtualMachineInstanceReplicaSetStatus, vmirs_conditions};

use super::dereference::{Seen, owns};
use super::plan::{counted, counts, is_ready};
use super::reasons;
use crate::conditions::{TRUE, clear, set};

/// What went wrong.
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

/// The status that the set should have; instances as they stand after this reconcile's writes.
pub fn status(seen: &Seen, trouble: Option<&Trouble>, now: Timestamp) -> VirtualMachineInstanceReplicaSetStatus {
    let previous = seen.set.status.clone().unwrap_or_default();
    let own = match &seen.goal {
        Ok(goal) => counted(seen, goal),
        Err(_) => seen
            .instances
            .iter()
            .filter(|one| owns(&seen.set, one) && counts(one))
            .collect(),
    };
    let ready = own.iter().filter(|one| is_ready(one)).count();
    let mut conditions = previous.conditions;
    match trouble {
        Some(trouble) => {
            let type_ = vmirs_conditions::REPLICA_FAILURE;
            set(&mut conditions, type_, TRUE, trouble.reason, &trouble.message, now);
        }
        None => clear(&mut conditions, vmirs_conditions::REPLICA_FAILURE),
    }
    match seen.set.spec.paused {
        true => {
            let message = "spec.paused is true: instances are neither made nor deleted";
            let type_ = vmirs_conditions::REPLICA_PAUSED;
            set(&mut conditions, type_, TRUE, reasons::PAUSED, message, now);
        }
        false => clear(&mut conditions, vmirs_conditions::REPLICA_PAUSED),
    }
    VirtualMachineInstanceReplicaSetStatus {
        replicas: number(own.len()),
        ready_replicas: number(ready),
        conditions,
        label_selector: match &seen.goal {
            Ok(goal) => Some(goal.selector.to_string()),
            Err(_) => previous.label_selector,
        },
    }
}

fn number(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}
