//! The aggregated API `subresources.kubevirt.io`: console, screen, ports and life of virtual machines.
//!
//! ```text
//! kube-apiserver ──mTLS of the front proxy──► who? ──► may they? ──► what is there? ──► launcher, or a patch
//! ```
//! Stateless: any replica serves any request, and a stream goes on while the other replica restarts. An error is
//! answered as a Status before anything is upgraded.

pub mod agents;
mod answer;
mod authorize;
mod discovery;
mod instance;
pub mod launcher;
mod lifecycle;
mod machine;
pub mod peer;
mod picture;
mod places;
pub mod proxy;
pub mod resources;
mod stream;

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    body::{Body, Bytes},
    extract::{FromRequestParts, Path, Request, State, WebSocketUpgrade},
    http::{Method, StatusCode, Uri, request::Parts},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use futures::StreamExt;
use kube::Client;
use kubernest_runtime::Metrics;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use serde_json::json;
use tokio::sync::Mutex;

use answer::Failure;
use instance::Instances;
use launcher::Launchers;
use machine::{Change, Machines};
use places::{MACHINES, Place, Places, STREAMS};
use proxy::{Peer, Proxy};
use resources::{EXPAND_VM_SPEC, GROUP, Operation, Subresource, VERSIONS};

const FIELD_MANAGER: &str = "kubernest-api";
/// Largest body: a few options.
const BODY_BYTES: usize = 8 << 10;
/// How long the rest of a body is waited for that is refused.
const SENDING: Duration = Duration::from_secs(5);
/// Largest machine in a body; its annotations alone may have half of it (Kubernetes' limit).
const MACHINE_BYTES: usize = 512 << 10;

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
    streams: Places,
    machines: Places,
    /// Held while a machine is read, which takes many times the memory that its text does.
    reading: Mutex<()>,
    answered: Family<Answered, Counter>,
    streaming: Family<Streaming, Gauge>,
}

/// Path parameters of a subresource.
type Target = (String, String, String, String, String);
/// Path parameters of what is asked of no object.
type Nameless = (String, String);

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
        streams: Places::new(STREAMS),
        machines: Places::new(MACHINES),
        reading: Mutex::default(),
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
        .route(
            &format!("{base}/{{version}}/namespaces/{{namespace}}/{EXPAND_VM_SPEC}"),
            any(serve_nameless),
        )
        .fallback(async || Failure::no_such_path())
        .with_state(state)
}

/// Upstream's shape: whether the API server is reached is what it tells. Asked anew each time, so not for everybody.
async fn healthz(State(shared): State<Arc<Subresources>>, Extension(peer): Extension<Peer>) -> Response {
    if peer.0.is_none() {
        return Failure::unauthorized("only the API server's aggregator may ask").into_response();
    }
    match shared.client.apiserver_version().await {
        Ok(version) => {
            let connected = json!({"connectivity": "ok", "version": version.git_version});
            Json(json!({"apiserver": connected})).into_response()
        }
        Err(error) => {
            let failed = json!({"connectivity": "failed", "error": error.to_string()});
            (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({"apiserver": failed}))).into_response()
        }
    }
}

async fn serve(
    State(shared): State<Arc<Subresources>>,
    Extension(peer): Extension<Peer>,
    Path((version, namespace, parent, name, path)): Path<Target>,
    request: Request,
) -> Response {
    // Names go into paths below, so what could be no object's name goes nowhere.
    let found = resources::find(&parent, &path).filter(|_| is_name(&name));
    answer_to(shared, peer, found, (version, namespace, name), request).await
}

async fn serve_nameless(
    State(shared): State<Arc<Subresources>>,
    Extension(peer): Extension<Peer>,
    Path((version, namespace)): Path<Nameless>,
    request: Request,
) -> Response {
    let found = resources::find(EXPAND_VM_SPEC, "");
    answer_to(shared, peer, found, (version, namespace, String::new()), request).await
}

/// Answers a request for this row; `at` is version, namespace and name.
async fn answer_to(
    shared: Arc<Subresources>,
    peer: Peer,
    found: Option<&'static Subresource>,
    at: (String, String, String),
    request: Request,
) -> Response {
    let (version, namespace, name) = at;
    let known = |_: &&Subresource| VERSIONS.contains(&version.as_str()) && is_name(&namespace);
    let Some(row) = found.filter(known) else {
        return Failure::no_such_path().into_response();
    };
    let wanted = authorize::Request {
        version,
        namespace,
        name,
        subresource: row,
    };
    let (answered, at) = (shared.answered.clone(), (wanted.namespace.clone(), wanted.name.clone()));
    let path = request.uri().path().to_owned();
    // A task of its own: a client that goes must not end what is half done.
    let handled = tokio::spawn(async move { shared.handle(&peer, wanted, request).await }).await;
    let handled = handled.unwrap_or_else(|died| Err(Failure::internal("the request's handler", &died)));
    let response = handled.unwrap_or_else(|failure| {
        let code = failure.code.as_u16();
        tracing::info!(
            namespace = at.0,
            name = at.1,
            path,
            code,
            message = failure.message,
            "refused"
        );
        failure.into_response()
    });
    let labels = Answered {
        resource: row.parent,
        subresource: row.name,
        code: response.status().as_u16(),
    };
    answered.get_or_create(&labels).inc();
    response
}

/// Whether an object can have this name (RFC 1123 subdomain).
fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    (1..=253).contains(&text.len())
        && text.bytes().all(allowed)
        && !text.starts_with(['-', '.'])
        && !text.contains("..")
}

