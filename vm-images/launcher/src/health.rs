//! Plain HTTP health for the kubelet: `/livez` while the launcher lives, `/readyz` while the domain runs.
//!
//! Says nothing else, so that it needs no authentication.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Serves health from now on; ready follows the watched value.
pub fn serve(listener: TcpListener, ready: watch::Receiver<bool>) {
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router(ready)).await {
            tracing::error!(%error, "serving health");
        }
    });
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
