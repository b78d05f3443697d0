//! The loop around a reconciler whose events come from the shared watches of [`crate::stores`].
//!
//! `kube::runtime::Controller` opens watches of its own, so two controllers on the same kinds would hold everything
//! twice, and a trigger could run ahead of the cache that the decision reads. Here an event triggers only after the cache
//! has it. Back-off, metrics and log fields are those of `kubernest_runtime::controller`.
//! Deliberately not here: what to watch and what to do.

use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{FutureExt, StreamExt};
use kube::runtime::controller::{Action, Config, Error, applier};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Resource, ResourceExt};
use kubernest_runtime::telemetry::chain;
use kubernest_runtime::{CancellationToken, ControllerMetrics, StepError, backoff};
use tracing::Instrument;

/// Reconciles at the same time, over all objects of a kind.
const CONCURRENCY: u16 = 16;
/// An object that nothing triggered for this long is looked at again: reads only, a net below the watches.
pub const RESYNC: Duration = Duration::from_secs(3600);

/// Runs `reconcile` for each queued object until shutdown; one object is never reconciled twice at once.
pub async fn run<K, Ctx, Reconcile, Fut, E>(
    store: Store<K>,
    queue: UnboundedReceiver<ObjectRef<K>>,
    metrics: ControllerMetrics,
    shutdown: CancellationToken,
    reconcile: Reconcile,
    context: Arc<Ctx>,
) where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
    Ctx: Send + Sync + 'static,
    Reconcile: Fn(Arc<K>, Arc<Ctx>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Action, E>> + Send + 'static,
    E: StepError,
{
    let name = metrics.name();
    let failures: Arc<backoff::Failures<ObjectRef<K>>> = Arc::default();
    let reconciler = {
        let (metrics, failures) = (metrics.clone(), failures.clone());
        move |object: Arc<K>, context: Arc<Ctx>| {
            let span = tracing::info_span!(
                "reconcile",
                controller = name,
                namespace = object.namespace().unwrap_or_default(),
                name = object.name_any()
            );
            let key = ObjectRef::from_obj(&*object);
            let (metrics, failures) = (metrics.clone(), failures.clone());
            let future = reconcile(object, context);
            async move {
                let _running = metrics.start();
                let result = future.await;
                match &result {
                    Ok(_) => failures.succeeded(&key),
                    Err(error) => {
                        metrics.error(error.step());
                        tracing::warn!(step = error.step(), error = chain(error), "reconcile failed");
                    }
                }
                metrics.set_retrying(failures.len());
                result
            }
            .instrument(span)
            .boxed()
        }
    };
    let retry = {
        let failures = failures.clone();
        move |object: Arc<K>, error: &E, _: Arc<Ctx>| {
            Action::requeue(failures.failed(&ObjectRef::from_obj(&*object), backoff::retry_after(error)))
        }
    };
    let queue = queue
        .map(Ok::<_, std::convert::Infallible>)
        .take_until(shutdown.cancelled_owned());
    tracing::info!(controller = name, "starts");
    applier(
        reconciler,
        retry,
        context,
        store,
        queue,
        Config::default().concurrency(CONCURRENCY),
    )
    .for_each(|outcome| {
        match outcome {
            Ok(_) | Err(Error::ReconcilerFailed(..)) => {}
            // Deleted between the event and its turn; its failures are of no more interest.
            Err(Error::ObjectNotFound(object)) => {
                let mut gone = ObjectRef::<K>::new(&object.name);
                gone.namespace = object.namespace.clone();
                failures.succeeded(&gone);
            }
            Err(error) => tracing::warn!(controller = name, error = chain(&error), "work queue failed"),
        }
        std::future::ready(())
    })
    .await;
    tracing::info!(controller = name, "stopped");
}