impl Subresources {
    async fn handle(&self, peer: &Peer, wanted: authorize::Request, request: Request) -> Result<Response, Failure> {
        let user = self.proxy.user(peer, request.headers());
        let user = user.ok_or_else(|| Failure::unauthorized("only the API server's aggregator may name a user"))?;
        let changes = wanted.subresource.changes();
        let method = if changes { Method::PUT } else { Method::GET };
        if request.method() != method {
            return Err(Failure::bad_request(format!("method must be {method}")));
        }
        authorize::authorize(&self.client, &user, &wanted).await?;
        let authorize::Request { namespace, name, .. } = &wanted;
        tracing::info!(
            user = user.name,
            namespace,
            name,
            subresource = wanted.subresource.full_name(),
            "asks"
        );
        let (mut parts, body) = request.into_parts();
        if changes {
            self.change(&wanted, body).await
        } else {
            self.show(&wanted, &mut parts).await
        }
    }

    async fn change(&self, wanted: &authorize::Request, body: Body) -> Result<Response, Failure> {
        let (most, _held) = match wanted.subresource.operation {
            Operation::ExpandGiven => match place(&self.machines, "requests to expand machines", wanted) {
                Ok(place) => (MACHINE_BYTES, Some(place)),
                Err(refused) => {
                    throw_away(body, MACHINE_BYTES).await;
                    return Err(refused);
                }
            },
            _ => (BODY_BYTES, None),
        };
        let body: Bytes = axum::body::to_bytes(body, most)
            .await
            .map_err(|error| Failure::bad_request(format!("reading the body: {error}")))?;
        let (instances, machines) = (self.instances(wanted), self.machines(wanted));
        match wanted.subresource.operation {
            Operation::Start => machines.change(Change::start(&body)?).await,
            Operation::Stop => machines.change(Change::stop(&body)?).await,
            Operation::Restart => machines.change(Change::restart(&body)?).await,
            Operation::Pause => instances.pause(&body).await,
            Operation::Unpause => instances.unpause(&body).await,
            Operation::SoftReboot => instances.soft_reboot().await,
            Operation::Reset => instances.reset().await,
            Operation::ExpandGiven => {
                let _alone = self.reading.lock().await;
                machine::expand_given(&wanted.namespace, &body)
            }
            Operation::ExpandSpec
            | Operation::PortForward
            | Operation::Console
            | Operation::Vnc
            | Operation::Screenshot
            | Operation::GuestAgent => Err(Failure::no_such_path()),
        }
    }

    async fn show(&self, wanted: &authorize::Request, parts: &mut Parts) -> Result<Response, Failure> {
        let instances = self.instances(wanted);
        let uri: Uri = parts.uri.clone();
        match wanted.subresource.operation {
            Operation::ExpandSpec => self.machines(wanted).expand().await,
            Operation::GuestAgent => {
                let _held = self.hold(wanted)?;
                instances.guest_agent(wanted.subresource.name).await
            }
            Operation::Console => {
                let (upgrade, held) = self.stream(wanted, parts).await?;
                instances.console(upgrade, held).await
            }
            Operation::Vnc => {
                let (upgrade, held) = self.stream(wanted, parts).await?;
                instances.vnc(uri.query(), upgrade, held).await
            }
            Operation::Screenshot => instances.screenshot(uri.query(), self.hold(wanted)?).await,
            Operation::PortForward => {
                let (upgrade, held) = self.stream(wanted, parts).await?;
                let instance = match wanted.subresource.parent {
                    resources::MACHINES => self.machines(wanted).instance().await?,
                    _ => instances.get().await?,
                };
                instances.port_forward(&instance, &uri, upgrade, held).await
            }
            Operation::Start
            | Operation::Stop
            | Operation::Restart
            | Operation::Pause
            | Operation::Unpause
            | Operation::SoftReboot
            | Operation::Reset
            | Operation::ExpandGiven => Err(Failure::no_such_path()),
        }
    }

    fn machines(&self, wanted: &authorize::Request) -> Machines {
        Machines::new(&self.client, &wanted.namespace, &wanted.name)
    }

    fn instances(&self, wanted: &authorize::Request) -> Instances {
        Instances::new(&self.client, &self.launchers, &wanted.namespace, &wanted.name)
    }

    /// The upgrade that a stream needs, and what is given back when the stream ends.
    async fn stream(
        &self,
        wanted: &authorize::Request,
        parts: &mut Parts,
    ) -> Result<(WebSocketUpgrade, impl Send + 'static + use<>), Failure> {
        let row = wanted.subresource;
        let upgrade = WebSocketUpgrade::from_request_parts(parts, &())
            .await
            .map_err(|error| Failure::bad_request(format!("{} is a websocket: {error}", row.name)))?;
        Ok((upgrade, self.hold(wanted)?))
    }

    /// A place among all that take memory for as long as their clients like.
    fn hold(&self, wanted: &authorize::Request) -> Result<impl Send + 'static + use<>, Failure> {
        let place = place(&self.streams, "streams", wanted)?;
        Ok((place, Open::new(&self.streaming, wanted.subresource.name)))
    }
}

fn place(places: &Places, what: &str, wanted: &authorize::Request) -> Result<Place, Failure> {
    let place = places.take(&wanted.namespace);
    place.ok_or_else(|| Failure::too_many(what, &wanted.namespace))
}

/// Reads a body without keeping it: who is still sending may not hear an answer.
async fn throw_away(body: Body, most: usize) {
    let mut chunks = body.into_data_stream();
    let mut left = most;
    let reading = async {
        while let Some(Ok(chunk)) = chunks.next().await
            && chunk.len() <= left
        {
            left -= chunk.len();
        }
    };
    // Who sends slowly is not waited for.
    let _ = tokio::time::timeout(SENDING, reading).await;
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
