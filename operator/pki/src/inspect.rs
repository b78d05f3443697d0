//! Reading certificates back: names, expiry, whose signature. Renews nothing.

use jiff::Timestamp;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

use crate::{Leaf, San, csr};

/// Why a certificate can't be read.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// Not PEM.
    #[error("not PEM of type CERTIFICATE")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// Not X.509.
    #[error("not a valid X.509 certificate")]
    Parse(#[source] x509_parser::nom::Err<x509_parser::error::X509Error>),
    /// A date that can't be expressed.
    #[error("a date of the certificate is out of range")]
    Date(#[source] jiff::Error),
}

/// What the first certificate of a PEM chain says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateInfo {
    /// Subject's common name, empty when there is none.
    pub common_name: String,
    /// Subject's organizations.
    pub organizations: Vec<String>,
    /// DNS and IP names, sorted.
    pub sans: Vec<San>,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// First second of validity.
    pub not_before: Timestamp,
    /// Last second of validity.
    pub not_after: Timestamp,
    der: Vec<u8>,
    spki: Vec<u8>,
}

impl CertificateInfo {
    /// Reads the first certificate of a PEM chain.
    pub fn from_pem(pem: &str) -> Result<Self, InspectError> {
        Self::from_der(&CertificateDer::from_pem_slice(pem.as_bytes()).map_err(InspectError::Pem)?)
    }

    /// Reads a certificate in DER, as TLS hands it over.
    pub fn from_der(der: &[u8]) -> Result<Self, InspectError> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(InspectError::Parse)?;
        let texts =
            |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| attribute.as_str().ok().map(str::to_owned);
        let names = certificate.subject_alternative_name().ok().flatten();
        let mut sans: Vec<San> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(general_name)
            .collect();
        sans.sort();
        let date = |time: x509_parser::time::ASN1Time| Timestamp::from_second(time.timestamp());
        Ok(CertificateInfo {
            common_name: certificate
                .subject()
                .iter_common_name()
                .find_map(texts)
                .unwrap_or_default(),
            organizations: certificate.subject().iter_organization().filter_map(texts).collect(),
            sans,
            serial: certificate.raw_serial_as_string(),
            not_before: date(certificate.validity().not_before).map_err(InspectError::Date)?,
            not_after: date(certificate.validity().not_after).map_err(InspectError::Date)?,
            spki: certificate.public_key().raw.to_vec(),
            der: der.to_vec(),
        })
    }

    /// The public key as DER SubjectPublicKeyInfo.
    pub fn public_key(&self) -> &[u8] {
        &self.spki
    }

    /// Whether the certificate says what `leaf` asks for (validity apart).
    pub fn serves(&self, leaf: &Leaf) -> bool {
        self.common_name == leaf.common_name
            && self
                .organizations
                .iter()
                .map(String::as_str)
                .eq(leaf.organization.as_deref())
            && self.sans == leaf.sans
    }

    /// Whether `ca`'s key signed it.
    pub fn signed_by(&self, ca: &CertificateInfo) -> bool {
        let (Ok((_, leaf)), Ok((_, ca))) = (X509Certificate::from_der(&self.der), X509Certificate::from_der(&ca.der))
        else {
            return false;
        };
        leaf.verify_signature(Some(ca.public_key())).is_ok()
    }

    /// Whether two thirds of its life are over.
    pub fn needs_renewal(&self, now: Timestamp) -> bool {
        needs_renewal(self.not_before, self.not_after, now)
    }
}

/// Whether two thirds of a life from `not_before` to `not_after` are over at `now`.
pub fn needs_renewal(not_before: Timestamp, not_after: Timestamp, now: Timestamp) -> bool {
    let (start, end) = (not_before.as_second(), not_after.as_second());
    now.as_second() >= start + (end - start) * 2 / 3
}

fn general_name(name: &GeneralName<'_>) -> Option<San> {
    match name {
        GeneralName::DNSName(name) => Some(San::Dns((*name).to_owned())),
        GeneralName::IPAddress(bytes) => csr::ip(bytes).map(San::Ip),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CaMaterial, EmbeddedIssuer, issue};

    #[test]
    fn inspect_renewal_is_due_at_two_thirds() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        assert!(!needs_renewal(at(0), at(300), at(199)));
        assert!(needs_renewal(at(0), at(300), at(200)));
    }

    #[tokio::test]
    async fn inspect_tells_whose_certificate_it_is() {
        let (a, b) = (CaMaterial::generate("ca").unwrap(), CaMaterial::generate("ca").unwrap());
        let leaf = Leaf::server("x", vec![San::Dns("x".into())]);
        let signed = issue(&EmbeddedIssuer::new(&a).unwrap(), &leaf).await.unwrap();
        let info = CertificateInfo::from_pem(&signed.chain_pem).unwrap();
        assert!(info.signed_by(&CertificateInfo::from_pem(&a.certificate_pem).unwrap()));
        assert!(!info.signed_by(&CertificateInfo::from_pem(&b.certificate_pem).unwrap()));
        assert!(info.serves(&leaf));
        assert!(!info.serves(&Leaf::server("x", vec![San::Dns("y".into())])));
    }
}
