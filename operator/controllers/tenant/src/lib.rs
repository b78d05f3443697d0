//! The tenant half: TenantClusters become VirtualMachines, keys, a network and a route, and what belongs inside.
//!
//! It never sees a pod, a launcher or libvirt, and links neither a CNI plugin nor an ingress: those read its objects.

mod options;
pub mod tenantcluster;

use std::{sync::Arc, time::Duration};

use futures::channel::mpsc;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Secret, Service};
use kube::{
    Api, Client,
    core::DynamicObject,
    runtime::{Controller, reflector::Store, watcher},
};
use kubernest_crds::{TenantCluster, kubevirt::v1::VirtualMachine, labels};
use kubernest_runtime::{Applier, CancellationToken, Metrics, Settings, controller, events::Recorder};

pub use options::{NodeImage, NodeImages, Options};
use tenantcluster::{Context, build::network::nad_kind, reconcile};

/// Field manager of everything that this crate applies.
pub const FIELD_MANAGER: &str = "kubernest-tenant";
/// Name of the controller in metrics and logs.
const CONTROLLER: &str = "tenantcluster";
/// Reconciles at the same time. One whose tenant is paused, starved or hostile waits for up to a minute and does nothing
/// meanwhile; so many of them must not hold up the others.
const CONCURRENCY: u16 = 128;
/// Time between looks for connections whose TenantCluster is gone.
const FORGET: Duration = Duration::from_secs(10);

/// Runs the controller until shutdown.
pub async fn run(client: Client, options: Options, metrics: Metrics, shutdown: CancellationToken) {
    let (wake, woken) = mpsc::unbounded();
    let applier = Applier::new(client.clone(), FIELD_MANAGER);
    let recorder = Recorder::new(client.clone(), FIELD_MANAGER);
    let context = Arc::new(Context::new(applier, recorder, options, wake));
    run_with(client, context, woken, metrics, shutdown).await;
}

/// [`run`] with a context of the caller's.
pub async fn run_with(
    client: Client,
    context: Arc<Context>,
    woken: mpsc::UnboundedReceiver<kube::runtime::reflector::ObjectRef<TenantCluster>>,
    metrics: Metrics,
    shutdown: CancellationToken,
) {
    let ours = watcher::Config::default().labels(labels::CLUSTER);
    let attachments = Api::<DynamicObject>::all_with(client.clone(), &nad_kind());
    let tenants = Controller::new(Api::<TenantCluster>::all(client.clone()), watcher::Config::default())
        .owns(Api::<VirtualMachine>::all(client.clone()), ours.clone())
        .owns(Api::<Secret>::all(client.clone()), ours.clone())
        .owns(Api::<PersistentVolumeClaim>::all(client.clone()), ours.clone())
        .owns(Api::<Service>::all(client), ours.clone())
        .owns_with(attachments, nad_kind(), ours)
        .reconcile_on(woken);
    let settings = Settings {
        concurrency: CONCURRENCY,
        ..Settings::new(metrics.controller(CONTROLLER), shutdown)
    };
    let clusters = tenants.store();
    tokio::select! {
        () = controller::run(tenants, settings, reconcile, context.clone()) => {}
        () = forget(&context, clusters) => {}
    }
}

async fn forget(context: &Context, clusters: Store<TenantCluster>) {
    if clusters.wait_until_ready().await.is_err() {
        return std::future::pending().await;
    }
    let mut times = tokio::time::interval(FORGET);
    loop {
        times.tick().await;
        context.forget_gone(&clusters);
    }
}
