//! What is written for an instance: its pod is created once, deleted with its grace, its status follows; events tell
//! people. Nothing is decided here but whether a write is needed.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use kube::ResourceExt;
use kube::api::{DeleteParams, Patch, PatchParams};
use kubernest_crds::kubevirt::v1::{
    PRESET_CONFLICTS, VMI_FINALIZER, VirtualMachineInstance, VirtualMachineInstanceStatus, phase, vmi_conditions,
};
use kubernest_crds::labels;
use serde_json::json;

use super::dereference::{Observed, belongs};
use super::validate::Machine;
use super::{Error, build, console, credentials, ending, is_final, phase_of, resources};
use crate::names::{LABEL_MAX, MANAGER};
use crate::write::{self, Created};
use crate::{Context, conditions};

/// Puts the finalizer on, if it is not; `None` when the instance changed meanwhile, which its watch event will tell.
pub async fn hold(
    instance: Arc<VirtualMachineInstance>,
    ctx: &Context,
) -> Result<Option<Arc<VirtualMachineInstance>>, Error> {
    let held = instance.finalizers().iter().any(|name| name == VMI_FINALIZER);
    if held || instance.metadata.deletion_timestamp.is_some() {
        return Ok(Some(instance));
    }
    match ctx.applier.add_finalizer(&*instance, VMI_FINALIZER).await {
        Ok(held) => {
            ctx.fresh.wrote(&held);
            Ok(Some(Arc::new(held)))
        }
        Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(None),
        Err(error) => Err(Error::Finalizer(error)),
    }
}

/// Lets the instance go.
pub async fn release(instance: &VirtualMachineInstance, observed: &Observed, ctx: &Context) -> Result<(), Error> {
    match ctx.applier.remove_finalizer(instance, VMI_FINALIZER).await {
        // It changed meanwhile, which its watch event will tell.
        Err(error) if error.is_conflict() => {}
        other => other.map_err(Error::Finalizer)?,
    }
    ctx.fresh.forget(instance);
    observed.pod.iter().for_each(|pod| ctx.fresh.forget(pod));
    Ok(())
}

/// Creates the launcher pod, its Secret first, or returns the one that was created before a restart.
///
/// The pod is rehearsed before: the cache may not have the one that is there already, which has a Secret of its own, and
/// each Secret made for a pod that is then refused would stay as long as the instance. What a crash between the two leaves
/// does stay that long: there is no right to delete Secrets, its ownerReference does it.
pub async fn start(machine: &Machine, observed: &Observed, ctx: &Context) -> Result<Pod, Error> {
    let instance = &machine.instance;
    let accelerator = resources::accelerator(ctx.options.emulation, instance, &observed.nodes);
    let pair = credentials::name(instance).map_err(Error::NameSecret)?;
    let pod = build::launcher_pod(machine, accelerator, &ctx.options.launcher_image, &pair).map_err(Error::Build)?;
    match write::rehearse(&ctx.client, &pod).await.map_err(Error::CreatePod)? {
        Created::New(pod) if resources::shares_processors(&instance.spec, &pod) => return Err(Error::NotGuaranteed),
        Created::New(_) => {}
        Created::Existing(pod) => return own(pod, instance),
        Created::Lost => return Err(Error::PodNameTaken(pod.name_any())),
    }
    let issued = ctx.trust.launcher(&instance.uid().unwrap_or_default()).await;
    let secret = credentials::secret(pair, instance, &issued.map_err(Error::Certificate)?);
    // If that name is taken after all, the next attempt has another.
    let created = write::create_own(&ctx.client, &secret).await;
    created.map_err(Error::CreateSecret)?;
    match write::create(&ctx.client, &pod).await.map_err(Error::CreatePod)? {
        Created::New(pod) => {
            tracing::info!(pod = pod.name_any(), ?accelerator, "launcher pod created");
            let note = format!("Created launcher pod {}", pod.name_any());
            ctx.events
                .normal(instance, "SuccessfulCreate", "CreatePod", &note)
                .await;
            Ok(pod)
        }
        Created::Existing(pod) => own(pod, instance),
        Created::Lost => Err(Error::PodNameTaken(pod.name_any())),
    }
}

/// The pod that has the launcher pod's name, if it was made for this instance.
fn own(pod: Pod, instance: &VirtualMachineInstance) -> Result<Pod, Error> {
    if belongs(&pod, instance) {
        Ok(pod)
    } else {
        Err(Error::PodNameTaken(pod.name_any()))
    }
}

/// Deletes the pod of an instance that is over or shall be; the kubelet gives it its grace.
///
/// A pod on a node that does not answer stays until Kubernetes knows the node to be off: it is never forced away.
pub async fn end(instance: &VirtualMachineInstance, observed: &Observed, ctx: &Context) -> Result<(), Error> {
    let Some(pod) = &observed.pod else { return Ok(()) };
    let Some(grace) = ending::deletion(instance, pod, observed.node) else {
        return Ok(());
    };
    let params = DeleteParams {
        grace_period_seconds: Some(grace),
        ..DeleteParams::background()
    };
    tracing::info!(pod = pod.name_any(), grace, "launcher pod is deleted");
    ctx.applier.delete_with(pod, params).await.map_err(Error::DeletePod)
}

