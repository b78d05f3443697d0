//! TCP ports of the pod's network namespace.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::TcpListener;

/// Why nobody listens.
#[derive(Debug, thiserror::Error)]
#[error("listening on port {port}")]
pub struct ListenError {
    /// TCP port.
    port: u16,
    /// What was wrong.
    source: std::io::Error,
}

/// Listens on all addresses of the pod.
pub async fn listen(port: u16) -> Result<TcpListener, ListenError> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Ok(listener) => Ok(listener),
        // A pod without IPv6.
        Err(_) => TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
            .await
            .map_err(|source| ListenError { port, source }),
    }
}
