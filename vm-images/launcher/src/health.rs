//! Plain HTTP for the kubelet and Prometheus: `/livez` while the launcher lives, `/readyz` while the domain runs,
//! `/metrics` with what it uses.
//!
//! It says nothing else, so that it needs no authentication.

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header::CONTENT_TYPE};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::chain;
use crate::meter::{self, Meter, MeterError};

/// Serves from now on; ready follows the watched value.
pub fn serve(listener: TcpListener, ready: watch::Receiver<bool>, meter: Meter) {
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router(ready, meter)).await {
            tracing::error!(%error, "serving health");
        }
    });
}

fn router(ready: watch::Receiver<bool>, meter: Meter) -> Router {
    let metrics = Router::new().route("/metrics", get(metrics)).with_state(meter);
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .with_state(ready)
        .merge(metrics)
}

async fn readyz(State(ready): State<watch::Receiver<bool>>) -> (StatusCode, &'static str) {
    if *ready.borrow() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the domain does not run\n")
    }
}

async fn metrics(State(meter): State<Meter>) -> (StatusCode, [(HeaderName, &'static str); 1], String) {
    match meter.text().await {
        Ok(text) => (StatusCode::OK, [(CONTENT_TYPE, meter::CONTENT_TYPE)], text),
        Err(error) => {
            if !matches!(error, MeterError::NotRunning) {
                tracing::debug!(error = chain(&error), "reading what the machine uses");
            }
            let sentence = format!("{error}\n");
            (
                StatusCode::SERVICE_UNAVAILABLE,
                [(CONTENT_TYPE, "text/plain")],
                sentence,
            )
        }
    }
}
