//! VirtualMachine → VirtualMachineInstance: starts, stops and starts again as the run strategy says.
//!
//! It sees instances only, never a pod or a node. [`plan`] holds the table of what is done when.

mod apply;
mod build;
mod dereference;
mod failure;
mod plan;
mod requests;
mod status;
#[cfg(test)]
mod tests;
mod validate;

use std::sync::Arc;

use jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::controller::Action;
use kubernest_crds::kubevirt::v1::VirtualMachine;
use kubernest_runtime::{ApplyError, StepError};

use self::plan::Step;
use self::status::{Seen, Trouble};
use crate::{Context, RESYNC};

/// Reasons of a VirtualMachine's conditions; KubeVirt's words where it has one.
pub mod reasons {
    /// Ready: there is no instance (KubeVirt's word).
    pub const NO_INSTANCE: &str = "VMINotExists";
    /// Failure: the instance failed and nothing says why.
    pub const INSTANCE_FAILED: &str = "InstanceFailed";
    /// Failure: the API server refuses the instance (KubeVirt's word).
    pub const FAILED_CREATE: &str = "FailedCreate";
    /// Failure: the spec asks for what is not there yet.
    pub const NOT_SUPPORTED: &str = "NotSupported";
    /// Failure: an instance of the machine's name belongs to something else.
    pub const NAME_TAKEN: &str = "InstanceNotOwned";
    /// Event: a request made through the API cannot be carried out.
    pub const BAD_REQUEST: &str = "InvalidStateChangeRequest";
    /// RestartRequired: the template was changed.
    pub const TEMPLATE_CHANGED: &str = "TemplateChanged";

    /// Whether a failure is of the machine itself, rather than of a run.
    pub fn is_own(reason: &str) -> bool {
        [FAILED_CREATE, NOT_SUPPORTED, NAME_TAKEN].contains(&reason)
    }
}

/// A step of a machine's reconcile that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading the instance.
    #[error("cannot read the instance")]
    Dereference(#[source] kube::Error),
    /// Adding or removing the finalizer.
    #[error("cannot change the finalizer")]
    Finalizer(#[source] ApplyError),
    /// Making the instance from the template.
    #[error("cannot build the instance")]
    Build(#[source] serde_json::Error),
    /// Creating the instance.
    #[error("cannot create the instance")]
    Create(#[source] kube::Error),
    /// The instance of that name is another's.
    #[error("VirtualMachineInstance {0} exists and is not this machine's: delete it, the machine starts then")]
    NameTaken(String),
    /// The instance went while it was looked at.
    #[error("VirtualMachineInstance {0} was there and went")]
    Vanished(String),
    /// Deleting the instance.
    #[error("cannot delete the instance")]
    Delete(#[source] ApplyError),
    /// Changing the strategy of a halted machine that is to be started.
    #[error("cannot change the run strategy")]
    TurnOn(#[source] kube::Error),
    /// Writing the status.
    #[error("cannot write the status")]
    Status(#[source] kube::Error),
}

impl StepError for Error {
    fn step(&self) -> &'static str {
        match self {
            Self::Dereference(_) => "dereference",
            Self::Finalizer(_) => "finalizer",
            Self::Build(_) => "build",
            Self::Create(_) | Self::NameTaken(_) | Self::Vanished(_) => "create_instance",
            Self::Delete(_) => "delete_instance",
            Self::TurnOn(_) => "turn_on",
            Self::Status(_) => "status",
        }
    }
}

impl Error {
    /// What the user is told of it, when time alone does not mend it.
    fn trouble(&self) -> Option<Trouble> {
        match self {
            Self::Create(kube::Error::Api(answer)) if matches!(answer.code, 400 | 403 | 422) => {
                let message = format!("the instance is refused: {}", answer.message);
                Some(Trouble::new(reasons::FAILED_CREATE, message))
            }
            Self::NameTaken(_) => Some(Trouble::new(reasons::NAME_TAKEN, self.to_string())),
            _ => None,
        }
    }
}

/// Whether the machine makes a next instance when its instance is gone.
pub fn goes_on(machine: &VirtualMachine) -> bool {
    machine.metadata.deletion_timestamp.is_none()
        && validate::strategy(&machine.spec).is_ok_and(|strategy| plan::starts(machine, strategy))
}

/// Brings one machine a step further.
///
/// # Errors
/// The step that failed; it is tried again with back-off.
pub async fn reconcile(machine: Arc<VirtualMachine>, ctx: Arc<Context>) -> Result<Action, Error> {
    if ctx.fresh.is_stale(&*machine) {
        return Ok(Action::await_change());
    }
    let Some(machine) = apply::hold(machine, &ctx).await? else {
        return Ok(Action::await_change());
    };
    let found = dereference::instance(&machine, &ctx)
        .await
        .map_err(Error::Dereference)?;
    let taken = found
        .as_ref()
        .is_some_and(|instance| !dereference::owns(&machine, instance));
    let mut instance = found.filter(|_| !taken).map(|instance| (*instance).clone());
    let (strategy, mut trouble) = match validate::strategy(&machine.spec) {
        Ok(_) if taken => (None, Error::NameTaken(machine.name_any()).trouble()),
        Ok(strategy) => (Some(strategy), None),
        Err(obstacle) => (None, Some(Trouble::new(reasons::NOT_SUPPORTED, obstacle.to_string()))),
    };
    let now = Timestamp::now();
    let failing = plan::failing(&machine, strategy, instance.as_ref(), now);
    let step = plan::step(&machine, strategy, instance.as_ref(), failing.as_ref(), now);
    let mut failed = None;
    match step {
        Step::Release => {
            apply::release(&machine, &ctx).await?;
            return Ok(Action::await_change());
        }
        Step::TurnOn => {
            apply::turn_on(&machine, &ctx).await?;
            return Ok(Action::await_change());
        }
        Step::Create => match apply::create(&machine, strategy, &ctx).await {
            Ok(created) => instance = Some(created),
            // Told to the user before it is tried again.
            Err(error) => {
                trouble = error.trouble();
                failed = Some(error);
            }
        },
        Step::Rest | Step::Wait(_) | Step::Delete => {}
    }
    let seen = Seen {
        strategy,
        instance: instance.as_ref(),
        trouble: trouble.as_ref(),
    };
    let written = apply::status(&machine, &status::status(&machine, seen, now), &ctx).await?;
    if let (Step::Delete, Some(instance), true) = (step, &instance, written) {
        apply::delete(&machine, instance, &ctx).await?;
    }
    match (failed, step) {
        (Some(error), _) => Err(error),
        (None, Step::Wait(time)) => Ok(Action::requeue(time)),
        (None, _) => Ok(Action::requeue(RESYNC)),
    }
}
