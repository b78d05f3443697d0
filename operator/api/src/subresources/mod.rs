//! The aggregated API `subresources.kubevirt.io`: console, screen, ports and life of virtual machines.
//!
//! ```text
//! kube-apiserver ──mTLS of the front proxy──► who? ──► may they? ──► what is there? ──► launcher, or a patch
//! ```
//! Stateless: any replica serves any request, and a stream goes on while the other replica restarts. An error is
//! answered as a Status before anything is upgraded.

mod answer;
mod authorize;
mod discovery;
mod instance;
mod launcher;
mod lifecycle;
mod machine;
pub mod peer;
pub mod proxy;
pub mod resources;
mod stream;

use std::sync::Arc;

use axum::{
    Extension, Json, Router,
    body::{Body, Bytes},
    extract::{FromRequestParts, Path, Request, State, WebSocketUpgrade},
    http::{Method, StatusCode, Uri, request::Parts},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use kube::Client;
use kubernest_runtime::Metrics;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use answer::Failure;
use instance::Instances;
use launcher::Launchers;
use machine::Machines;
use proxy::{Peer, Proxy};
use resources::{GROUP, INSTANCES, MACHINES, Subresource, VERSIONS};

const FIELD_MANAGER: &str = "kubernest-api";
/// Largest body: a few options.
const BODY_BYTES: usize = 64 << 10;
/// Streams at once in one replica; each may hold some hundred KiB.
const STREAMS: usize = 256;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    resource: &'static str,
    subresource: &'static str,
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Streaming {
    subresource: &'static str,
}

/// What the handlers share.
struct Subresources {
    client: Client,
    proxy: Proxy,
    launchers: Launchers,
    streams: Arc<Semaphore>,
    answered: Family<Answered, Counter>,
    streaming: Family<Streaming, Gauge>,
}

/// Path parameters of a subresource.
type Target = (String, String, String, String, String);

/// The routes of the group.
pub fn router(client: Client, namespace: String, proxy: Proxy, metrics: &Metrics) -> Router {
    let (answered, streaming) = (Family::default(), Family::default());
    metrics.register(
        "subresource_requests",
        "Requests to subresources answered",
        answered.clone(),
    );
    metrics.register(
        "subresource_streams",
        "Streams to virtual machines open",
        streaming.clone(),
    );
    let state = Arc::new(Subresources {
        launchers: Launchers::new(client.clone(), namespace),
        client,
        proxy,
        streams: Arc::new(Semaphore::new(STREAMS)),
        answered,
        streaming,
    });
    let base = format!("/apis/{GROUP}");
    let mut router = Router::new()
        .route("/", get(async || Json(discovery::paths())))
        .route("/apis", get(async || Json(discovery::groups())))
        .route(&base, get(async || Json(discovery::group())))
        .route("/openapi/v2", get(async || Json(discovery::openapi_v2())))
        .route("/openapi/v3", get(async || Json(discovery::openapi_v3())));
    for version in VERSIONS {
        let base = format!("{base}/{version}");
        router = router
            .route(&base, get(async move || Json(discovery::resources(version))))
            .route(&format!("{base}/version"), get(async || Json(discovery::version())))
            .route(&format!("{base}/healthz"), get(healthz))
            .route(
                &format!("/openapi/v3{base}"),
                get(async move || Json(discovery::openapi_v3_of(version))),
            );
    }
    router
        .route(
            &format!("{base}/{{version}}/namespaces/{{namespace}}/{{parent}}/{{name}}/{{*path}}"),
            any(serve),
        )
        .fallback(async || Failure::no_such_path())
        .with_state(state)
}

/// Upstream's shape: whether the API server is reached is what it tells.
async fn healthz(State(shared): State<Arc<Subresources>>) -> (StatusCode, Json<Value>) {
    match shared.client.apiserver_version().await {
        Ok(version) => {
            let connected = json!({"connectivity": "ok", "version": version.git_version});
            (StatusCode::OK, Json(json!({"apiserver": connected})))
        }
        Err(error) => {
            let failed = json!({"connectivity": "failed", "error": error.to_string()});
            (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({"apiserver": failed})))
        }
    }
}

