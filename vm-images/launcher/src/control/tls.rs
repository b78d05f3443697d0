//! The control port's side of mTLS: its key pair, and whose certificate it believes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kubernest_domain::control::{CLIENT_NAME, files};
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use webpki::EndEntityCert;

/// Why there is nothing to shake hands with.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsError {
    /// A file.
    #[error("reading {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What was wrong.
        source: io::Error,
    },
    /// Its content.
    #[error("decoding {path}")]
    Pem {
        /// Which.
        path: PathBuf,
        /// What was wrong.
        source: pem::Error,
    },
    /// The clients' CA.
    #[error("using {} as CA", files::CA)]
    Ca(#[source] rustls::Error),
    /// The check of clients.
    #[error("checking clients by {}", files::CA)]
    Verifier(#[source] VerifierBuilderError),
    /// The launcher's key pair.
    #[error("using {} with {}", files::CERTIFICATE, files::KEY)]
    KeyPair(#[source] rustls::Error),
}

/// Why a client whose certificate the CA has signed is not spoken to.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    /// It showed none.
    #[error("there is none")]
    Missing,
    /// Our own constant is no DNS name.
    #[error("its expected name")]
    Name(#[source] InvalidDnsNameError),
    /// It is not for this client.
    #[error("it is not valid for {CLIENT_NAME}")]
    Other(#[source] webpki::Error),
}

/// What the launcher shows and demands: TLS 1.2 or 1.3, and a client's certificate of the CA in the folder. webpki
/// refuses one whose extended key usage is another than that of a client (RFC 5280 allows one without; the operator
/// issues none).
pub(super) async fn config(folder: &Path) -> Result<ServerConfig, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(folder.join(files::CA)).await? {
        roots.add(certificate).map_err(TlsError::Ca)?;
    }
    let chain = certificates(folder.join(files::CERTIFICATE)).await?;
    let path = folder.join(files::KEY);
    let key = PrivateKeyDer::from_pem_slice(&read(&path).await?).map_err(|source| TlsError::Pem { path, source })?;

    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(TlsError::Verifier)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(TlsError::KeyPair)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(TlsError::KeyPair)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // Every connection has a configuration of its own: no session is ever resumed.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The CA vouches for more than one name: only one of them is let in.
pub(super) fn check_client(connection: &ServerConnection) -> Result<(), ClientError> {
    let certificate = connection
        .peer_certificates()
        .and_then(<[_]>::first)
        .ok_or(ClientError::Missing)?;
    let name = ServerName::try_from(CLIENT_NAME).map_err(ClientError::Name)?;
    EndEntityCert::try_from(certificate)
        .and_then(|certificate| certificate.verify_is_valid_for_subject_name(&name))
        .map_err(ClientError::Other)
}

async fn certificates(path: PathBuf) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(&path).await?;
    CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|source| TlsError::Pem { path, source })
}

async fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    tokio::fs::read(path).await.map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}
