//! VirtualMachineInstance → launcher pod.
//!
//! ```text
//! Pending ──pod made──► Scheduling ──launcher runs──► Scheduled ──pod Ready──► Running ──► Succeeded | Failed
//! ```
//! One run, one pod: the pod's name comes from the instance's uid, and an instance that had a pod never gets another.
//! When the pod goes the run is over; making a new instance is the VirtualMachine's affair. The instance's finalizer goes
//! only when its process is surely gone.

mod apply;
mod build;
mod console;
mod credentials;
mod dereference;
mod ending;
mod gate;
mod networks;
pub mod resources;
mod status;
#[cfg(test)]
mod tests;
mod validate;
mod volumes;

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::controller::Action;
use kubernest_crds::kubevirt::v1::{VirtualMachineInstance, phase};
use kubernest_pki::RandomError;
use kubernest_runtime::{ApplyError, StepError};

pub use ending::is_disruption;
pub use status::POD_SCHEDULED;

use crate::stores::NodeState;
use crate::trust::TrustError;
use crate::{Context, RESYNC};
use validate::Obstacle;

/// Reasons of conditions and of `status.reason`; KubeVirt's words where it has one.
pub mod reasons {
    /// Synchronized: the spec cannot be run.
    pub const INVALID: &str = "InvalidSpec";
    /// Synchronized: a claim does not exist (KubeVirt's word).
    pub const PVC_NOT_FOUND: &str = "FailedPvcNotFound";
    /// Paused: somebody wants the guest to stand still (KubeVirt's word).
    pub const PAUSED_BY_USER: &str = "PausedByUser";
    /// Synchronized: the API server refuses the pod (KubeVirt's word).
    pub const FAILED_CREATE: &str = "FailedCreate";
    /// Synchronized: the pod would be given no processors of its own (KubeVirt's word).
    pub const NOT_GUARANTEED: &str = "FailedGuaranteePodResources";
    /// PodScheduled: no node takes the pod (Kubernetes' word).
    pub const UNSCHEDULABLE: &str = "Unschedulable";
    /// Ready: there is no launcher pod (KubeVirt's word).
    pub const POD_NOT_EXISTS: &str = "PodNotExists";
    /// Ready: the launcher pod is being deleted (KubeVirt's word).
    pub const POD_TERMINATING: &str = "PodTerminating";
    /// Ready: the pod reports no readiness (KubeVirt's word).
    pub const POD_CONDITION_MISSING: &str = "PodConditionMissing";
    /// Ready: the domain does not run (KubeVirt's word).
    pub const GUEST_NOT_RUNNING: &str = "GuestNotRunning";
    /// Ready: the guest stands still (Kubernetes' word for the pod, KubeVirt's for the instance).
    pub const GATES_NOT_READY: &str = "ReadinessGatesNotReady";
    /// Ready: the guest runs and its readiness probe fails.
    pub const GUEST_NOT_ANSWERING: &str = "GuestNotAnswering";
    /// Ready: the node does not answer.
    pub const NODE_UNREACHABLE: &str = "NodeUnreachable";
    /// Failed: the pod was deleted under the guest.
    pub const POD_DELETED: &str = "PodDeleted";
    /// Failed: the pod was evicted or preempted.
    pub const POD_EVICTED: &str = "PodEvicted";
    /// Failed: the guest did not answer its liveness probe.
    pub const PROBE_FAILED: &str = "LivenessProbeFailed";
    /// Failed: the kernel chose a process of the pod when memory ran out (Kubernetes' word).
    pub const OOM_KILLED: &str = "OOMKilled";
    /// Failed: the node is surely off.
    pub const NODE_LOST: &str = "NodeLost";
    /// Failed: the pod failed and nothing says why.
    pub const POD_FAILED: &str = "PodFailed";
    /// SoftwareEmulation is False: KVM.
    pub const KVM: &str = "Kvm";
    /// SoftwareEmulation: no node offered KVM.
    pub const NO_KVM: &str = "NoUsableKvm";
    /// SoftwareEmulation: the operator was told so.
    pub const EMULATION_ALWAYS: &str = "EmulationAlways";
}