async fn serve(
    State(shared): State<Arc<Subresources>>,
    Extension(peer): Extension<Peer>,
    Path((version, namespace, parent, name, path)): Path<Target>,
    request: Request,
) -> Response {
    let Some(row) = resources::find(&parent, &path).filter(|_| VERSIONS.contains(&version.as_str())) else {
        return Failure::no_such_path().into_response();
    };
    let wanted = authorize::Request {
        version: &version,
        namespace: &namespace,
        name: &name,
        subresource: row,
    };
    let response = match shared.handle(&peer, wanted, request).await {
        Ok(response) => response,
        Err(failure) => {
            tracing::info!(
                namespace,
                name,
                path,
                code = failure.code.as_u16(),
                message = failure.message,
                "refused"
            );
            failure.into_response()
        }
    };
    let labels = Answered {
        resource: row.parent,
        subresource: row.name,
        code: response.status().as_u16(),
    };
    shared.answered.get_or_create(&labels).inc();
    response
}

impl Subresources {
    async fn handle(&self, peer: &Peer, wanted: authorize::Request<'_>, request: Request) -> Result<Response, Failure> {
        let user = self.proxy.user(peer, request.headers());
        let user = user.ok_or_else(|| Failure::unauthorized("only the API server's aggregator may name a user"))?;
        let method = if wanted.subresource.verb() == "get" {
            Method::GET
        } else {
            Method::PUT
        };
        if request.method() != method {
            return Err(Failure::bad_request(format!("method must be {method}")));
        }
        authorize::authorize(&self.client, &user, wanted).await?;
        tracing::info!(
            user = user.name,
            namespace = wanted.namespace,
            name = wanted.name,
            subresource = wanted.subresource.name,
            "asks"
        );
        let (mut parts, body) = request.into_parts();
        if method == Method::PUT {
            return self.put(wanted, body).await;
        }
        self.get(wanted, &mut parts).await
    }

    async fn put(&self, wanted: authorize::Request<'_>, body: Body) -> Result<Response, Failure> {
        let body: Bytes = axum::body::to_bytes(body, BODY_BYTES)
            .await
            .map_err(|error| Failure::bad_request(format!("reading the body: {error}")))?;
        let instances = self.instances(wanted);
        match (wanted.subresource.parent, wanted.subresource.name) {
            (MACHINES, verb) => {
                let machines = Machines::new(&self.client, wanted.namespace, wanted.name);
                machines.change(verb, &body).await
            }
            (_, "pause") => instances.pause(&body).await,
            (_, "unpause") => instances.unpause(&body).await,
            (_, "softreboot") => instances.soft_reboot().await,
            _ => instances.reset().await,
        }
    }

    async fn get(&self, wanted: authorize::Request<'_>, parts: &mut Parts) -> Result<Response, Failure> {
        let instances = self.instances(wanted);
        let uri: Uri = parts.uri.clone();
        match (wanted.subresource.parent, wanted.subresource.name) {
            (MACHINES, "expand-spec") => {
                Machines::new(&self.client, wanted.namespace, wanted.name)
                    .expand()
                    .await
            }
            (INSTANCES, "console") => {
                let (upgrade, held) = self.stream(wanted.subresource, parts).await?;
                instances.console(upgrade, held).await
            }
            (INSTANCES, "vnc") => {
                let (upgrade, held) = self.stream(wanted.subresource, parts).await?;
                instances.vnc(uri.query(), upgrade, held).await
            }
            (_, "portforward") => {
                let (upgrade, held) = self.stream(wanted.subresource, parts).await?;
                instances.port_forward(&uri, upgrade, held).await
            }
            _ => instances.guest_agent().await,
        }
    }

    fn instances(&self, wanted: authorize::Request<'_>) -> Instances {
        Instances::new(&self.client, &self.launchers, wanted.namespace, wanted.name)
    }

    /// The upgrade that a stream needs, and what is given back when the stream ends.
    async fn stream(
        &self,
        row: &'static Subresource,
        parts: &mut Parts,
    ) -> Result<(WebSocketUpgrade, impl Send + 'static + use<>), Failure> {
        let upgrade = WebSocketUpgrade::from_request_parts(parts, &())
            .await
            .map_err(|error| Failure::bad_request(format!("{} is a websocket: {error}", row.name)))?;
        let permit = Arc::clone(&self.streams).try_acquire_owned();
        let permit = permit.map_err(|_| Failure::too_many(STREAMS))?;
        Ok((upgrade, (permit, Open::new(&self.streaming, row.name))))
    }
}

/// Counts an open stream while it lives.
struct Open(Gauge);

impl Open {
    fn new(family: &Family<Streaming, Gauge>, subresource: &'static str) -> Self {
        let gauge = family.get_or_create_owned(&Streaming { subresource });
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}
