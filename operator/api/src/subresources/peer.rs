//! Carries the client certificate's name from the TLS handshake to the request handlers, and bounds connections: any pod may
//! open some, hostile guests as well.

use std::{future::Future, io, pin::Pin, sync::Arc};

use axum::{Extension, middleware::AddExtension};
use axum_server::{
    accept::Accept,
    tls_rustls::{RustlsAcceptor, RustlsConfig},
};
use kubernest_pki::CertificateInfo;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tower::Layer;

use super::{
    places::{CONNECTIONS, Place, Places},
    proxy::Peer,
};

/// An acceptor that adds [`Peer`] to every request of a connection.
#[derive(Clone)]
pub struct PeerAcceptor {
    tls: RustlsAcceptor,
    connections: Places,
}

impl PeerAcceptor {
    /// With this TLS configuration.
    pub fn new(config: RustlsConfig) -> Self {
        Self {
            tls: RustlsAcceptor::new(config),
            connections: Places::new(CONNECTIONS),
        }
    }
}

/// The connection's place goes with its service.
type Served<S> = AddExtension<AddExtension<S, Peer>, Arc<Place>>;
type Accepted<S> = io::Result<(TlsStream<TcpStream>, Served<S>)>;

impl<S> Accept<TcpStream, S> for PeerAcceptor
where
    S: Send + 'static,
{
    type Stream = TlsStream<TcpStream>;
    type Service = Served<S>;
    type Future = Pin<Box<dyn Future<Output = Accepted<S>> + Send>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let Self { tls, connections } = self.clone();
        Box::pin(async move {
            let peer = stream.peer_addr()?.ip().to_canonical();
            let Some(place) = connections.take(&peer.to_string()) else {
                tracing::debug!(%peer, "too many connections at once");
                return Err(io::ErrorKind::QuotaExceeded.into());
            };
            let (stream, service) = tls.accept(stream, service).await?;
            let certificates = stream.get_ref().1.peer_certificates();
            let name = certificates
                .and_then(<[_]>::first)
                .and_then(|leaf| CertificateInfo::from_der(leaf).ok())
                .map(|leaf| leaf.common_name);
            let service = Extension(Peer(name)).layer(service);
            Ok((stream, Extension(Arc::new(place)).layer(service)))
        })
    }
}
