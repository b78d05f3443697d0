//! The machine half of Kubernest: `VirtualMachine` → `VirtualMachineInstance` → launcher pod.
//!
//! Two controllers on one set of watches ([`stores`]). A VirtualMachine keeps an instance in being as its run strategy
//! says; an instance is one run and owns at most one launcher pod, whose state it reports. Decisions are pure functions
//! (`validate`, `build`, `status`); what writes stands in `apply`.
//! Deliberately not here: tenant clusters, the inside of a launcher, admission.

mod conditions;
mod freshness;
mod names;
mod runner;
mod stores;
mod virtualmachine;
mod virtualmachineinstance;
mod write;

use std::sync::Arc;

use clap::{Args, ValueEnum};
use kube::Client;
use kubernest_runtime::{Applier, CancellationToken, Metrics, events::Recorder};
use tokio::task::JoinSet;

use crate::freshness::Freshness;
use crate::stores::Stores;

pub use names::{ANNOTATION_TEMPLATE_HASH, ANNOTATION_VM_GENERATION, MANAGER, launcher_pod};
pub use virtualmachineinstance::resources::overhead_bytes;

/// Flags of the machine controllers.
#[derive(Clone, Debug, Args)]
// clap names a group after the struct; two structs of one name in one command clash.
#[group(skip)]
pub struct Options {
    /// Image of the launcher, best by digest.
    #[arg(long, env = "KUBERNEST_LAUNCHER_IMAGE")]
    pub launcher_image: String,
    /// Whether machines may run without hardware virtualisation.
    #[arg(long, env = "KUBERNEST_EMULATION", value_enum, default_value_t = Emulation::Auto)]
    pub emulation: Emulation,
}

/// Whether machines may run without hardware virtualisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Emulation {
    /// Where no node that can take the machine offers KVM.
    Auto,
    /// Even where there is KVM.
    Always,
    /// Never: a machine waits for a node with KVM.
    Never,
}

/// What both controllers share.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) applier: Applier,
    pub(crate) events: Recorder,
    pub(crate) stores: Stores,
    pub(crate) fresh: Freshness,
    pub(crate) options: Options,
}

/// Runs both controllers until `shutdown`.
pub async fn run(client: Client, options: Options, metrics: Metrics, shutdown: CancellationToken) {
    let (stores, queues, watches) = Stores::open(&client);
    let context = Arc::new(Context {
        applier: Applier::new(client.clone(), MANAGER),
        events: Recorder::new(client.clone(), MANAGER),
        client,
        stores: stores.clone(),
        fresh: Freshness::default(),
        options,
    });
    // Aborted when dropped, so that ending this future ends everything.
    let (mut watching, mut controllers) = (JoinSet::new(), JoinSet::new());
    watching.spawn(watches);
    tokio::select! {
        ready = stores.wait_until_ready() => if ready.is_err() { return },
        () = shutdown.cancelled() => return,
    }
    controllers.spawn(runner::run(
        stores.machines.clone(),
        queues.machines,
        metrics.controller("virtualmachine"),
        shutdown.clone(),
        virtualmachine::reconcile,
        context.clone(),
    ));
    controllers.spawn(runner::run(
        stores.instances,
        queues.instances,
        metrics.controller("virtualmachineinstance"),
        shutdown,
        virtualmachineinstance::reconcile,
        context,
    ));
    while controllers.join_next().await.is_some() {}
}