/// Writes the status if it differs, tells people what changed, then answers a request for the console's tail.
pub async fn status(
    instance: &VirtualMachineInstance,
    wanted: VirtualMachineInstanceStatus,
    observed: &Observed,
    ctx: &Context,
) -> Result<(), Error> {
    let mut current = instance.clone();
    if instance.status.as_ref() != Some(&wanted) {
        let Some(written) = write::status(&ctx.client, instance, &wanted)
            .await
            .map_err(Error::Status)?
        else {
            return Ok(());
        };
        ctx.fresh.wrote(&written);
        tell(instance, &wanted, ctx).await;
        current = written;
    }
    let Some((request, pod)) = console::wanted(&current, observed) else {
        return Ok(());
    };
    let tail = console::read(request, pod, ctx).await.map_err(Error::Console)?;
    let answered = VirtualMachineInstanceStatus {
        console_tail: Some(tail),
        ..current.status.clone().unwrap_or_default()
    };
    if let Some(written) = write::status(&ctx.client, &current, &answered)
        .await
        .map_err(Error::Status)?
    {
        ctx.fresh.wrote(&written);
    }
    Ok(())
}

/// Labels the instance with its node, in the version that `status` follows from; `None` when it changed meanwhile, which its
/// watch event will tell.
///
/// A write of its own, as those of a status take no labels along.
pub async fn place(
    instance: Arc<VirtualMachineInstance>,
    status: &VirtualMachineInstanceStatus,
    ctx: &Context,
) -> Result<Option<Arc<VirtualMachineInstance>>, Error> {
    let Some(node) = missing_place(&instance, status) else {
        return Ok(Some(instance));
    };
    let change = json!({"metadata": {
        "uid": instance.uid(), "resourceVersion": instance.resource_version(), "labels": {(labels::NODE_NAME): node},
    }});
    let patched = write::api::<VirtualMachineInstance>(&ctx.client, &instance)
        .patch(&instance.name_any(), &params(), &Patch::Merge(change))
        .await;
    match patched {
        Ok(patched) => {
            ctx.fresh.wrote(&patched);
            Ok(Some(Arc::new(patched)))
        }
        Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => Ok(None),
        Err(error) => Err(Error::Place(error)),
    }
}

/// The node that the instance is to be labelled with, and is not.
pub fn missing_place<'a>(
    instance: &VirtualMachineInstance,
    status: &'a VirtualMachineInstanceStatus,
) -> Option<&'a String> {
    let labelled = instance.labels().get(labels::NODE_NAME);
    // Nobody looks for it there any more.
    let goes = instance.metadata.deletion_timestamp.is_some() || status.phase.as_deref().is_some_and(is_final);
    let node = status.node_name.as_ref().filter(|_| !goes)?;
    // Names of nodes may be longer than labels.
    (node.len() <= LABEL_MAX && labelled != Some(node)).then_some(node)
}

fn params() -> PatchParams {
    PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    }
}

/// Changes the condition of the pod's readiness gate, in the very pod that was seen.
pub async fn gate(pod: Option<&Pod>, change: Option<PodCondition>, ctx: &Context) -> Result<(), Error> {
    // Its cache may not have the last change; then its watch event will tell.
    let Some((pod, condition)) = pod.filter(|pod| !ctx.fresh.is_stale(*pod)).zip(change) else {
        return Ok(());
    };
    let body = json!({"metadata": {"uid": pod.uid()}, "status": {"conditions": [condition]}});
    let patched = write::api::<Pod>(&ctx.client, pod)
        .patch_status(&pod.name_any(), &params(), &Patch::Strategic(body))
        .await;
    match patched {
        Ok(patched) => ctx.fresh.wrote(&patched),
        // It is gone.
        Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => {}
        Err(error) => return Err(Error::Gate(error)),
    }
    Ok(())
}

/// Events for a new phase and for new trouble.
async fn tell(before: &VirtualMachineInstance, now: &VirtualMachineInstanceStatus, ctx: &Context) {
    let past = before.status.clone().unwrap_or_default();
    let ready = conditions::get(&now.conditions, vmi_conditions::READY);
    let message = ready.and_then(|ready| ready.message.clone()).unwrap_or_default();
    let reason = now.reason.clone().unwrap_or_default();
    let phase = now.phase.as_deref().unwrap_or_default();
    if phase_of(before).is_empty()
        && let Some(left_out) = before.annotations().get(PRESET_CONFLICTS)
    {
        let note = format!("Presets that contradict the instance were left out: {left_out}");
        ctx.events.warning(before, "PresetFailed", "ApplyPreset", &note).await;
    }
    if phase != phase_of(before) {
        tracing::info!(phase, reason, message, "phase");
        let known = past.phase_transition_timestamps.len();
        for begun in now.phase_transition_timestamps.iter().skip(known) {
            ctx.figures.reached(before, &begun.phase, Timestamp::now());
        }
        match phase {
            phase::RUNNING => ctx.events.normal(before, "Started", "Start", "The guest runs").await,
            phase::SUCCEEDED => ctx.events.normal(before, &reason, "Stop", &message).await,
            phase::FAILED => ctx.events.warning(before, &reason, "Stop", &message).await,
            _ => {}
        }
    }
    for kind in [vmi_conditions::SYNCHRONIZED, super::POD_SCHEDULED] {
        let Some(trouble) = conditions::is_false(&now.conditions, kind) else {
            continue;
        };
        let known = conditions::is_false(&past.conditions, kind).is_some_and(|known| known.reason == trouble.reason);
        if !known {
            let reason = trouble.reason.clone().unwrap_or_default();
            let message = trouble.message.clone().unwrap_or_default();
            ctx.events.warning(before, &reason, "Start", &message).await;
        }
    }
}
