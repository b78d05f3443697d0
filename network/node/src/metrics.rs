//! Metrics of the agent, its health, and the small HTTP server for both. Serves nothing that changes anything.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use http::{StatusCode, header};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::attach::Attacher;

/// Seconds; attaching takes tens of milliseconds, the first of a network some hundreds.
const BUCKETS: [f64; 10] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Command {
    command: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    command: String,
    code: u32,
}

/// All metrics.
pub struct Metrics {
    registry: Registry,
    calls: Family<Outcome, Counter>,
    seconds: Family<Command, Histogram>,
    networks: Gauge<i64, AtomicI64>,
    ports: Gauge<i64, AtomicI64>,
    nodes: Gauge<i64, AtomicI64>,
    kvm: Gauge<i64, AtomicI64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("kubernest_node");
        let calls = Family::<Outcome, Counter>::default();
        registry.register(
            "cni_calls",
            "CNI calls by command and CNI error code, 0 for success",
            calls.clone(),
        );
        let seconds = Family::<Command, Histogram>::new_with_constructor(|| Histogram::new(BUCKETS));
        registry.register("cni_call_seconds", "Time of CNI calls in seconds", seconds.clone());
        let gauge = |registry: &mut Registry, name, help| {
            let gauge = Gauge::<i64, AtomicI64>::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let networks = gauge(&mut registry, "networks", "Tenant networks on this node");
        let ports = gauge(
            &mut registry,
            "ports",
            "Pods' interfaces on tenant networks on this node",
        );
        let nodes = gauge(
            &mut registry,
            "peers",
            "Nodes of the cluster as the overlay knows them, this one included",
        );
        let kvm = gauge(
            &mut registry,
            "accelerator_kvm",
            "1 when the accelerator probe found KVM usable, else 0",
        );
        Self {
            registry,
            calls,
            seconds,
            networks,
            ports,
            nodes,
            kvm,
        }
    }
}

impl Metrics {
    /// Counts a CNI call.
    pub fn cni(&self, command: &str, code: u32, took: Duration) {
        let command = command.to_owned();
        self.calls
            .get_or_create(&Outcome {
                command: command.clone(),
                code,
            })
            .inc();
        self.seconds
            .get_or_create(&Command { command })
            .observe(took.as_secs_f64());
    }

    /// Notes what the overlay holds.
    pub fn census(&self, networks: usize, ports: usize) {
        self.networks.set(networks.try_into().unwrap_or(i64::MAX));
        self.ports.set(ports.try_into().unwrap_or(i64::MAX));
    }

    /// Notes the number of the cluster's nodes.
    pub fn nodes(&self, nodes: usize) {
        self.nodes.set(nodes.try_into().unwrap_or(i64::MAX));
    }

    /// Notes what the accelerator probe found.
    pub fn kvm(&self, usable: bool) {
        self.kvm.set(usable.into());
    }

    fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).map(|()| text)
    }
}

type Shared = (Arc<Metrics>, Arc<Attacher>);

/// Serves `/livez` (also as `/healthz`), `/readyz` (with what is waited for) and `/metrics`.
///
/// # Errors
/// When the address cannot be listened on, or the server ends.
pub async fn serve(address: SocketAddr, metrics: Arc<Metrics>, attacher: Arc<Attacher>) -> std::io::Result<()> {
    let router = Router::new()
        .route("/livez", get(async || "ok"))
        .route("/healthz", get(async || "ok"))
        .route("/readyz", get(ready))
        .route("/metrics", get(text))
        .with_state((metrics, attacher));
    axum::serve(tokio::net::TcpListener::bind(address).await?, router).await
}

async fn ready(State((_, attacher)): State<Shared>) -> (StatusCode, String) {
    match attacher.ready() {
        Ok(()) => (StatusCode::OK, "ok".into()),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
    }
}

async fn text(
    State((metrics, attacher)): State<Shared>,
) -> Result<([(header::HeaderName, &'static str); 1], String), StatusCode> {
    if let Ok((networks, ports)) = attacher.overlay().census().await {
        metrics.census(networks, ports);
    }
    let text = metrics.text().map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok((
        [(
            header::CONTENT_TYPE,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        )],
        text,
    ))
}
