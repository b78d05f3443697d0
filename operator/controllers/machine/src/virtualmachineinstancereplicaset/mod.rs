//! VirtualMachineInstanceReplicaSet → VirtualMachineInstance: as many instances of one template as are asked for.
//!
//! No more than asked: a cache tells only that something is to be done, what it is follows from a fresh read of the set and
//! its instances; and names follow from what is there, so that one who creates from an old list meets the instance that
//! was made meanwhile. Deletion of a set is the garbage collector's affair. [`plan`] holds the table of what is done when.

mod apply;
mod build;
mod dereference;
mod plan;
mod status;
#[cfg(test)]
mod tests;
mod validate;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::runtime::controller::Action;
use kubernest_crds::kubevirt::v1::VirtualMachineInstanceReplicaSet as ReplicaSet;
use kubernest_runtime::{ApplyError, StepError};

pub use dereference::{controller, wants};
pub use plan::standing;

use self::plan::Step;
use self::status::Trouble;
use crate::{Context, RESYNC};

/// An instance changed while it was claimed: the cache has it by then.
const SOON: Duration = Duration::from_secs(1);

/// Reasons of a set's conditions and events; KubeVirt's words where it has one.
pub mod reasons {
    /// ReplicaFailure and event: an instance cannot be made (KubeVirt's word).
    pub const FAILED_CREATE: &str = "FailedCreate";
    /// ReplicaFailure and event: an instance cannot be deleted (KubeVirt's word).
    pub const FAILED_DELETE: &str = "FailedDelete";
    /// ReplicaFailure and event: an instance cannot be taken, or let go.
    pub const FAILED_CLAIM: &str = "FailedClaim";
    /// ReplicaFailure: the set contradicts itself.
    pub const INVALID: &str = "InvalidSpec";
    /// ReplicaPaused (KubeVirt's word).
    pub const PAUSED: &str = "Paused";
    /// Event: an instance was made (KubeVirt's word).
    pub const CREATED: &str = "SuccessfulCreate";
    /// Event: an instance is deleted (KubeVirt's word).
    pub const DELETED: &str = "SuccessfulDelete";
    /// Event: the set rests from now on (KubeVirt's word).
    pub const NOW_PAUSED: &str = "SuccessfulPaused";
    /// Event: the set works again (KubeVirt's word).
    pub const NOW_RESUMED: &str = "SuccessfulResumed";
}

/// A step of a set's reconcile that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading the set and its instances.
    #[error("cannot read the set and its instances")]
    Dereference(#[source] kube::Error),
    /// Making an instance the set's own, or letting it go.
    #[error("cannot change the owner of the instance {instance}")]
    Claim {
        /// Its name.
        instance: String,
        /// What the API server said.
        #[source]
        source: kube::Error,
    },
    /// Creating an instance.
    #[error("cannot create an instance")]
    Create(#[source] kube::Error),
    /// Deleting an instance.
    #[error("cannot delete an instance")]
    Delete(#[source] ApplyError),
    /// Writing the status.
    #[error("cannot write the status")]
    Status(#[source] kube::Error),
}

impl StepError for Error {
    fn step(&self) -> &'static str {
        match self {
            Self::Dereference(_) => "dereference",
            Self::Claim { .. } => "claim",
            Self::Create(_) => "create_instance",
            Self::Delete(_) => "delete_instance",
            Self::Status(_) => "status",
        }
    }
}

impl Error {
    /// What the user is told of it.
    fn trouble(&self) -> Option<Trouble> {
        let told = |reason, cause: Option<&kube::Error>| match cause {
            Some(kube::Error::Api(answer)) => Trouble::new(reason, answer.message.clone()),
            Some(cause) => Trouble::new(reason, cause.to_string()),
            None => Trouble::new(reason, self.to_string()),
        };
        match self {
            Self::Create(cause) => Some(told(reasons::FAILED_CREATE, Some(cause))),
            Self::Delete(ApplyError::Api { source, .. }) => Some(told(reasons::FAILED_DELETE, Some(source))),
            Self::Delete(_) => Some(told(reasons::FAILED_DELETE, None)),
            Self::Claim { source, .. } => {
                let Trouble { reason, message } = told(reasons::FAILED_CLAIM, Some(source));
                Some(Trouble::new(reason, format!("{self}: {message}")))
            }
            Self::Dereference(_) | Self::Status(_) => None,
        }
    }
}

/// Brings one set a step further.
///
/// # Errors
/// The step that failed; it is tried again with back-off.
pub async fn reconcile(set: Arc<ReplicaSet>, ctx: Arc<Context>) -> Result<Action, Error> {
    if ctx.fresh.is_stale(&*set) {
        return Ok(Action::await_change());
    }
    let now = Timestamp::now();
    let mut seen = dereference::cached(set, &ctx);
    if plan::step(&seen, now) != Step::Rest {
        let live = dereference::live(&seen, &ctx).await.map_err(Error::Dereference)?;
        let Some(live) = live else {
            return Ok(Action::await_change());
        };
        seen = live;
    }
    let mut failed = None;
    let mut step = plan::step(&seen, now);
    if let Step::Claim { adopt, release } = &step {
        let claimed = apply::claim(&mut seen, adopt, release, &ctx).await;
        let Some(refused) = claimed.refused else {
            // Their change brings the next reconcile, which counts them.
            return Ok(Action::requeue(if claimed.missed { SOON } else { RESYNC }));
        };
        // One that cannot be had keeps none of the others waiting; one that may be the set's by now would count.
        step = if claimed.missed {
            Step::Rest
        } else {
            plan::scale(&seen, now)
        };
        failed = Some(refused);
    }
    // Failures are told to the user before it is tried again.
    if let Step::Scale { delete, create } = step {
        failed = apply::scale(&mut seen, &delete, create, &ctx).await.err().or(failed);
    }
    let trouble = match &seen.goal {
        Ok(_) => failed.as_ref().and_then(Error::trouble),
        Err(obstacle) => Some(Trouble::new(reasons::INVALID, obstacle.to_string())),
    };
    let status = status::status(&seen, trouble.as_ref(), now);
    apply::status(&seen.set, &status, &ctx).await?;
    let next = plan::wake(&seen, now).unwrap_or(RESYNC);
    failed.map_or(Ok(Action::requeue(next)), Err)
}
