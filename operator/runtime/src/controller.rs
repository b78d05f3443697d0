//! The loop around a reconciler: concurrency, back-off per object, metrics and logs by error step, graceful shutdown.
//!
//! What to watch is the caller's (`kube::runtime::Controller`); what to do is the reconciler's.

use std::{convert::Infallible, fmt::Debug, future::Future, hash::Hash, sync::Arc, time::Duration};

use futures::{FutureExt, Stream, StreamExt};
use kube::{
    Resource, ResourceExt,
    runtime::{
        Controller,
        controller::{Action, Config, Error, applier},
        reflector::{ObjectRef, Store},
    },
};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{backoff, metrics::ControllerMetrics, telemetry::chain};

/// An error that names the step of the reconcile that failed, as a metric label: snake_case, few values.
pub trait StepError: std::error::Error + Send + Sync + 'static {
    /// The step.
    fn step(&self) -> &'static str;
}

/// How long running reconciles may go on after shutdown: below a pod's 30 s, so that the Lease can still be released.
/// A reconcile that is broken off is made good by the next one.
pub const GRACE: Duration = Duration::from_secs(15);

/// Namespace and name.
type Key = (Option<String>, String);

/// How a controller runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Reconciles at the same time, over all objects; the same object is never reconciled twice at once.
    pub concurrency: u16,
    /// How long to gather events of an object before reconciling it.
    pub debounce: Duration,
    /// Where to count; names the controller.
    pub metrics: ControllerMetrics,
    /// Cancelled when the process stops: running reconciles end, no new ones start.
    pub shutdown: CancellationToken,
}

impl Settings {
    /// Settings that suit most controllers: 8 at a time, no debounce.
    pub fn new(metrics: ControllerMetrics, shutdown: CancellationToken) -> Self {
        Self {
            concurrency: 8,
            debounce: Duration::ZERO,
            metrics,
            shutdown,
        }
    }

    fn config(&self) -> Config {
        Config::default().concurrency(self.concurrency).debounce(self.debounce)
    }
}

