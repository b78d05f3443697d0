//! Keeps this replica's serving certificate and the API server's trust in it right: the CA in Secret
//! `kubernest-api-ca`, the caBundle of the webhook configuration and of the APIServices, the leaf in memory.
//!
//! It acts when either object changes or time has passed; when all is right it writes nothing.

use std::{fmt::Debug, time::Duration};

use futures::{Stream, StreamExt};
use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::{admissionregistration::v1::ValidatingWebhookConfiguration, core::v1::Secret},
    kube_aggregator::pkg::apis::apiregistration::v1::APIService,
};
use kube::{
    Api, Client, Resource,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use kubernest_crds::labels;
use kubernest_pki::{CertificateInfo, EmbeddedIssuer};
use kubernest_runtime::{Applier, ApplyError, CancellationToken, server::Readiness, telemetry::chain};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{
    certificate::{CertificateError, Serving},
    rotation::{self, RotationError},
};

/// Secret of the CA.
pub const SECRET: &str = "kubernest-api-ca";
const FIELD_MANAGER: &str = "kubernest-api";
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
    /// The webhook configuration is not there, or it or an APIService cannot be read.
    #[error("reading {name}, whose caBundle is kept right, failed")]
    Read {
        /// Its name.
        name: String,
        /// What the API server said.
        #[source]
        source: kube::Error,
    },
    /// It cannot be written.
    #[error("setting the caBundle of {name} failed")]
    Patch {
        /// Its name.
        name: String,
        /// What the API server said.
        #[source]
        source: kube::Error,
    },
}

/// What is kept right.
pub struct Trust {
    pub client: Client,
    pub namespace: String,
    /// Names in the serving certificate.
    pub names: Vec<String>,
    pub webhook_configuration: String,
    /// Those that there are get the bundle as well.
    pub api_services: Vec<String>,
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

/// Something happened to the Secret, the webhook configuration or an APIService.
fn changes(trust: &Trust) -> impl Stream<Item = ()> + use<> {
    let secrets: Api<Secret> = Api::namespaced(trust.client.clone(), &trust.namespace);
    let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(trust.client.clone());
    let services = trust.api_services.iter().map(|name| {
        let api: Api<APIService> = Api::all(trust.client.clone());
        changes_of(api, name).boxed()
    });
    let mut all: Vec<_> = services.collect();
    all.push(changes_of(secrets, SECRET).boxed());
    all.push(changes_of(webhooks, &trust.webhook_configuration).boxed());
    futures::stream::select_all(all)
}

/// Something happened to the object of this name. A watch that fails is begun again; meanwhile [`PERIOD`] holds.
fn changes_of<K>(api: Api<K>, name: &str) -> impl Stream<Item = ()> + use<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
    watcher(api, only).default_backoff().filter_map(|event| {
        if let Err(error) = &event {
            tracing::warn!(kind = %K::kind(&()), error = chain(error), "watch failed, it is begun again");
        }
        std::future::ready(event.ok().map(drop))
    })
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
    // One that fails must not keep the others from what they need.
    let mut outcome = set_webhook_bundle(trust, &bundle).await;
    for name in &trust.api_services {
        outcome = outcome.and(set_api_service_bundle(trust, name, &bundle).await);
    }
    outcome
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

/// Sets the caBundle of all webhooks of the configuration that have another.
async fn set_webhook_bundle(trust: &Trust, bundle: &ByteString) -> Result<(), TrustError> {
    let api: Api<ValidatingWebhookConfiguration> = Api::all(trust.client.clone());
    let name = &trust.webhook_configuration;
    let configuration = api.get(name).await.map_err(|source| TrustError::Read {
        name: name.clone(),
        source,
    })?;
    match bundle_patch(&configuration, bundle) {
        Some(patch) => set_bundle(&api, name, patch).await,
        None => Ok(()),
    }
}

/// Sets the caBundle of an APIService, if there is one and it has another.
async fn set_api_service_bundle(trust: &Trust, name: &str, bundle: &ByteString) -> Result<(), TrustError> {
    let api: Api<APIService> = Api::all(trust.client.clone());
    let service = api.get_opt(name).await.map_err(|source| TrustError::Read {
        name: name.to_owned(),
        source,
    })?;
    let Some(service) = service else { return Ok(()) };
    if service.spec.as_ref().and_then(|spec| spec.ca_bundle.as_ref()) == Some(bundle) {
        return Ok(());
    }
    let patch = json!([
        {"op": "test", "path": "/metadata/resourceVersion", "value": service.metadata.resource_version},
        {"op": "add", "path": "/spec/caBundle", "value": bundle},
    ]);
    set_bundle(&api, name, patch).await
}

async fn set_bundle<K>(api: &Api<K>, name: &str, patch: Value) -> Result<(), TrustError>
where
    K: Clone + Debug + DeserializeOwned,
{
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let patch = serde_json::from_value(patch)
        .map(Patch::<()>::Json)
        .map_err(kube::Error::SerdeError);
    let patched = match patch {
        Ok(patch) => api.patch(name, &params, &patch).await,
        Err(error) => Err(error),
    };
    patched.map_err(|source| TrustError::Patch {
        name: name.to_owned(),
        source,
    })?;
    tracing::info!(name, "set the caBundle");
    Ok(())
}

/// JSON patch (RFC 6902) that sets the bundle where it differs, valid only for the version that was read.
fn bundle_patch(configuration: &ValidatingWebhookConfiguration, bundle: &ByteString) -> Option<Value> {
    let webhooks = configuration.webhooks.as_deref().unwrap_or_default();
    let mut operations: Vec<Value> = webhooks
        .iter()
        .enumerate()
        .filter(|(_, webhook)| webhook.client_config.ca_bundle.as_ref() != Some(bundle))
        .map(|(index, _)| json!({"op": "add", "path": format!("/webhooks/{index}/clientConfig/caBundle"), "value": bundle}))
        .collect();
    if operations.is_empty() {
        return None;
    }
    let version = configuration.metadata.resource_version.clone();
    operations.insert(
        0,
        json!({"op": "test", "path": "/metadata/resourceVersion", "value": version}),
    );
    Some(Value::Array(operations))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundle_patch_touches_only_what_differs() {
        let configuration: ValidatingWebhookConfiguration = serde_json::from_value(json!({
            "metadata": {"name": "kubernest", "resourceVersion": "5"},
            "webhooks": [
                {"name": "a", "clientConfig": {"caBundle": "YQ=="}, "admissionReviewVersions": ["v1"], "sideEffects": "None"},
                {"name": "b", "clientConfig": {}, "admissionReviewVersions": ["v1"], "sideEffects": "None"},
            ],
        }))
        .unwrap();
        let patch = bundle_patch(&configuration, &ByteString(b"a".to_vec())).unwrap();
        assert_eq!(
            patch,
            json!([
                {"op": "test", "path": "/metadata/resourceVersion", "value": "5"},
                {"op": "add", "path": "/webhooks/1/clientConfig/caBundle", "value": "YQ=="},
            ])
        );
        let configuration = ValidatingWebhookConfiguration {
            webhooks: None,
            ..configuration
        };
        assert_eq!(bundle_patch(&configuration, &ByteString(b"a".to_vec())), None);
    }
}
