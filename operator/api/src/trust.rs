//! Keeps this replica's serving certificate and the API server's trust in it right: the CA in Secret
//! `kubernest-api-ca`, the caBundles by which the API server believes it ([`bundles`]), the leaf in memory.
//!
//! It acts when either object changes or time has passed; when all is right it writes nothing.

use std::time::Duration;

use futures::{Stream, StreamExt};
use jiff::Timestamp;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use kubernest_crds::labels;
use kubernest_pki::{CertificateInfo, EmbeddedIssuer};
use kubernest_runtime::{Applier, ApplyError, CancellationToken, server::Readiness, telemetry::chain};

use crate::{
    bundles::{self, BundleError, FIELD_MANAGER, Holders},
    certificate::{CertificateError, Serving},
    rotation::{self, RotationError},
};

/// Secret of the CA.
pub const SECRET: &str = "kubernest-api-ca";
/// How often to look though nothing was seen to change: certificates age.
const PERIOD: Duration = Duration::from_secs(600);
/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(2);

/// Why trust could not be put right; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The Secret was neither there nor could be made.
    #[error("getting the CA failed")]
    Secret(#[source] ApplyError),
    /// Its content is damaged.
    #[error("the CA cannot be used")]
    Content(#[from] RotationError),
    /// The next CA could not be stored.
    #[error("storing the rotated CA failed")]
    Rotate(#[source] kube::Error),
    /// Key and certificate do not belong together.
    #[error("the CA cannot sign")]
    Signer(#[source] kubernest_pki::EmbeddedError),
    /// No leaf.
    #[error("renewing the serving certificate failed")]
    Leaf(#[from] CertificateError),
    /// The API server was not told.
    #[error("telling the API server whom to believe failed")]
    Bundle(#[source] BundleError),
}

/// What is kept right.
pub struct Trust {
    pub client: Client,
    pub namespace: String,
    /// Names in the serving certificate.
    pub names: Vec<String>,
    /// What tells the API server whom to believe.
    pub holders: Holders,
    pub serving: Serving,
    pub readiness: Readiness,
}

/// The name under which readiness waits for a first certificate.
pub const READY: &str = "a serving certificate";

/// Keeps trust right until shutdown.
pub async fn keep(trust: Trust, shutdown: CancellationToken) {
    let mut changes = Box::pin(changes(&trust));
    let mut leaf = None;
    loop {
        let wait = match settle(&trust, &mut leaf).await {
            Ok(()) => PERIOD,
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "the trust in webhooks and aggregated API is not right yet, tries again"
                );
                RETRY
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
            _ = changes.next(), if wait == PERIOD => {}
        }
    }
}

/// Something happened to the Secret or to an object that holds the bundle.
fn changes(trust: &Trust) -> impl Stream<Item = ()> + use<> {
    let secrets: Api<Secret> = Api::namespaced(trust.client.clone(), &trust.namespace);
    let secret = bundles::changes_of(secrets, SECRET);
    futures::stream::select(secret, trust.holders.changes(&trust.client))
}

/// One pass. `leaf` is what is served now.
async fn settle(trust: &Trust, leaf: &mut Option<CertificateInfo>) -> Result<(), TrustError> {
    let secret = rotate(trust, ensure_secret(trust).await?).await?;
    let data = secret.data.unwrap_or_default();
    let material = rotation::signer(&data)?;
    let ca = CertificateInfo::from_pem(&material.certificate_pem).map_err(|source| RotationError::Inspect {
        name: rotation::CERTIFICATE,
        source,
    })?;
    let good = leaf
        .as_ref()
        .is_some_and(|leaf| leaf.signed_by(&ca) && !leaf.needs_renewal(Timestamp::now()));
    if !good {
        let issuer = EmbeddedIssuer::new(&material).map_err(TrustError::Signer)?;
        let renewed = trust.serving.renew(&issuer, &trust.names).await?;
        tracing::info!(not_after = %renewed.not_after, serial = renewed.serial, "serves a new certificate");
        *leaf = Some(renewed);
        trust.readiness.set(READY, true);
    }
    let bundle = ByteString(rotation::bundle(&data)?.into_bytes());
    trust
        .holders
        .settle(&trust.client, &bundle)
        .await
        .map_err(TrustError::Bundle)
}

/// The CA Secret; made if there is none. Of several replicas one makes it and all read that one.
async fn ensure_secret(trust: &Trust) -> Result<Secret, TrustError> {
    let secrets: Api<Secret> = Api::namespaced(trust.client.clone(), &trust.namespace);
    let existing = secrets.get_opt(SECRET).await.map_err(|source| {
        TrustError::Secret(ApplyError::Api {
            verb: "get",
            object: format!("Secret {SECRET}"),
            source: Box::new(source),
        })
    })?;
    if let Some(secret) = existing {
        return Ok(secret);
    }
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(SECRET.to_owned()),
            namespace: Some(trust.namespace.clone()),
            labels: Some([(labels::MANAGED_BY.to_owned(), labels::MANAGED_BY_VALUE.to_owned())].into()),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(rotation::fresh()?),
        ..Secret::default()
    };
    Applier::new(trust.client.clone(), FIELD_MANAGER)
        .create_if_absent(&secret)
        .await
        .map_err(TrustError::Secret)
}

/// The Secret after rotation, if it was due. A conflict means that another replica did it; the next pass sees that.
async fn rotate(trust: &Trust, secret: Secret) -> Result<Secret, TrustError> {
    let Some(data) = rotation::rotate(&secret.data.clone().unwrap_or_default(), Timestamp::now())? else {
        return Ok(secret);
    };
    let secrets: Api<Secret> = Api::namespaced(trust.client.clone(), &trust.namespace);
    let rotated = Secret {
        data: Some(data),
        ..secret
    };
    let params = PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    let stored = secrets
        .replace(SECRET, &params, &rotated)
        .await
        .map_err(TrustError::Rotate)?;
    tracing::info!("rotated the CA");
    Ok(stored)
}
