//! Whom launchers and `kubernest-api` believe: the launchers' CA and the certificate of their only client, kept in two
//! Secrets of the system namespace, and the certificate of each launcher, signed here.
//!
//! The CA is made once: created, never changed, so operators that start at the same time end up with the same one. What
//! follows from it is put right at the start and looked at every [`PERIOD`]; at rest nothing is written. While there is
//! no CA that can sign, machines wait for it: none is started without.
//! Deliberately not here: a connection to a launcher, and the CA's replacement (its life is longer than a machine's).

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use kubernest_crds::labels;
use kubernest_domain::control::{self, files};
use kubernest_pki::{
    CaMaterial, CertificateInfo, Credential, EmbeddedError, EmbeddedIssuer, InspectError, IssueError, Leaf, San, issue,
};
use kubernest_runtime::backoff::Failures;
use kubernest_runtime::telemetry::chain;
use kubernest_runtime::{Applier, ApplyError};

use crate::names::MANAGER;

/// Secret of the launchers' CA: `tls.crt`, `tls.key`. Read by nobody else.
pub const CA_SECRET: &str = "kubernest-launcher-ca";
/// Secret of their client, `kubernest-api`: `tls.crt`, `tls.key`, `ca.crt`.
pub const CLIENT_SECRET: &str = "kubernest-launcher-client";
/// Type of a Secret with a certificate and its key.
pub const TLS: &str = "kubernetes.io/tls";

/// How often to look though nothing failed: certificates age, and people delete Secrets.
const PERIOD: Duration = Duration::from_secs(600);
/// How much earlier than the CA a launcher's certificate ends, so that it never outlives it by a rounded second.
const MARGIN: Duration = Duration::from_secs(60);
/// Attempts to write the client's Secret while somebody else writes it too.
const ATTEMPTS: usize = 3;

