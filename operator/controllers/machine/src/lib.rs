//! The machine half of Kubernest: `VirtualMachine` → `VirtualMachineInstance` → launcher pod.
//!
//! Three controllers on one set of watches ([`stores`]). A VirtualMachine keeps an instance in being as its run strategy
//! says, a replica set as many as it is asked for; an instance is one run and owns at most one launcher pod, whose state it
//! reports. Decisions are pure functions
//! (`validate`, `build`, `status`); what writes stands in `apply`. Each launcher gets a certificate of one CA ([`trust`]).
//! Deliberately not here: tenant clusters, the inside of a launcher, admission.

mod conditions;
mod freshness;
mod metrics;
mod names;
mod stores;
mod trust;
mod virtualmachine;
mod virtualmachineinstance;
mod virtualmachineinstancereplicaset;
mod write;

use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use kube::Client;
use kubernest_runtime::controller::run_queue;
use kubernest_runtime::{Applier, CancellationToken, Metrics, Settings, events::Recorder};
use tokio::task::JoinSet;

use crate::freshness::Freshness;
use crate::metrics::Figures;
use crate::stores::Stores;
use crate::trust::Trust;

pub use names::{ANNOTATION_TEMPLATE_HASH, ANNOTATION_VM_GENERATION, MANAGER, launcher_pod};
pub use virtualmachineinstance::resources::overhead_bytes;

/// Reconciles at the same time, over all objects of a kind.
const CONCURRENCY: u16 = 16;
/// An object that nothing triggered for this long is looked at again: reads only, a net below the watches.
const RESYNC: Duration = Duration::from_secs(3600);

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

/// What the controllers share.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) applier: Applier,
    pub(crate) events: Recorder,
    pub(crate) stores: Stores,
    pub(crate) fresh: Freshness,
    pub(crate) trust: Trust,
    pub(crate) figures: Figures,
    pub(crate) options: Options,
}

/// Runs the controllers until `shutdown`; `namespace` is where Kubernest itself runs, and keeps its Secrets.
pub async fn run(client: Client, namespace: &str, options: Options, metrics: Metrics, shutdown: CancellationToken) {
    let (stores, queues, watches) = Stores::open(&client);
    let applier = Applier::new(client.clone(), MANAGER);
    let trust = Trust::new(&client, &applier, namespace);
    let context = Arc::new(Context {
        applier,
        events: Recorder::new(client.clone(), MANAGER),
        client,
        stores: stores.clone(),
        fresh: Freshness::default(),
        trust: trust.clone(),
        figures: Figures::register(&metrics, stores.machines.clone(), stores.instances.clone()),
        options,
    });
    // Aborted when dropped, so that ending this future ends everything.
    let (mut watching, mut controllers) = (JoinSet::new(), JoinSet::new());
    watching.spawn(watches);
    // Machines are looked at after a first attempt, so that none fails to start for want of a CA that is there.
    let (look_again, ready) = tokio::select! {
        first = futures::future::join(trust.settle(), stores.wait_until_ready()) => first,
        () = shutdown.cancelled() => return,
    };
    if ready.is_err() {
        return;
    }
    watching.spawn(trust.keep(look_again));
    let settings = |name| Settings {
        concurrency: CONCURRENCY,
        ..Settings::new(metrics.controller(name), shutdown.clone())
    };
    controllers.spawn(run_queue(
        stores.machines.clone(),
        queues.machines,
        settings("virtualmachine"),
        virtualmachine::reconcile,
        context.clone(),
    ));
    controllers.spawn(run_queue(
        stores.replica_sets.clone(),
        queues.replica_sets,
        settings("virtualmachineinstancereplicaset"),
        virtualmachineinstancereplicaset::reconcile,
        context.clone(),
    ));
    controllers.spawn(run_queue(
        stores.instances,
        queues.instances,
        settings("virtualmachineinstance"),
        virtualmachineinstance::reconcile,
        context,
    ));
    while controllers.join_next().await.is_some() {}
}