/// A step of an instance's reconcile that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading what the decision depends on.
    #[error("cannot read the state of the instance")]
    Dereference(#[source] kube::Error),
    /// Adding or removing the finalizer.
    #[error("cannot change the finalizer")]
    Finalizer(#[source] ApplyError),
    /// Writing the launch document.
    #[error("cannot build the launcher pod")]
    Build(#[source] serde_json::Error),
    /// Naming the Secret of the launcher's certificate.
    #[error("cannot name the Secret of the launcher's certificate")]
    NameSecret(#[source] RandomError),
    /// Signing the launcher's certificate.
    #[error("cannot make the launcher's certificate")]
    Certificate(#[source] TrustError),
    /// Storing it.
    #[error("cannot create the Secret of the launcher's certificate")]
    CreateSecret(#[source] kube::Error),
    /// Creating the pod.
    #[error("cannot create the launcher pod")]
    CreatePod(#[source] kube::Error),
    /// A pod of another owner has the launcher pod's name.
    #[error("pod {0} exists and belongs to something else: delete it, the machine starts then")]
    PodNameTaken(String),
    /// Something changed what the pod asks for, so that no kubelet would give it processors of its own.
    #[error("{}", Obstacle::NotGuaranteed)]
    NotGuaranteed,
    /// Deleting the pod.
    #[error("cannot delete the launcher pod")]
    DeletePod(#[source] ApplyError),
    /// Reading the launcher's log.
    #[error("cannot read the launcher's log")]
    Console(#[source] kube::Error),
    /// Saying by a label where it is.
    #[error("cannot label the instance with its node")]
    Place(#[source] kube::Error),
    /// Writing the status.
    #[error("cannot write the status")]
    Status(#[source] kube::Error),
    /// Writing the pod's condition.
    #[error("cannot change the launcher pod's readiness gate")]
    Gate(#[source] kube::Error),
}

impl StepError for Error {
    fn step(&self) -> &'static str {
        match self {
            Self::Dereference(_) => "dereference",
            Self::Finalizer(_) => "finalizer",
            Self::Build(_) => "build",
            Self::Certificate(_) => "certificate",
            Self::NameSecret(_) | Self::CreateSecret(_) => "create_secret",
            Self::CreatePod(_) | Self::PodNameTaken(_) | Self::NotGuaranteed => "create_pod",
            Self::DeletePod(_) => "delete_pod",
            Self::Console(_) => "console",
            Self::Status(_) => "status",
            Self::Place(_) => "place",
            Self::Gate(_) => "gate",
        }
    }
}

impl Error {
    /// What the user is told of it: the API server's word against the pod, when it is one that time alone does not mend.
    fn refusal(&self) -> Option<Obstacle> {
        match self {
            Self::CreatePod(kube::Error::Api(answer)) if matches!(answer.code, 400 | 403 | 422) => {
                Some(Obstacle::Refused(answer.message.clone()))
            }
            Self::CreateSecret(kube::Error::Api(answer)) if matches!(answer.code, 400 | 403 | 422) => {
                Some(Obstacle::Uncertified(answer.message.clone()))
            }
            Self::Certificate(error) => Some(Obstacle::Uncertified(error.to_string())),
            Self::PodNameTaken(_) => Some(Obstacle::Refused(self.to_string())),
            Self::NotGuaranteed => Some(Obstacle::NotGuaranteed),
            _ => None,
        }
    }
}

/// Whether a phase is final.
pub fn is_final(phase: &str) -> bool {
    matches!(phase, phase::SUCCEEDED | phase::FAILED)
}

/// Whether the instance has not had a pod yet.
pub fn waits_for_a_pod(instance: &VirtualMachineInstance) -> bool {
    matches!(phase_of(instance), "" | phase::PENDING)
}

/// The instance's phase; empty before the first status.
pub fn phase_of(instance: &VirtualMachineInstance) -> &str {
    instance
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
        .unwrap_or_default()
}

/// Names of the claims that its volumes use.
pub fn claims_of(instance: &VirtualMachineInstance) -> impl Iterator<Item = &str> {
    let sources = instance
        .spec
        .volumes
        .iter()
        .flatten()
        .filter_map(|volume| volume.claim());
    sources.map(|source| source.claim_name.as_str())
}

/// Whether an instance that is being deleted may go: its process is surely gone.
///
/// Where a next instance waits, that is enough. Where none does, what the pod has on its node (taps, mounts) is to be gone
/// as well, and that is when its object goes.
fn may_go(observed: &dereference::Observed) -> bool {
    observed.pod.as_ref().is_none_or(|pod| {
        let left_for_good = !observed.goes_on && observed.node != NodeState::Dead;
        !left_for_good && ending::surely_ended(pod, observed.node)
    })
}

/// Brings one instance a step further.
///
/// # Errors
/// The step that failed; it is tried again with back-off.
pub async fn reconcile(instance: Arc<VirtualMachineInstance>, ctx: Arc<Context>) -> Result<Action, Error> {
    if ctx.fresh.is_stale(&*instance) {
        return Ok(Action::await_change());
    }
    let Some(instance) = apply::hold(instance, &ctx).await? else {
        return Ok(Action::await_change());
    };
    let deleting = instance.metadata.deletion_timestamp.is_some();
    let mut observed = dereference::dereference(&instance, &ctx)
        .await
        .map_err(Error::Dereference)?;
    let (mut obstacle, mut failure) = (None, None);
    if deleting || is_final(phase_of(&instance)) {
        apply::end(&instance, &observed, &ctx).await?;
    } else if waits_for_a_pod(&instance) && observed.pod.is_none() {
        let nodes = observed.nodes.iter().map(|node| &**node);
        let machine = validate::validate(&instance, &observed.claims);
        match machine.and_then(|machine| networks::clear_of_the_cluster(machine, nodes)) {
            Ok(machine) => match apply::start(&machine, &observed, &ctx).await {
                Ok(pod) => observed.pod = Some(pod),
                // Told to the user before it is tried again.
                Err(error) => {
                    obstacle = error.refusal();
                    failure = Some(error);
                }
            },
            Err(found) => obstacle = Some(found),
        }
    }
    if deleting && may_go(&observed) {
        apply::release(&instance, &observed, &ctx).await?;
        return Ok(Action::await_change());
    }
    let shares = |pod: &&Pod| resources::shares_processors(&instance.spec, pod);
    if obstacle.is_none() && observed.pod.as_ref().filter(shares).is_some() {
        obstacle = Some(Obstacle::NotGuaranteed);
    }
    let seen = status::Seen {
        pod: observed.pod.as_ref(),
        node: observed.node,
        obstacle: obstacle.as_ref(),
        emulation: ctx.options.emulation,
    };
    let now = Timestamp::now();
    let status = status::status(&instance, seen, now);
    let instance = match apply::place(instance.clone(), &status, &ctx).await {
        Ok(Some(placed)) => placed,
        Ok(None) => return Ok(Action::await_change()),
        // Its label is a write that webhooks may refuse: the status does not wait for them.
        Err(error) => {
            failure = failure.or(Some(error));
            instance
        }
    };
    let pod = observed.pod.as_ref();
    let gate = pod.and_then(|pod| gate::change(&instance, &status, pod, now));
    apply::status(&instance, status, &observed, &ctx).await?;
    apply::gate(pod, gate, &ctx).await?;
    failure.map_or(Ok(Action::requeue(RESYNC)), Err)
}