/// Why launchers cannot be believed; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// No CA was read yet, or it cannot be used.
    #[error("the launchers' CA is not at hand yet; if that lasts, the operator's log says why")]
    NotReady,
    /// A Secret cannot be read.
    #[error("cannot read Secret {0}")]
    Read(&'static str, #[source] kube::Error),
    /// The CA's Secret cannot be made.
    #[error("cannot make Secret {CA_SECRET}")]
    MakeCa(#[source] ApplyError),
    /// The client's Secret cannot be written.
    #[error("cannot write Secret {CLIENT_SECRET}; if that lasts delete the Secret {CLIENT_SECRET}, it is made anew")]
    WriteClient(#[source] kube::Error),
    /// Somebody else writes the client's Secret again and again.
    #[error("Secret {CLIENT_SECRET} is written by somebody else: is a second operator running?")]
    Raced,
    /// No CA could be made.
    #[error("cannot make a CA")]
    Generate(#[source] EmbeddedError),
    /// The CA's Secret lacks something.
    #[error("Secret {CA_SECRET} has no text under {0}; {REMEDY}")]
    Missing(&'static str),
    /// The CA's Secret is damaged.
    #[error("the CA in Secret {CA_SECRET} cannot sign; {REMEDY}")]
    Damaged(#[source] EmbeddedError),
    /// The CA's certificate cannot be read.
    #[error("the CA in Secret {CA_SECRET} cannot be read; {REMEDY}")]
    Unreadable(#[source] InspectError),
    /// The CA is too old.
    #[error("the CA in Secret {CA_SECRET} has expired; {REMEDY}")]
    Expired,
    /// A certificate could not be signed.
    #[error("cannot issue a certificate")]
    Issue(#[source] IssueError),
}

const REMEDY: &str = "delete the Secret kubernest-launcher-ca: it is made anew, and machines that run by then have no console \
                      until they are started again";

/// A launcher's certificate, and the CA by which it knows its client.
pub struct Issued {
    /// Certificate and key.
    pub credential: Credential,
    /// The CA's certificate, PEM.
    pub ca_pem: String,
}

/// The launchers' CA. Clones share it.
#[derive(Clone)]
pub struct Trust {
    applier: Applier,
    secrets: Api<Secret>,
    namespace: String,
    issuer: Arc<RwLock<Option<Arc<EmbeddedIssuer>>>>,
    failures: Arc<Failures<()>>,
}

impl Trust {
    /// Nothing is read yet.
    pub fn new(client: &Client, applier: &Applier, namespace: &str) -> Self {
        Self {
            applier: applier.clone(),
            secrets: Api::namespaced(client.clone(), namespace),
            namespace: namespace.to_owned(),
            issuer: Arc::default(),
            failures: Arc::default(),
        }
    }

    /// A certificate for the launcher of the instance with this uid.
    ///
    /// It is valid as long as the CA: it lives as long as the run, nobody renews it in a pod, and it is worth nothing
    /// once the run is over, since no other instance has that uid.
    ///
    /// # Errors
    /// [`TrustError::NotReady`] without a CA, [`TrustError::Issue`] when it does not sign.
    pub async fn launcher(&self, uid: &str) -> Result<Issued, TrustError> {
        let issuer = self.issuer().ok_or(TrustError::NotReady)?;
        let name = control::server_name(uid);
        let left = Duration::try_from(issuer.not_after().duration_since(Timestamp::now())).unwrap_or_default();
        let leaf = Leaf {
            validity: left.saturating_sub(MARGIN),
            ..Leaf::server(&*name, vec![San::Dns(name.clone())])
        };
        Ok(Issued {
            credential: issue(&*issuer, &leaf).await.map_err(TrustError::Issue)?,
            ca_pem: issuer.certificate_pem().to_owned(),
        })
    }

    /// Puts both Secrets right once, logs what is in the way, and returns when to look again.
    pub async fn settle(&self) -> Duration {
        match self.try_settle().await {
            Ok(()) => {
                self.failures.succeeded(&());
                PERIOD
            }
            Err(error) => {
                tracing::error!(
                    error = chain(&error),
                    "the launchers' certificates are not right, tries again"
                );
                self.failures.failed(&(), None)
            }
        }
    }

    /// Keeps both Secrets right for ever, the first time after `wait`.
    pub async fn keep(self, mut wait: Duration) {
        loop {
            tokio::time::sleep(wait).await;
            wait = self.settle().await;
        }
    }

    async fn try_settle(&self) -> Result<(), TrustError> {
        let secret = self.ensure_ca().await?;
        let issuer = match read_ca(&secret.data.unwrap_or_default(), Timestamp::now()) {
            Ok(issuer) => Arc::new(issuer),
            Err(error) => {
                self.set_issuer(None);
                return Err(error);
            }
        };
        self.set_issuer(Some(issuer.clone()));
        self.ensure_client(&issuer).await
    }

    /// The CA's Secret; made if there is none. Of several operators one makes it and all read that one.
    async fn ensure_ca(&self) -> Result<Secret, TrustError> {
        if let Some(secret) = self.read(CA_SECRET).await? {
            return Ok(secret);
        }
        let ca = CaMaterial::generate(CA_SECRET).map_err(TrustError::Generate)?;
        let data = [(files::CERTIFICATE, &ca.certificate_pem), (files::KEY, &ca.key_pem)];
        let secret = self.secret(CA_SECRET, text(data));
        let made = self
            .applier
            .create_if_absent(&secret)
            .await
            .map_err(TrustError::MakeCa)?;
        tracing::info!("the launchers' CA is made");
        Ok(made)
    }

    /// The client's Secret, made anew when its certificate is not of this CA, or two thirds of its life are over.
    async fn ensure_client(&self, issuer: &EmbeddedIssuer) -> Result<(), TrustError> {
        let params = PostParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PostParams::default()
        };
        for _ in 0..ATTEMPTS {
            let existing = self.read(CLIENT_SECRET).await?;
            let data = existing.as_ref().and_then(|secret| secret.data.as_ref());
            if data.is_some_and(|data| is_right(data, issuer.certificate_pem(), Timestamp::now())) {
                return Ok(());
            }
            let issued = issue(issuer, &client_leaf()).await.map_err(TrustError::Issue)?;
            let data = pair(&issued, issuer.certificate_pem());
            let written = match existing {
                None => self.secrets.create(&params, &self.secret(CLIENT_SECRET, data)).await,
                // Bound to the version that was read.
                Some(existing) => {
                    let renewed = Secret {
                        data: Some(data),
                        ..existing
                    };
                    self.secrets.replace(CLIENT_SECRET, &params, &renewed).await
                }
            };
            match written {
                Ok(_) => {
                    tracing::info!(not_after = %issued.not_after, "made a certificate for the launchers' client");
                    return Ok(());
                }
                // Another operator wrote it, or somebody deleted it: what stands there now is looked at again.
                Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => {}
                Err(error) => return Err(TrustError::WriteClient(error)),
            }
        }
        Err(TrustError::Raced)
    }

    async fn read(&self, name: &'static str) -> Result<Option<Secret>, TrustError> {
        let read = self.secrets.get_opt(name).await;
        read.map_err(|source| TrustError::Read(name, source))
    }

    fn secret(&self, name: &str, data: BTreeMap<String, ByteString>) -> Secret {
        Secret {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some(self.namespace.clone()),
                labels: Some([(labels::MANAGED_BY.to_owned(), labels::MANAGED_BY_VALUE.to_owned())].into()),
                ..ObjectMeta::default()
            },
            type_: Some(TLS.to_owned()),
            data: Some(data),
            ..Secret::default()
        }
    }

    fn issuer(&self) -> Option<Arc<EmbeddedIssuer>> {
        self.issuer.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_issuer(&self, issuer: Option<Arc<EmbeddedIssuer>>) {
        *self.issuer.write().unwrap_or_else(PoisonError::into_inner) = issuer;
    }
}

/// Content of a Secret: a certificate with its key, and the CA that signs the other side's.
pub fn pair(credential: &Credential, ca_pem: &str) -> BTreeMap<String, ByteString> {
    let data = [
        (files::CERTIFICATE, credential.chain_pem.as_str()),
        (files::KEY, &credential.key_pem),
        (files::CA, ca_pem),
    ];
    text(data)
}

fn text<const N: usize>(data: [(&str, impl AsRef<str>); N]) -> BTreeMap<String, ByteString> {
    data.into_iter()
        .map(|(name, text)| (name.to_owned(), ByteString(text.as_ref().as_bytes().to_vec())))
        .collect()
}

fn client_leaf() -> Leaf {
    Leaf {
        sans: vec![San::Dns(control::CLIENT_NAME.to_owned())],
        ..Leaf::client(control::CLIENT_NAME, None)
    }
}

/// The CA in its Secret, if it can sign.
fn read_ca(data: &BTreeMap<String, ByteString>, now: Timestamp) -> Result<EmbeddedIssuer, TrustError> {
    let value = |name| value(data, name).ok_or(TrustError::Missing(name));
    let ca = CaMaterial {
        certificate_pem: value(files::CERTIFICATE)?.to_owned(),
        key_pem: value(files::KEY)?.to_owned(),
    };
    let issuer = EmbeddedIssuer::new(&ca).map_err(TrustError::Damaged)?;
    let info = CertificateInfo::from_pem(&ca.certificate_pem).map_err(TrustError::Unreadable)?;
    if info.not_after <= now {
        return Err(TrustError::Expired);
    }
    if info.needs_renewal(now) {
        tracing::warn!(not_after = %info.not_after, "the launchers' CA nears its end; {REMEDY}");
    }
    Ok(issuer)
}

/// Whether the client's Secret can be left alone.
fn is_right(data: &BTreeMap<String, ByteString>, ca_pem: &str, now: Timestamp) -> bool {
    let values = [files::CERTIFICATE, files::KEY, files::CA].map(|name| value(data, name));
    let [Some(certificate), Some(key), Some(ca)] = values else {
        return false;
    };
    let infos = [certificate, ca_pem].map(CertificateInfo::from_pem);
    let [Ok(info), Ok(ca_info)] = infos else { return false };
    let is_pair = Credential::from_pem(certificate, key).is_ok_and(|credential| credential.is_pair());
    ca == ca_pem && is_pair && info.serves(&client_leaf()) && info.signed_by(&ca_info) && !info.needs_renewal(now)
}

fn value<'a>(data: &'a BTreeMap<String, ByteString>, name: &str) -> Option<&'a str> {
    std::str::from_utf8(&data.get(name)?.0).ok()
}

#[cfg(test)]
mod tests {
    use jiff::ToSpan;

    use super::*;

    fn ca() -> BTreeMap<String, ByteString> {
        let ca = CaMaterial::generate(CA_SECRET).unwrap();
        text([(files::CERTIFICATE, ca.certificate_pem), (files::KEY, ca.key_pem)])
    }

    fn after(days: i64) -> Timestamp {
        Timestamp::now().checked_add((days * 24).hours()).unwrap()
    }

    async fn client(issuer: &EmbeddedIssuer) -> BTreeMap<String, ByteString> {
        pair(&issue(issuer, &client_leaf()).await.unwrap(), issuer.certificate_pem())
    }

    #[tokio::test]
    async fn trust_leaves_a_right_client_alone_until_two_thirds_of_its_life() {
        let issuer = read_ca(&ca(), after(0)).unwrap();
        let data = client(&issuer).await;
        assert!(is_right(&data, issuer.certificate_pem(), after(0)));
        assert!(is_right(&data, issuer.certificate_pem(), after(240)));
        assert!(!is_right(&data, issuer.certificate_pem(), after(250)));
    }

    #[tokio::test]
    async fn trust_renews_a_client_that_is_damaged_or_of_another_ca() {
        let (issuer, other) = (read_ca(&ca(), after(0)).unwrap(), read_ca(&ca(), after(0)).unwrap());
        let (right, strange) = (client(&issuer).await, client(&other).await);
        assert!(!is_right(&strange, issuer.certificate_pem(), after(0)));
        for name in [files::CERTIFICATE, files::KEY, files::CA] {
            let mut data = right.clone();
            data.insert(name.to_owned(), strange[name].clone());
            assert!(!is_right(&data, issuer.certificate_pem(), after(0)), "another's {name}");
            data.insert(name.to_owned(), ByteString(b"x".to_vec()));
            assert!(!is_right(&data, issuer.certificate_pem(), after(0)), "no {name}");
            data.remove(name);
            assert!(
                !is_right(&data, issuer.certificate_pem(), after(0)),
                "{name} is missing"
            );
        }
    }

    #[test]
    fn trust_says_what_to_do_about_a_damaged_ca() {
        let (mut half, mut mixed, whole) = (ca(), ca(), ca());
        half.remove(files::KEY);
        mixed.insert(files::KEY.to_owned(), whole[files::KEY].clone());
        let old = (&whole, after(11 * 365));
        for (data, now) in [(&half, after(0)), (&mixed, after(0)), old] {
            let error = read_ca(data, now).err().unwrap().to_string();
            assert!(error.contains("delete the Secret kubernest-launcher-ca"), "{error}");
        }
    }
}
