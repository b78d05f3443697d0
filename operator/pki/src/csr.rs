//! Certificate signing requests (PKCS #10): made for our own keys, read from others. Approves nothing.

use std::net::IpAddr;

use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject};
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY},
    prelude::FromDer,
    x509::X509Name,
};

use crate::San;

/// Largest request read, in bytes of PEM; a kubelet's has about 500.
const MAX_PEM: usize = 16 * 1024;

/// A request whose signature proves that the requestor holds the private key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SigningRequest {
    /// Subject's common name.
    pub common_name: String,
    /// Subject's organizations, in the request's order.
    pub organizations: Vec<String>,
    /// DNS and IP names asked for, sorted.
    pub sans: Vec<San>,
    der: Vec<u8>,
    spki: Vec<u8>,
}

/// Why a request can't be made or accepted.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// Longer than any honest request.
    #[error("the certificate request is longer than {MAX_PEM} bytes")]
    TooLong,
    /// Not PEM.
    #[error("the certificate request is not PEM of type CERTIFICATE REQUEST")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// Not PKCS #10.
    #[error("the certificate request is not valid PKCS #10")]
    Parse(#[source] x509_parser::nom::Err<x509_parser::error::X509Error>),
    /// The requestor does not hold the key.
    #[error("the certificate request's signature does not match its key")]
    Signature(#[source] x509_parser::error::X509Error),
    /// Another key type than the cluster uses.
    #[error("the certificate request's key is not ECDSA P-256")]
    KeyType,
    /// The subject holds something that is not looked at, so it can't be judged.
    #[error("the certificate request's subject must hold exactly one common name and otherwise only organizations")]
    Subject,
    /// A name type or extension that is not looked at, so it can't be judged.
    #[error("the certificate request asks for {0}, which is not signed here")]
    Extension(&'static str),
    /// The request for our own key could not be made.
    #[error("making a certificate request failed")]
    Make(#[source] rcgen::Error),
}

impl SigningRequest {
    /// Reads a PEM request and verifies its signature. Whatever it asks for beyond a subject of common name and
    /// organizations, DNS and IP names and key usages is refused, so that nothing in it goes unjudged.
    pub fn parse_pem(pem: &[u8]) -> Result<Self, CsrError> {
        if pem.len() > MAX_PEM {
            return Err(CsrError::TooLong);
        }
        let der = CertificateSigningRequestDer::from_pem_slice(pem).map_err(CsrError::Pem)?;
        Self::parse_der(&der)
    }

    /// As [`SigningRequest::parse_pem`], from DER.
    pub fn parse_der(der: &[u8]) -> Result<Self, CsrError> {
        let (_, request) = X509CertificationRequest::from_der(der).map_err(CsrError::Parse)?;
        let info = &request.certification_request_info;
        let algorithm = &info.subject_pki.algorithm;
        let curve = algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
        if algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve != Some(OID_EC_P256) {
            return Err(CsrError::KeyType);
        }
        request.verify_signature().map_err(CsrError::Signature)?;
        let (common_name, organizations) = subject(&info.subject)?;
        let mut sans = Vec::new();
        for extension in request.requested_extensions().into_iter().flatten() {
            match extension {
                ParsedExtension::SubjectAlternativeName(names) => {
                    for name in &names.general_names {
                        sans.push(general_name(name)?);
                    }
                }
                ParsedExtension::KeyUsage(_) | ParsedExtension::ExtendedKeyUsage(_) => {}
                ParsedExtension::BasicConstraints(constraints) if !constraints.ca => {}
                _ => return Err(CsrError::Extension("an extension other than names and usages")),
            }
        }
        sans.sort();
        sans.dedup();
        let spki = info.subject_pki.raw.to_vec();
        Ok(SigningRequest {
            common_name,
            organizations,
            sans,
            der: der.to_vec(),
            spki,
        })
    }

    /// A request for our own key. Its names say nothing: the issuer takes them from the [`crate::Leaf`].
    pub(crate) fn for_key(common_name: &str, key: &KeyPair) -> Result<Self, CsrError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, common_name);
        let request = params.serialize_request(key).map_err(CsrError::Make)?;
        Self::parse_der(request.der())
    }

    /// The request as DER, for issuers elsewhere.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The public key as DER SubjectPublicKeyInfo.
    pub fn public_key(&self) -> &[u8] {
        &self.spki
    }
}

fn subject(name: &X509Name<'_>) -> Result<(String, Vec<String>), CsrError> {
    let text = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| attribute.as_str().ok().map(str::to_owned);
    let names: Vec<String> = name.iter_common_name().filter_map(text).collect();
    let organizations: Vec<String> = name.iter_organization().filter_map(text).collect();
    let whole = name.iter_attributes().count() == names.len() + organizations.len();
    match <[String; 1]>::try_from(names) {
        Ok([common_name]) if whole => Ok((common_name, organizations)),
        _ => Err(CsrError::Subject),
    }
}

fn general_name(name: &GeneralName<'_>) -> Result<San, CsrError> {
    match name {
        GeneralName::DNSName(name) => Ok(San::Dns((*name).to_owned())),
        GeneralName::IPAddress(bytes) => ip(bytes)
            .map(San::Ip)
            .ok_or(CsrError::Extension("a malformed IP address")),
        _ => Err(CsrError::Extension("a name that is neither DNS nor IP")),
    }
}

/// The address in a subject alternative name: 4 or 16 bytes.
pub(crate) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(build: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(rcgen::DnType::OrganizationName, "system:nodes");
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "system:node:a");
        build(&mut params);
        params
            .serialize_request(&KeyPair::generate().unwrap())
            .unwrap()
            .der()
            .to_vec()
    }

    #[test]
    fn csr_names_of_a_kubelet_are_read() {
        let der = request(|params| {
            params.subject_alt_names = vec![
                rcgen::SanType::IpAddress("100.64.0.10".parse().unwrap()),
                rcgen::SanType::DnsName("a".try_into().unwrap()),
            ];
        });
        let parsed = SigningRequest::parse_der(&der).unwrap();
        assert_eq!(parsed.common_name, "system:node:a");
        assert_eq!(parsed.organizations, ["system:nodes"]);
        assert_eq!(
            parsed.sans,
            [San::Dns("a".into()), San::Ip("100.64.0.10".parse().unwrap())]
        );
    }

    #[test]
    fn csr_with_a_foreign_signature_is_refused() {
        let mut der = request(|_| {});
        let last = der.len() - 1;
        der[last] ^= 1;
        assert!(matches!(
            SigningRequest::parse_der(&der),
            Err(CsrError::Signature(_) | CsrError::Parse(_))
        ));
    }

    #[test]
    fn csr_for_a_ca_is_refused() {
        let der = request(|params| params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
        assert!(matches!(SigningRequest::parse_der(&der), Err(CsrError::Extension(_))));
    }

    #[test]
    fn csr_with_another_subject_attribute_is_refused() {
        let der = request(|params| params.distinguished_name.push(rcgen::DnType::CountryName, "CH"));
        assert!(matches!(SigningRequest::parse_der(&der), Err(CsrError::Subject)));
    }

    #[test]
    fn csr_with_a_uri_name_is_refused() {
        let der =
            request(|params| params.subject_alt_names = vec![rcgen::SanType::URI("spiffe://x".try_into().unwrap())]);
        assert!(matches!(SigningRequest::parse_der(&der), Err(CsrError::Extension(_))));
    }

    #[test]
    fn csr_of_another_curve_is_refused() {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let der = CertificateParams::default()
            .serialize_request(&key)
            .unwrap()
            .der()
            .to_vec();
        assert!(matches!(SigningRequest::parse_der(&der), Err(CsrError::KeyType)));
    }
}
