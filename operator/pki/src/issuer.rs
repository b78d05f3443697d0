//! The issuer trait: who signs a tenant's leaves. Keys never pass through it.

use futures::future::BoxFuture;
use jiff::Timestamp;
use rcgen::{KeyPair, PublicKeyData};

use crate::{CertificateInfo, CsrError, InspectError, Leaf, SigningRequest};

/// Why a certificate was not issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// No key pair.
    #[error("making a key failed")]
    Key(#[source] rcgen::Error),
    /// No request for the key.
    #[error("making the certificate request failed")]
    Request(#[source] CsrError),
    /// The issuer did not sign.
    #[error("signing the certificate of {name:?} failed")]
    Sign {
        /// Common name asked for.
        name: String,
        /// The issuer's own error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What came back is no certificate.
    #[error("reading the signed certificate failed")]
    Inspect(#[source] InspectError),
}

/// A signed certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedCertificate {
    /// The leaf and its intermediates, PEM, leaf first.
    pub chain_pem: String,
    /// When it ends.
    pub not_after: Timestamp,
}

/// A certificate with its key.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    /// The leaf and its intermediates, PEM, leaf first.
    pub chain_pem: String,
    /// PKCS #8 private key, PEM.
    pub key_pem: String,
    /// When the certificate ends.
    pub not_after: Timestamp,
}

/// Never shows the key.
impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credential")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// Signs leaves for one CA.
pub trait Issuer: Send + Sync {
    /// The CA certificates that clients and servers shall trust, PEM.
    fn ca_bundle(&self) -> BoxFuture<'_, Result<String, IssueError>>;

    /// Signs the request's key with the names and usages of `leaf`; the request's own names are not taken over.
    fn sign<'a>(
        &'a self,
        request: &'a SigningRequest,
        leaf: &'a Leaf,
    ) -> BoxFuture<'a, Result<SignedCertificate, IssueError>>;
}

/// Makes a key and has it signed.
pub async fn issue(issuer: &dyn Issuer, leaf: &Leaf) -> Result<Credential, IssueError> {
    let key = KeyPair::generate().map_err(IssueError::Key)?;
    let request = SigningRequest::for_key(&leaf.common_name, &key).map_err(IssueError::Request)?;
    let signed = issuer.sign(&request, leaf).await?;
    Ok(Credential {
        chain_pem: signed.chain_pem,
        key_pem: key.serialize_pem(),
        not_after: signed.not_after,
    })
}

impl Credential {
    /// Reads a stored pair. Does not check that key and certificate belong together, see [`Credential::is_pair`].
    pub fn from_pem(chain_pem: &str, key_pem: &str) -> Result<Self, IssueError> {
        let info = CertificateInfo::from_pem(chain_pem).map_err(IssueError::Inspect)?;
        Ok(Credential {
            chain_pem: chain_pem.to_owned(),
            key_pem: key_pem.to_owned(),
            not_after: info.not_after,
        })
    }

    /// Whether key and certificate belong together; a pair that was stored at once does.
    pub fn is_pair(&self) -> bool {
        let key = KeyPair::from_pem(&self.key_pem);
        let info = CertificateInfo::from_pem(&self.chain_pem);
        matches!((key, info), (Ok(key), Ok(info)) if info.public_key() == key.subject_public_key_info())
    }
}
