//! Stories of machines with processors of their own: what their pods are to the API server.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Method, Request, Response};
use kube::client::{Body, ClientBuilder};
use kubernest_crds::kubevirt::v1::phase;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tower::Service;
use tower::layer::layer_fn;

use super::refused;
use crate::support::stage::{Controllers, Stage, Theatre, machine};

fn pinned() -> Value {
    let mut machine = machine();
    machine["spec"]["template"]["spec"]["domain"]["cpu"] =
        json!({"cores": 2, "dedicatedCpuPlacement": true, "isolateEmulatorThread": true});
    machine
}

/// The API server itself says that the pod has a claim to whole processors, and the instance repeats it.
pub async fn reconcile_dedicated_processors(stage: &Stage) {
    stage.create(pinned()).await;
    let running = |status: &kubernest_crds::kubevirt::v1::VirtualMachineInstanceStatus| {
        status.phase.as_deref() == Some(phase::RUNNING)
    };
    let instance = stage
        .instance_when("running instance", |instance| {
            instance.status.as_ref().is_some_and(running)
        })
        .await;
    assert_eq!(instance.status.unwrap().qos_class.as_deref(), Some("Guaranteed"));
    let pod = stage.pod().await;
    let spec = pod.spec.unwrap();
    assert_eq!(spec.node_selector.unwrap()["kubevirt.io/cpumanager"], "true");
    let resources = spec.containers[0].resources.clone().unwrap();
    assert_eq!(resources.limits.unwrap()["cpu"].0, "3");
}

/// Where pods are changed on their way so that no node would give them processors, none is made.
pub async fn reconcile_changed_pods(theatre: &Theatre) {
    let client = ClientBuilder::try_from(theatre.controllers_config().await).unwrap();
    let meddle = layer_fn(|inner| Unlimited(Arc::new(Mutex::new(inner))));
    let client = client.with_layer(&meddle).build();
    let stage = Stage::with_controllers(theatre, "changed", Controllers::start(client)).await;
    stage.create(pinned()).await;
    refused(
        &stage,
        "FailedGuaranteePodResources",
        "failed to guarantee pod resources",
    )
    .await;
}

/// Another admission, as far as the API server can tell: it takes the limits of processors off pods.
#[derive(Clone)]
struct Unlimited<S>(Arc<Mutex<S>>);

impl<S, B> Service<Request<Body>> for Unlimited<S>
where
    S: Service<Request<Body>, Response = Response<B>> + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let inner = self.0.clone();
        Box::pin(async move {
            let request = unlimited(request).await;
            let answer = {
                let mut inner = inner.lock().await;
                poll_fn(|context| inner.poll_ready(context)).await?;
                inner.call(request)
            };
            answer.await
        })
    }
}

async fn unlimited(request: Request<Body>) -> Request<Body> {
    if request.method() != Method::POST || !request.uri().path().ends_with("/pods") {
        return request;
    }
    let (parts, body) = request.into_parts();
    let mut pod: Value = serde_json::from_slice(&body.collect_bytes().await.unwrap()).unwrap();
    let limits = &mut pod["spec"]["containers"][0]["resources"]["limits"];
    limits.as_object_mut().unwrap().remove("cpu");
    Request::from_parts(parts, Body::from(pod.to_string().into_bytes()))
}
