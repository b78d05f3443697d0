//! The embedded issuer: the CA's key is at hand (from a Secret of the outer cluster). Stores nothing.

use std::time::Duration;

use futures::future::{BoxFuture, ready};
use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SubjectPublicKeyInfo,
};
use time::OffsetDateTime;

use crate::{
    BACKDATE, CA_VALIDITY, InspectError, IssueError, Issuer, Leaf, RandomError, San, SignedCertificate, SigningRequest,
    inspect::CertificateInfo, random,
};

/// Why the embedded issuer failed.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// No key pair, or the stored one can't be read.
    #[error("the CA's key can't be made or read")]
    Key(#[source] rcgen::Error),
    /// The stored CA certificate can't be read.
    #[error("the CA's certificate can't be read")]
    Certificate(#[source] InspectError),
    /// The stored CA certificate can't issue.
    #[error("the CA's certificate can't be used to sign")]
    Signer(#[source] rcgen::Error),
    /// Key and certificate are of two CAs.
    #[error("the CA's certificate and key do not belong together")]
    Mismatch,
    /// No serial number.
    #[error("no serial number")]
    Serial(#[source] RandomError),
    /// A point in time that X.509 can't express.
    #[error("the validity is out of range")]
    Validity,
    /// A name that X.509 can't express.
    #[error("the name {0:?} can't stand in a certificate")]
    Name(String),
    /// The signature failed.
    #[error("the signature failed")]
    Sign(#[source] rcgen::Error),
}

/// A CA as it is stored: certificate and key, PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct CaMaterial {
    /// The self-signed certificate.
    pub certificate_pem: String,
    /// Its PKCS #8 key. Stays in the outer cluster.
    pub key_pem: String,
}

impl CaMaterial {
    /// Makes a CA that signs leaves only, valid for [`CA_VALIDITY`].
    pub fn generate(common_name: &str) -> Result<Self, EmbeddedError> {
        let key = KeyPair::generate().map_err(EmbeddedError::Key)?;
        let mut params = params(common_name, None, CA_VALIDITY)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
        ];
        let certificate = params.self_signed(&key).map_err(EmbeddedError::Sign)?;
        Ok(CaMaterial {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }
}

/// A bare key pair, PEM: service-account tokens are signed with one.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyMaterial {
    /// SubjectPublicKeyInfo.
    pub public_pem: String,
    /// PKCS #8.
    pub private_pem: String,
}

impl KeyMaterial {
    /// Makes an ECDSA P-256 key pair.
    pub fn generate() -> Result<Self, EmbeddedError> {
        let key = KeyPair::generate().map_err(EmbeddedError::Key)?;
        Ok(KeyMaterial {
            public_pem: key.public_key_pem(),
            private_pem: key.serialize_pem(),
        })
    }
}

/// Signs with a CA key held in memory.
pub struct EmbeddedIssuer {
    certificate_pem: String,
    not_after: Timestamp,
    signer: rcgen::Issuer<'static, KeyPair>,
}

impl EmbeddedIssuer {
    /// An issuer from stored material; certificate and key must belong together.
    pub fn new(material: &CaMaterial) -> Result<Self, EmbeddedError> {
        let key = KeyPair::from_pem(&material.key_pem).map_err(EmbeddedError::Key)?;
        let info = CertificateInfo::from_pem(&material.certificate_pem).map_err(EmbeddedError::Certificate)?;
        if info.public_key() != key.subject_public_key_info() {
            return Err(EmbeddedError::Mismatch);
        }
        let signer = rcgen::Issuer::from_ca_cert_pem(&material.certificate_pem, key).map_err(EmbeddedError::Signer)?;
        Ok(EmbeddedIssuer {
            certificate_pem: material.certificate_pem.clone(),
            not_after: info.not_after,
            signer,
        })
    }

    /// The CA certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// When the CA ends.
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    fn sign_now(&self, request: &SigningRequest, leaf: &Leaf) -> Result<SignedCertificate, EmbeddedError> {
        let mut params = params(&leaf.common_name, leaf.organization.as_deref(), leaf.validity)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if leaf.usage.server() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if leaf.usage.client() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        params.subject_alt_names = leaf.sans.iter().map(san).collect::<Result<_, _>>()?;
        let public_key = SubjectPublicKeyInfo::from_der(request.public_key()).map_err(EmbeddedError::Key)?;
        let certificate = params
            .signed_by(&public_key, &self.signer)
            .map_err(EmbeddedError::Sign)?;
        let not_after =
            Timestamp::from_second(params.not_after.unix_timestamp()).map_err(|_| EmbeddedError::Validity)?;
        Ok(SignedCertificate {
            chain_pem: certificate.pem(),
            not_after,
        })
    }
}

impl Issuer for EmbeddedIssuer {
    fn ca_bundle(&self) -> BoxFuture<'_, Result<String, IssueError>> {
        Box::pin(ready(Ok(self.certificate_pem.clone())))
    }

    fn sign<'a>(
        &'a self,
        request: &'a SigningRequest,
        leaf: &'a Leaf,
    ) -> BoxFuture<'a, Result<SignedCertificate, IssueError>> {
        let signed = self.sign_now(request, leaf).map_err(|source| IssueError::Sign {
            name: leaf.common_name.clone(),
            source: Box::new(source),
        });
        Box::pin(ready(signed))
    }
}