/// Runs `controller` until shutdown.
pub async fn run<K, Ctx, Reconcile, Fut, E>(
    controller: Controller<K>,
    settings: Settings,
    reconcile: Reconcile,
    context: Arc<Ctx>,
) where
    K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Debug + Clone + Eq + Hash + Unpin + Send + Sync + 'static,
    Ctx: Send + Sync + 'static,
    Reconcile: Fn(Arc<K>, Arc<Ctx>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Action, E>> + Send + 'static,
    E: StepError,
{
    let attempts = Attempts::new(&settings.metrics);
    let (tried, failed, ended) = (attempts.clone(), attempts.clone(), attempts);
    let store = controller.store();
    let running = controller
        .with_config(settings.config())
        .graceful_shutdown_on(settings.shutdown.clone().cancelled_owned())
        .run(
            move |object: Arc<K>, context| tried.follow(key(&*object), reconcile(object, context)),
            move |object: Arc<K>, error: &E, _| failed.retry(key(&*object), error),
            context,
        )
        .for_each(|outcome| {
            ended.outcome(outcome);
            std::future::ready(())
        });
    until_shutdown(settings, store, running).await;
}

/// [`run`] for objects that the caller watches itself: several controllers then share their caches, and `queue` can name
/// an object after the cache has what it is named for. Events of one object are gathered while it waits for its turn.
pub async fn run_queue<K, Ctx, Reconcile, Fut, E>(
    store: Store<K>,
    queue: impl Stream<Item = ObjectRef<K>> + Send,
    settings: Settings,
    reconcile: Reconcile,
    context: Arc<Ctx>,
) where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
    Ctx: Send + Sync + 'static,
    Reconcile: Fn(Arc<K>, Arc<Ctx>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Action, E>> + Send + 'static,
    E: StepError,
{
    let attempts = Attempts::new(&settings.metrics);
    let (tried, failed, ended) = (attempts.clone(), attempts.clone(), attempts);
    let queue = queue
        .map(Ok::<_, Infallible>)
        .take_until(settings.shutdown.clone().cancelled_owned());
    let running = applier(
        move |object: Arc<K>, context| tried.follow(key(&*object), reconcile(object, context)).boxed(),
        move |object: Arc<K>, error: &E, _| failed.retry(key(&*object), error),
        context,
        store.clone(),
        queue,
        settings.config(),
    )
    .for_each(|outcome| {
        ended.outcome(outcome);
        std::future::ready(())
    });
    until_shutdown(settings, store, running).await;
}

/// Waits for `running` to end by itself after shutdown, for [`GRACE`].
async fn until_shutdown<K>(settings: Settings, store: Store<K>, running: impl Future<Output = ()>)
where
    K: Resource + Clone + 'static,
    K::DynamicType: Eq + Hash + Clone,
{
    let name = settings.metrics.name();
    tracing::info!(controller = name, "starts");
    let overdue = async {
        settings.shutdown.cancelled().await;
        // kube-runtime's runner never ends before its first list is complete; nothing runs then either.
        if store.wait_until_ready().now_or_never().is_some() {
            tokio::time::sleep(GRACE).await;
            tracing::warn!(controller = name, "reconciles are still running, they are broken off");
        }
    };
    tokio::select! {
        () = running => {}
        () = overdue => {}
    }
    tracing::info!(controller = name, "stopped");
}

fn key(object: &impl ResourceExt) -> Key {
    (object.namespace(), object.name_any())
}

/// Counts, logs and spaces out the attempts of one controller.
#[derive(Clone)]
struct Attempts {
    metrics: ControllerMetrics,
    failures: Arc<backoff::Failures<Key>>,
}

impl Attempts {
    fn new(metrics: &ControllerMetrics) -> Self {
        Self {
            metrics: metrics.clone(),
            failures: Arc::default(),
        }
    }

    /// One reconcile, in a span that names the object.
    fn follow<E: StepError, Fut: Future<Output = Result<Action, E>> + Send>(
        &self,
        key: Key,
        reconcile: Fut,
    ) -> impl Future<Output = Result<Action, E>> + Send + use<E, Fut> {
        let span = tracing::info_span!(
            "reconcile",
            controller = self.metrics.name(),
            namespace = key.0.as_deref().unwrap_or_default(),
            name = key.1
        );
        let this = self.clone();
        async move {
            let _running = this.metrics.start();
            let result = reconcile.await;
            match &result {
                Ok(_) => this.failures.succeeded(&key),
                Err(error) => {
                    this.metrics.error(error.step());
                    tracing::warn!(step = error.step(), error = chain(error), "reconcile failed");
                }
            }
            this.metrics.set_retrying(this.failures.len());
            result
        }
        .instrument(span)
    }

    fn retry(&self, key: Key, error: &impl StepError) -> Action {
        let delay = self.failures.failed(&key, backoff::retry_after(error));
        self.metrics.set_retrying(self.failures.len());
        Action::requeue(delay)
    }

    fn outcome<K, E, Q>(&self, outcome: Result<(ObjectRef<K>, Action), Error<E, Q>>)
    where
        K: Resource,
        E: StepError,
        Q: std::error::Error + 'static,
    {
        match outcome {
            Ok(_) | Err(Error::ReconcilerFailed(..)) => {}
            // Deleted between the event and its turn; its failures are of no more interest.
            Err(Error::ObjectNotFound(object)) => {
                self.failures
                    .succeeded(&(object.namespace.clone(), object.name.clone()));
                self.metrics.set_retrying(self.failures.len());
            }
            Err(error) => {
                self.metrics.error("watch");
                let (controller, error) = (self.metrics.name(), chain(&error));
                tracing::warn!(controller, error, "watch failed, it is tried again");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, time::Duration};

    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::{Api, Client, client::Body, runtime::watcher};

    use super::*;
    use crate::Metrics;

    #[derive(Debug, thiserror::Error)]
    #[error("never")]
    struct Never;

    impl StepError for Never {
        fn step(&self) -> &'static str {
            "never"
        }
    }

    #[tokio::test]
    async fn controller_stops_though_its_kind_is_not_served() {
        let service = tower::service_fn(|_: http::Request<Body>| async {
            let mut response = http::Response::new(Body::empty());
            *response.status_mut() = http::StatusCode::NOT_FOUND;
            Ok::<_, Infallible>(response)
        });
        let maps: Api<ConfigMap> = Api::all(Client::new(service, "default"));
        let shutdown = CancellationToken::new();
        let settings = Settings::new(Metrics::new().controller("test"), shutdown.clone());
        let reconcile = |_: Arc<ConfigMap>, _: Arc<()>| async { Err::<Action, _>(Never) };
        let controller = Controller::new(maps, watcher::Config::default());
        let running = tokio::spawn(run(controller, settings, reconcile, Arc::new(())));
        tokio::task::yield_now().await;
        shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(5), running)
            .await
            .unwrap()
            .unwrap();
    }
}
