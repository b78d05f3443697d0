//! Plain HTTP health for the kubelet: `/livez` while the launcher lives, `/readyz` while the domain runs.
//!
//! Says nothing else, so that it needs no authentication.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Why there is no health server.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// The port is taken.
    #[error("listening on port {port}")]
    Listen {
        /// TCP port.
        port: u16,
        /// What was wrong.
        source: std::io::Error,
    },
}

/// Serves health from now on; ready follows the watched value.
pub async fn serve(port: u16, ready: watch::Receiver<bool>) -> Result<(), HealthError> {
    let listener = match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Ok(listener) => listener,
        // A pod without IPv6.
        Err(_) => TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
            .await
            .map_err(|source| HealthError::Listen { port, source })?,
    };
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router(ready)).await {
            tracing::error!(%error, "serving health");
        }
    });
    Ok(())
}

fn router(ready: watch::Receiver<bool>) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .with_state(ready)
}

async fn readyz(State(ready): State<watch::Receiver<bool>>) -> (StatusCode, &'static str) {
    if *ready.borrow() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the domain does not run\n")
    }
}
