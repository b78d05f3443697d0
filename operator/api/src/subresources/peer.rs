//! Carries the client certificate's name from the TLS handshake to the request handlers.

use std::{future::Future, io, pin::Pin};

use axum::{Extension, middleware::AddExtension};
use axum_server::{
    accept::Accept,
    tls_rustls::{RustlsAcceptor, RustlsConfig},
};
use kubernest_pki::CertificateInfo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::server::TlsStream;
use tower::Layer;

use super::proxy::Peer;

/// An acceptor that adds [`Peer`] to every request of a connection.
#[derive(Clone)]
pub struct PeerAcceptor(RustlsAcceptor);

impl PeerAcceptor {
    /// With this TLS configuration.
    pub fn new(config: RustlsConfig) -> Self {
        Self(RustlsAcceptor::new(config))
    }
}

type Accepted<I, S> = io::Result<(TlsStream<I>, AddExtension<S, Peer>)>;

impl<I, S> Accept<I, S> for PeerAcceptor
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Send + 'static,
{
    type Stream = TlsStream<I>;
    type Service = AddExtension<S, Peer>;
    type Future = Pin<Box<dyn Future<Output = Accepted<I, S>> + Send>>;

    fn accept(&self, stream: I, service: S) -> Self::Future {
        let acceptor = self.0.clone();
        Box::pin(async move {
            let (stream, service) = acceptor.accept(stream, service).await?;
            let certificates = stream.get_ref().1.peer_certificates();
            let name = certificates
                .and_then(<[_]>::first)
                .and_then(|leaf| CertificateInfo::from_der(leaf).ok())
                .map(|leaf| leaf.common_name);
            Ok((stream, Extension(Peer(name)).layer(service)))
        })
    }
}
