//! The loop around a reconciler: concurrency, back-off per object, metrics and logs by error step, graceful shutdown.
//!
//! What to watch is the caller's (`kube::runtime::Controller`); what to do is the reconciler's.

use std::{fmt::Debug, future::Future, hash::Hash, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt};
use kube::{
    Resource, ResourceExt,
    runtime::{
        Controller,
        controller::{Action, Config},
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
    let Settings {
        concurrency,
        debounce,
        metrics,
        shutdown,
    } = settings;
    let name = metrics.name();
    let failures: Arc<backoff::Failures<Key>> = Arc::default();

    let reconciler = {
        let (metrics, failures) = (metrics.clone(), failures.clone());
        move |object: Arc<K>, context: Arc<Ctx>| {
            let span = tracing::info_span!(
                "reconcile",
                controller = name,
                namespace = object.namespace().unwrap_or_default(),
                name = object.name_any()
            );
            let key = (object.namespace(), object.name_any());
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
        }
    };
    let retry = {
        let (metrics, failures) = (metrics.clone(), failures.clone());
        move |object: Arc<K>, error: &E, _: Arc<Ctx>| {
            let delay = failures.failed(&(object.namespace(), object.name_any()), backoff::retry_after(error));
            metrics.set_retrying(failures.len());
            Action::requeue(delay)
        }
    };

    tracing::info!(controller = name, "starts");
    let store = controller.store();
    let running = controller
        .with_config(Config::default().concurrency(concurrency).debounce(debounce))
        .graceful_shutdown_on(shutdown.clone().cancelled_owned())
        .run(reconciler, retry, context)
        .for_each(|outcome| {
            use kube::runtime::controller::Error;
            match outcome {
                Ok(_) | Err(Error::ReconcilerFailed(..)) => {}
                // Deleted between the event and its turn; its failures are of no more interest.
                Err(Error::ObjectNotFound(object)) => {
                    failures.succeeded(&(object.namespace.clone(), object.name.clone()));
                    metrics.set_retrying(failures.len());
                }
                Err(error) => {
                    metrics.error("watch");
                    tracing::warn!(
                        controller = name,
                        error = chain(&error),
                        "watch failed, it is tried again"
                    );
                }
            }
            std::future::ready(())
        });
    let overdue = async {
        shutdown.cancelled().await;
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
