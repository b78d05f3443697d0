//! What is written for a VirtualMachine: its instance is created or deleted, its status and finalizer follow.
//!
//! A failed instance is counted in the status before it is deleted, so that a restart in between counts it once.

use std::sync::Arc;

use kube::ResourceExt;
use kube::api::{DeleteParams, Patch, PatchParams};
use kubernest_crds::kubevirt::v1::{
    StateChangeRequest, VM_FINALIZER, VirtualMachine, VirtualMachineInstance,
    VirtualMachineInstanceCondition as Condition, VirtualMachineStatus, run_strategy, vm_conditions,
};
use serde::Serialize;
use serde_json::json;

use super::dereference::owns;
use super::validate::Strategy;
use super::{Error, build, plan, reasons, requests};
use crate::Context;
use crate::conditions::get;
use crate::names::MANAGER;
use crate::write::{self, Created};

/// Puts the finalizer on, if it is not; `None` when the machine changed meanwhile, which its watch event will tell.
pub async fn hold(machine: Arc<VirtualMachine>, ctx: &Context) -> Result<Option<Arc<VirtualMachine>>, Error> {
    let held = machine.finalizers().iter().any(|name| name == VM_FINALIZER);
    if held || machine.metadata.deletion_timestamp.is_some() {
        return Ok(Some(machine));
    }
    match ctx.applier.add_finalizer(&*machine, VM_FINALIZER).await {
        Ok(held) => {
            ctx.fresh.wrote(&held);
            Ok(Some(Arc::new(held)))
        }
        Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(None),
        Err(error) => Err(Error::Finalizer(error)),
    }
}

/// Creates the instance, or returns the one that was created before a restart.
pub async fn create(
    machine: &VirtualMachine,
    strategy: Option<Strategy>,
    ctx: &Context,
) -> Result<VirtualMachineInstance, Error> {
    let paused = strategy.is_some_and(|strategy| plan::starts_paused(machine, strategy));
    let instance = build::instance(machine, paused).map_err(Error::Build)?;
    match write::create(&ctx.client, &instance).await.map_err(Error::Create)? {
        Created::New(instance) => {
            tracing::info!("instance created");
            let note = format!(
                "Started the virtual machine by creating the instance {}",
                instance.name_any()
            );
            ctx.events
                .normal(machine, "SuccessfulCreate", "CreateInstance", &note)
                .await;
            Ok(instance)
        }
        Created::Existing(instance) if owns(machine, &instance) => Ok(instance),
        Created::Existing(_) => Err(Error::NameTaken(machine.name_any())),
        Created::Lost => Err(Error::Vanished(machine.name_any())),
    }
}

/// Makes a halted machine one that always runs, as a start does; the request for that start stays until it is made.
pub async fn turn_on(machine: &VirtualMachine, ctx: &Context) -> Result<(), Error> {
    let spec = match machine.spec.running {
        Some(_) => json!({"running": true}),
        None => json!({"runStrategy": run_strategy::ALWAYS}),
    };
    // Bound to what was seen: nobody's later word is overruled.
    let change = json!({"metadata": {"resourceVersion": machine.resource_version()}, "spec": spec});
    let params = PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let patched = write::api::<VirtualMachine>(&ctx.client, machine)
        .patch(&machine.name_any(), &params, &Patch::Merge(change))
        .await;
    match patched {
        Ok(patched) => {
            tracing::info!("a halted machine is turned on, to be started paused");
            ctx.fresh.wrote(&patched);
            Ok(())
        }
        // It changed meanwhile, which its watch event will tell.
        Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => Ok(()),
        Err(error) => Err(Error::TurnOn(error)),
    }
}

/// Deletes the instance; its own finalizer holds it until its process is gone.
pub async fn delete(machine: &VirtualMachine, instance: &VirtualMachineInstance, ctx: &Context) -> Result<(), Error> {
    tracing::info!(
        phase = crate::virtualmachineinstance::phase_of(instance),
        "instance is deleted"
    );
    ctx.applier
        .delete_with(instance, DeleteParams::background())
        .await
        .map_err(Error::Delete)?;
    let note = format!(
        "Stopped the virtual machine by deleting the instance {}",
        instance.name_any()
    );
    ctx.events
        .normal(machine, "SuccessfulDelete", "DeleteInstance", &note)
        .await;
    Ok(())
}

/// Writes the status if it differs; false when the machine changed in between and has to be looked at again.
pub async fn status(machine: &VirtualMachine, wanted: &VirtualMachineStatus, ctx: &Context) -> Result<bool, Error> {
    if machine.status.as_ref() == Some(wanted) {
        return Ok(true);
    }
    let applied = Applied {
        status: wanted,
        state_change_requests: requests_are_done(machine, wanted).then_some([]),
    };
    let Some(written) = write::status(&ctx.client, machine, &applied)
        .await
        .map_err(Error::Status)?
    else {
        return Ok(false);
    };
    ctx.fresh.wrote(&written);
    tell(machine, wanted, ctx).await;
    Ok(true)
}

/// A status as it is applied. Requests that are done must be named, as an empty list: somebody else wrote them, and what
/// server-side apply leaves out stays with its other owners.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Applied<'a> {
    #[serde(flatten)]
    status: &'a VirtualMachineStatus,
    #[serde(skip_serializing_if = "Option::is_none")]
    state_change_requests: Option<[StateChangeRequest; 0]>,
}

fn requests_are_done(before: &VirtualMachine, wanted: &VirtualMachineStatus) -> bool {
    let before = before.status.as_ref();
    wanted.state_change_requests.is_empty() && before.is_some_and(|before| !before.state_change_requests.is_empty())
}

/// Events for a new failure and for requests that cannot be carried out.
async fn tell(before: &VirtualMachine, now: &VirtualMachineStatus, ctx: &Context) {
    // Told as they are dropped; at once, since events of one reason are gathered into one.
    let faults = requests::faults(before).join("; ");
    if !faults.is_empty() {
        let action = "ChangeState";
        ctx.events.warning(before, reasons::BAD_REQUEST, action, &faults).await;
    }
    let failure =
        |all: &[Condition]| get(all, vm_conditions::FAILURE).map(|found| (found.reason.clone(), found.message.clone()));
    let past = before.status.as_ref().and_then(|status| failure(&status.conditions));
    let Some(found) = failure(&now.conditions).filter(|found| Some(found) != past.as_ref()) else {
        return;
    };
    let (reason, message) = (found.0.unwrap_or_default(), found.1.unwrap_or_default());
    ctx.events.warning(before, &reason, "RunInstance", &message).await;
}

/// Lets the machine go.
pub async fn release(machine: &VirtualMachine, ctx: &Context) -> Result<(), Error> {
    match ctx.applier.remove_finalizer(machine, VM_FINALIZER).await {
        // It changed meanwhile, which its watch event will tell.
        Err(error) if error.is_conflict() => {}
        other => other.map_err(Error::Finalizer)?,
    }
    ctx.fresh.forget(machine);
    Ok(())
}
