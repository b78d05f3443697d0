//! What to do about the CA in its Secret: pure decisions on its content, the trust already handed out, and the time.
//!
//! A CA is replaced in two steps so that no replica ever serves a certificate that the API server doesn't trust yet:
//! first the next CA joins the trusted bundle beside the current one, and only after it has stood there for
//! [`SETTLE`] does it sign.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::ByteString;
use kubernest_pki::{BACKDATE, CaMaterial, CertificateInfo, EmbeddedError};

/// Keys of the Secret's data: the CA that signs.
pub const CERTIFICATE: &str = "tls.crt";
/// Its key.
pub const KEY: &str = "tls.key";
/// The CA that signs next.
pub const NEXT_CERTIFICATE: &str = "next.crt";
/// Its key.
pub const NEXT_KEY: &str = "next.key";
/// The CA that signed before, still trusted while leaves of its may be in use.
pub const PREVIOUS_CERTIFICATE: &str = "previous.crt";

/// How long the next CA must have been trusted before it signs.
pub const SETTLE: Duration = Duration::from_secs(3600);

/// Content of the Secret.
pub type Data = BTreeMap<String, ByteString>;

/// Why the Secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// A key of its data is missing or no text.
    #[error("the CA Secret has no text under {0}; delete the Secret to have it made anew")]
    Missing(&'static str),
    /// A certificate cannot be read.
    #[error("the CA Secret's {name} cannot be read; delete the Secret to have it made anew")]
    Inspect {
        /// Key of the data.
        name: &'static str,
        /// What was wrong.
        #[source]
        source: kubernest_pki::InspectError,
    },
    /// No new CA could be made.
    #[error("making a CA failed")]
    Generate(#[source] EmbeddedError),
}

/// Content of a Secret with a CA just made.
///
/// # Errors
/// When no key or certificate can be made.
pub fn fresh() -> Result<Data, RotationError> {
    let ca = generate()?;
    Ok(Data::from([
        (CERTIFICATE.to_owned(), bytes(&ca.certificate_pem)),
        (KEY.to_owned(), bytes(&ca.key_pem)),
    ]))
}

fn generate() -> Result<CaMaterial, RotationError> {
    CaMaterial::generate("kubernest-api-ca").map_err(RotationError::Generate)
}

/// The content that should stand in the Secret now; `None` when it is right as it is.
///
/// # Errors
/// [`RotationError`] when the content is damaged.
pub fn rotate(data: &Data, now: Timestamp) -> Result<Option<Data>, RotationError> {
    let current = inspect(data, CERTIFICATE)?;
    let mut wanted = data.clone();
    if data.contains_key(NEXT_CERTIFICATE) {
        let next = inspect(data, NEXT_CERTIFICATE)?;
        let trusted_since = next.not_before.as_second() + seconds(BACKDATE);
        if now.as_second() >= trusted_since + seconds(SETTLE) {
            wanted.insert(PREVIOUS_CERTIFICATE.to_owned(), bytes(text(data, CERTIFICATE)?));
            wanted.insert(CERTIFICATE.to_owned(), bytes(text(data, NEXT_CERTIFICATE)?));
            wanted.insert(KEY.to_owned(), bytes(text(data, NEXT_KEY)?));
            wanted.remove(NEXT_CERTIFICATE);
            wanted.remove(NEXT_KEY);
        }
    } else if current.needs_renewal(now) {
        let next = generate()?;
        wanted.insert(NEXT_CERTIFICATE.to_owned(), bytes(&next.certificate_pem));
        wanted.insert(NEXT_KEY.to_owned(), bytes(&next.key_pem));
    }
    if data.contains_key(PREVIOUS_CERTIFICATE) && inspect(data, PREVIOUS_CERTIFICATE)?.not_after < now {
        wanted.remove(PREVIOUS_CERTIFICATE);
    }
    Ok((wanted != *data).then_some(wanted))
}

/// The CA that signs.
///
/// # Errors
/// [`RotationError::Missing`].
pub fn signer(data: &Data) -> Result<CaMaterial, RotationError> {
    Ok(CaMaterial {
        certificate_pem: text(data, CERTIFICATE)?.to_owned(),
        key_pem: text(data, KEY)?.to_owned(),
    })
}

/// All CAs that clients must trust, PEM, in a stable order.
///
/// # Errors
/// [`RotationError::Missing`].
pub fn bundle(data: &Data) -> Result<String, RotationError> {
    let mut bundle = String::new();
    for name in [CERTIFICATE, NEXT_CERTIFICATE, PREVIOUS_CERTIFICATE] {
        if name == CERTIFICATE || data.contains_key(name) {
            bundle.push_str(text(data, name)?.trim_end());
            bundle.push('\n');
        }
    }
    Ok(bundle)
}

fn inspect(data: &Data, name: &'static str) -> Result<CertificateInfo, RotationError> {
    CertificateInfo::from_pem(text(data, name)?).map_err(|source| RotationError::Inspect { name, source })
}

fn text<'a>(data: &'a Data, name: &'static str) -> Result<&'a str, RotationError> {
    let bytes = data.get(name).ok_or(RotationError::Missing(name))?;
    std::str::from_utf8(&bytes.0).map_err(|_| RotationError::Missing(name))
}

fn bytes(text: &str) -> ByteString {
    ByteString(text.as_bytes().to_vec())
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::ToSpan;

    fn after(years: i64) -> Timestamp {
        Timestamp::now().checked_add((years * 365 * 24).hours()).unwrap()
    }

    #[test]
    fn rotation_leaves_a_fresh_ca_alone() {
        let data = fresh().unwrap();
        assert!(rotate(&data, Timestamp::now()).unwrap().is_none());
    }

    #[test]
    fn rotation_trusts_the_next_ca_before_it_signs() {
        let data = fresh().unwrap();
        let announced = rotate(&data, after(7)).unwrap().unwrap();
        assert_eq!(announced[CERTIFICATE], data[CERTIFICATE], "the old one signs on");
        assert_eq!(bundle(&announced).unwrap().matches("BEGIN CERTIFICATE").count(), 2);
        assert!(
            rotate(&announced, Timestamp::now()).unwrap().is_none(),
            "it has not settled"
        );
        let later = Timestamp::now().checked_add(2.hours()).unwrap();
        let promoted = rotate(&announced, later).unwrap().unwrap();
        assert_eq!(promoted[CERTIFICATE], announced[NEXT_CERTIFICATE]);
        assert_eq!(promoted[KEY], announced[NEXT_KEY]);
        assert_eq!(promoted[PREVIOUS_CERTIFICATE], data[CERTIFICATE]);
        assert_eq!(bundle(&promoted).unwrap().matches("BEGIN CERTIFICATE").count(), 2);
        let done = rotate(&promoted, after(11)).unwrap().unwrap();
        assert!(!done.contains_key(PREVIOUS_CERTIFICATE));
    }

    #[test]
    fn rotation_says_what_to_do_about_a_damaged_secret() {
        let mut data = fresh().unwrap();
        data.remove(KEY);
        assert!(signer(&data).err().unwrap().to_string().contains("delete the Secret"));
    }
}
