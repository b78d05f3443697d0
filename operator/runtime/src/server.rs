//! The plain-HTTP port of a process: `/metrics`, `/healthz` (the process runs) and `/readyz` (it can do its work).
//!
//! It serves no API and no profiler.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{Router, http::StatusCode, http::header::CONTENT_TYPE, response::IntoResponse, routing::get};
use tokio_util::sync::CancellationToken;

use crate::metrics::{self, Metrics};

/// Why the port could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken or not ours.
    #[error("cannot listen on {addr} for metrics and health")]
    Bind {
        /// Address asked for.
        addr: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Accepting connections failed.
    #[error("serving metrics and health ended")]
    Serve(#[source] std::io::Error),
}

/// What must hold before a process is ready, by name. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    waits: Arc<Mutex<BTreeMap<&'static str, bool>>>,
}

impl Readiness {
    /// Declares that `what` must hold, and whether it does now.
    pub fn set(&self, what: &'static str, holds: bool) {
        self.waits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(what, holds);
    }

    /// Names of what does not hold yet; empty when ready.
    pub fn missing(&self) -> Vec<&'static str> {
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        waits
            .iter()
            .filter(|(_, holds)| !**holds)
            .map(|(what, _)| *what)
            .collect()
    }
}

/// Routes of `/healthz` and `/readyz`, for servers that also listen elsewhere.
pub fn health_routes(readiness: Readiness) -> Router {
    let ready = move || {
        let missing = readiness.missing();
        async move {
            if missing.is_empty() {
                (StatusCode::OK, "ok".to_owned())
            } else {
                (
                    StatusCode::SERVICE_UNAVAILABLE,
                    format!("waits for {}", missing.join(", ")),
                )
            }
        }
    };
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(ready))
}

/// Serves metrics and health on `addr` until `shutdown`.
///
/// # Errors
/// When the address cannot be bound or accepting fails.
pub async fn serve(
    addr: SocketAddr,
    metrics: Metrics,
    readiness: Readiness,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let listener = tokio::net::TcpListener::bind(addr)
        .await
        .map_err(|source| ServeError::Bind { addr, source })?;
    let scrape = move || {
        let text = metrics.encode();
        async move { ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response() }
    };
    let router = health_routes(readiness).route("/metrics", get(scrape));
    axum::serve(listener, router)
        .with_graceful_shutdown(async move { shutdown.cancelled().await })
        .await
        .map_err(ServeError::Serve)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_names_what_is_missing() {
        let readiness = Readiness::default();
        readiness.set("certificate", false);
        readiness.set("webhook", true);
        assert_eq!(readiness.missing(), ["certificate"]);
        readiness.set("certificate", true);
        assert!(readiness.missing().is_empty());
    }
}
