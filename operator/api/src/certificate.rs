//! The serving certificate of this replica: made in memory, replaced while connections go on.
//!
//! Its key is never written anywhere.

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use kubernest_pki::{CertificateInfo, EmbeddedIssuer, Leaf, San, issue};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    server::{ClientHello, ResolvesServerCert, VerifierBuilderError, WebPkiClientVerifier},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

/// How long a serving certificate is valid; it is replaced after two thirds.
const VALIDITY: Duration = Duration::from_secs(24 * 3600);

/// Why there is no serving certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The CA did not sign.
    #[error("issuing the serving certificate failed")]
    Issue(#[source] kubernest_pki::IssueError),
    /// The issued certificate cannot be read.
    #[error("reading the serving certificate failed")]
    Inspect(#[source] kubernest_pki::InspectError),
    /// The issued PEM cannot be read.
    #[error("reading the serving certificate's PEM failed")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// rustls takes neither key nor certificate.
    #[error("loading the serving certificate failed")]
    Load(#[source] rustls::Error),
}

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// rustls finds no protocol version.
    #[error("no TLS version can be spoken")]
    Versions(#[from] rustls::Error),
    /// Nothing to trust.
    #[error("client certificates cannot be verified")]
    Clients(#[from] VerifierBuilderError),
}

/// The certificate in use. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Serving {
    current: Arc<RwLock<Option<Arc<CertifiedKey>>>>,
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Serving {
    /// A TLS configuration that serves whatever certificate is in use at the moment of a handshake. With `clients`,
    /// a client may show a certificate, and is cut off if that is not of those; one without is served all the same.
    ///
    /// # Errors
    /// When rustls finds no protocol version to speak, or nothing to trust in `clients`.
    pub fn tls_config(&self, clients: Option<RootCertStore>) -> Result<ServerConfig, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(roots) => builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .allow_unauthenticated()
                    .build()?,
            ),
        };
        let mut config = builder.with_cert_resolver(Arc::new(self.clone()));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }

    /// Issues a certificate for `names` and puts it to use.
    ///
    /// # Errors
    /// [`CertificateError`]; the certificate in use stays.
    pub async fn renew(&self, ca: &EmbeddedIssuer, names: &[String]) -> Result<CertificateInfo, CertificateError> {
        let leaf = Leaf {
            validity: VALIDITY,
            ..Leaf::server("kubernest-api", names.iter().map(|name| san(name)).collect())
        };
        let credential = issue(ca, &leaf).await.map_err(CertificateError::Issue)?;
        let info = CertificateInfo::from_pem(&credential.chain_pem).map_err(CertificateError::Inspect)?;
        let chain = CertificateDer::pem_slice_iter(credential.chain_pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(CertificateError::Pem)?;
        let key = PrivateKeyDer::from_pem_slice(credential.key_pem.as_bytes()).map_err(CertificateError::Pem)?;
        let key = ring::sign::any_supported_type(&key).map_err(CertificateError::Load)?;
        let certified = Arc::new(CertifiedKey::new(chain, key));
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(certified);
        Ok(info)
    }
}

/// A subject alternative name from what stands in a flag.
fn san(name: &str) -> San {
    name.parse::<IpAddr>()
        .map_or_else(|_| San::Dns(name.to_owned()), San::Ip)
}

/// Names of a Service as clients inside the cluster write them.
pub fn service_names(service: &str, namespace: &str) -> Vec<String> {
    vec![
        format!("{service}.{namespace}.svc"),
        format!("{service}.{namespace}.svc.cluster.local"),
    ]
}