fn params(
    common_name: &str,
    organization: Option<&str>,
    validity: Duration,
) -> Result<CertificateParams, EmbeddedError> {
    let now = Timestamp::now();
    let at = |timestamp: Result<Timestamp, jiff::Error>| {
        let seconds = timestamp.map_err(|_| EmbeddedError::Validity)?.as_second();
        OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| EmbeddedError::Validity)
    };
    let mut params = CertificateParams::default();
    params.not_before = at(now.checked_sub(BACKDATE))?;
    params.not_after = at(now.checked_add(validity))?;
    params.serial_number = Some(random::serial().map_err(EmbeddedError::Serial)?);
    params.distinguished_name = DistinguishedName::new();
    if let Some(organization) = organization {
        params.distinguished_name.push(DnType::OrganizationName, organization);
    }
    params.distinguished_name.push(DnType::CommonName, common_name);
    Ok(params)
}

fn san(san: &San) -> Result<SanType, EmbeddedError> {
    Ok(match san {
        San::Ip(ip) => SanType::IpAddress(*ip),
        San::Dns(name) => SanType::DnsName(
            name.as_str()
                .try_into()
                .map_err(|_| EmbeddedError::Name(name.clone()))?,
        ),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{
        RootCertStore,
        client::WebPkiServerVerifier,
        client::danger::ServerCertVerifier,
        pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
        server::WebPkiClientVerifier,
    };

    use super::*;
    use crate::{Usage, issue};

    fn issuer() -> EmbeddedIssuer {
        EmbeddedIssuer::new(&CaMaterial::generate("kubernetes").unwrap()).unwrap()
    }

    fn roots(issuer: &EmbeddedIssuer) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(issuer.certificate_pem().as_bytes()).unwrap())
            .unwrap();
        Arc::new(roots)
    }

    fn verify_server(issuer: &EmbeddedIssuer, chain: &str, name: &str) -> Result<(), rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(roots(issuer), provider)
            .build()
            .unwrap();
        let leaf = CertificateDer::from_pem_slice(chain.as_bytes()).unwrap();
        verifier
            .verify_server_cert(
                &leaf,
                &[],
                &ServerName::try_from(name.to_owned()).unwrap(),
                &[],
                UnixTime::now(),
            )
            .map(drop)
    }

    fn verify_client(issuer: &EmbeddedIssuer, chain: &str) -> Result<(), rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots(issuer), provider)
            .build()
            .unwrap();
        let leaf = CertificateDer::from_pem_slice(chain.as_bytes()).unwrap();
        verifier.verify_client_cert(&leaf, &[], UnixTime::now()).map(drop)
    }

    #[tokio::test]
    async fn issue_server_leaf_verifies_for_its_names_only() {
        let issuer = issuer();
        let sans = vec![San::Dns("api.example".into()), San::Ip("100.64.0.10".parse().unwrap())];
        let leaf = issue(&issuer, &Leaf::server("kube-apiserver", sans)).await.unwrap();
        verify_server(&issuer, &leaf.chain_pem, "api.example").unwrap();
        verify_server(&issuer, &leaf.chain_pem, "100.64.0.10").unwrap();
        verify_server(&issuer, &leaf.chain_pem, "other.example").unwrap_err();
        verify_client(&issuer, &leaf.chain_pem).unwrap_err();
    }

    #[tokio::test]
    async fn issue_client_leaf_verifies_as_client_of_its_ca_only() {
        let issuer = issuer();
        let leaf = issue(&issuer, &Leaf::client("system:node:a", Some("system:nodes")))
            .await
            .unwrap();
        verify_client(&issuer, &leaf.chain_pem).unwrap();
        verify_client(&super::tests::issuer(), &leaf.chain_pem).unwrap_err();
        let info = CertificateInfo::from_pem(&leaf.chain_pem).unwrap();
        assert_eq!(
            (info.common_name.as_str(), info.organizations.as_slice()),
            ("system:node:a", &["system:nodes".to_owned()][..])
        );
    }

    #[tokio::test]
    async fn issue_peer_leaf_verifies_both_ways() {
        let issuer = issuer();
        let leaf = Leaf::server("peer", vec![San::Dns("peer".into())]).with_usage(Usage::Both);
        let peer = issue(&issuer, &leaf).await.unwrap();
        verify_server(&issuer, &peer.chain_pem, "peer").unwrap();
        verify_client(&issuer, &peer.chain_pem).unwrap();
    }

    #[tokio::test]
    async fn issue_gives_every_leaf_its_own_serial_and_key() {
        let issuer = issuer();
        let leaf = Leaf::client("a", None);
        let (one, two) = (
            issue(&issuer, &leaf).await.unwrap(),
            issue(&issuer, &leaf).await.unwrap(),
        );
        assert_ne!(one.key_pem, two.key_pem);
        let serial = |pem: &str| CertificateInfo::from_pem(pem).unwrap().serial;
        assert_ne!(serial(&one.chain_pem), serial(&two.chain_pem));
    }

    #[tokio::test]
    async fn issue_backdates_not_before() {
        let leaf = issue(&issuer(), &Leaf::client("a", None)).await.unwrap();
        let info = CertificateInfo::from_pem(&leaf.chain_pem).unwrap();
        let backdated = Timestamp::now().duration_since(info.not_before).as_secs();
        assert!((300..330).contains(&backdated), "{backdated}");
    }

    #[test]
    fn issuer_refuses_material_of_two_cas() {
        let (a, b) = (CaMaterial::generate("a").unwrap(), CaMaterial::generate("b").unwrap());
        let mixed = CaMaterial {
            certificate_pem: a.certificate_pem,
            key_pem: b.key_pem,
        };
        assert!(matches!(EmbeddedIssuer::new(&mixed), Err(EmbeddedError::Mismatch)));
    }
}
