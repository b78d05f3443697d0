//! The caBundle by which the API server knows this server: in the webhook configurations, the APIServices and the
//! conversion of the CRDs. It is patched where it differs, valid only for the version that was read.

use std::fmt::Debug;

use futures::{Stream, StreamExt, stream::BoxStream};
use k8s_openapi::{
    ByteString,
    api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    kube_aggregator::pkg::apis::apiregistration::v1::APIService,
};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams},
    runtime::{WatchStreamExt, watcher},
};
use kubernest_runtime::telemetry::chain;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Owner of what is written.
pub const FIELD_MANAGER: &str = "kubernest-api";

/// Why a bundle could not be put right; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The object cannot be read, or it is not there and must be.
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

/// The objects that tell the API server whom to believe.
#[derive(Clone, Debug)]
pub struct Holders {
    /// Validating and mutating webhook configuration; there must be one of each.
    pub webhook_configuration: String,
    /// APIServices; those that there are.
    pub api_services: Vec<String>,
    /// CRDs with a conversion by webhook; those that there are.
    pub definitions: Vec<String>,
}

impl Holders {
    /// Something happened to one of them.
    pub fn changes(&self, client: &Client) -> impl Stream<Item = ()> + use<> {
        let mut all = vec![
            changes_of::<ValidatingWebhookConfiguration>(Api::all(client.clone()), &self.webhook_configuration),
            changes_of::<MutatingWebhookConfiguration>(Api::all(client.clone()), &self.webhook_configuration),
        ];
        let services = self.api_services.iter();
        all.extend(services.map(|name| changes_of::<APIService>(Api::all(client.clone()), name)));
        let definitions = self.definitions.iter();
        all.extend(definitions.map(|name| changes_of::<CustomResourceDefinition>(Api::all(client.clone()), name)));
        futures::stream::select_all(all)
    }

    /// Sets the bundle wherever it is another. One that fails does not keep the others from what they need.
    ///
    /// # Errors
    /// The first failure.
    pub async fn settle(&self, client: &Client, bundle: &ByteString) -> Result<(), BundleError> {
        let name = &self.webhook_configuration;
        let mut outcome = set::<ValidatingWebhookConfiguration>(client, name, bundle, true).await;
        outcome = outcome.and(set::<MutatingWebhookConfiguration>(client, name, bundle, true).await);
        for name in &self.api_services {
            outcome = outcome.and(set::<APIService>(client, name, bundle, false).await);
        }
        for name in &self.definitions {
            outcome = outcome.and(set::<CustomResourceDefinition>(client, name, bundle, false).await);
        }
        outcome
    }
}

/// Something happened to the object of this name. A watch that fails is begun again; meanwhile whoever listens looks from
/// time to time.
pub fn changes_of<K>(api: Api<K>, name: &str) -> BoxStream<'static, ()>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let events = watcher(api, only).default_backoff().filter_map(|event| {
        if let Err(error) = &event {
            tracing::warn!(kind = %K::kind(&()), error = chain(error), "watch failed, it is begun again");
        }
        std::future::ready(event.ok().map(drop))
    });
    events.boxed()
}

/// An object with places for a bundle.
trait Holder {
    /// JSON pointers of the places that hold another.
    fn stale(&self, bundle: &ByteString) -> Vec<String>;
}

impl Holder for ValidatingWebhookConfiguration {
    fn stale(&self, bundle: &ByteString) -> Vec<String> {
        let webhooks = self.webhooks.iter().flatten();
        stale_webhooks(webhooks.map(|webhook| webhook.client_config.ca_bundle.as_ref()), bundle)
    }
}

impl Holder for MutatingWebhookConfiguration {
    fn stale(&self, bundle: &ByteString) -> Vec<String> {
        let webhooks = self.webhooks.iter().flatten();
        stale_webhooks(webhooks.map(|webhook| webhook.client_config.ca_bundle.as_ref()), bundle)
    }
}

impl Holder for APIService {
    fn stale(&self, bundle: &ByteString) -> Vec<String> {
        let held = self.spec.as_ref().and_then(|spec| spec.ca_bundle.as_ref());
        Vec::from_iter((held != Some(bundle)).then(|| "/spec/caBundle".to_owned()))
    }
}

impl Holder for CustomResourceDefinition {
    fn stale(&self, bundle: &ByteString) -> Vec<String> {
        let webhook = self
            .spec
            .conversion
            .as_ref()
            .and_then(|conversion| conversion.webhook.as_ref());
        let config = webhook.and_then(|webhook| webhook.client_config.as_ref());
        let stale = config.is_some_and(|config| config.ca_bundle.as_ref() != Some(bundle));
        Vec::from_iter(stale.then(|| "/spec/conversion/webhook/clientConfig/caBundle".to_owned()))
    }
}

fn stale_webhooks<'a>(held: impl Iterator<Item = Option<&'a ByteString>>, bundle: &ByteString) -> Vec<String> {
    held.enumerate()
        .filter(|(_, held)| *held != Some(bundle))
        .map(|(index, _)| format!("/webhooks/{index}/clientConfig/caBundle"))
        .collect()
}

async fn set<K>(client: &Client, name: &str, bundle: &ByteString, required: bool) -> Result<(), BundleError>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::ClusterResourceScope>
        + Holder
        + Clone
        + Debug
        + DeserializeOwned,
{
    let api: Api<K> = Api::all(client.clone());
    let found = match api.get(name).await {
        Err(kube::Error::Api(answer)) if answer.code == 404 && !required => return Ok(()),
        found => found.map_err(|source| BundleError::Read {
            name: name.to_owned(),
            source,
        })?,
    };
    let Some(patch) = patch(&found, bundle) else {
        return Ok(());
    };
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
    patched.map_err(|source| BundleError::Patch {
        name: name.to_owned(),
        source,
    })?;
    tracing::info!(kind = %K::kind(&()), name, "set the caBundle");
    Ok(())
}

/// JSON patch (RFC 6902) that sets the bundle where it differs, valid only for the version that was read.
fn patch<K: Resource + Holder>(object: &K, bundle: &ByteString) -> Option<Value> {
    let stale = object.stale(bundle);
    if stale.is_empty() {
        return None;
    }
    let version = &object.meta().resource_version;
    let mut operations = vec![json!({"op": "test", "path": "/metadata/resourceVersion", "value": version})];
    operations.extend(
        stale
            .iter()
            .map(|path| json!({"op": "add", "path": path, "value": bundle})),
    );
    Some(Value::Array(operations))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patch_touches_only_what_differs() {
        let configuration: ValidatingWebhookConfiguration = serde_json::from_value(json!({
            "metadata": {"name": "kubernest", "resourceVersion": "5"},
            "webhooks": [
                {"name": "a", "clientConfig": {"caBundle": "YQ=="}, "admissionReviewVersions": ["v1"], "sideEffects": "None"},
                {"name": "b", "clientConfig": {}, "admissionReviewVersions": ["v1"], "sideEffects": "None"},
            ],
        }))
        .unwrap();
        let wanted = json!([
            {"op": "test", "path": "/metadata/resourceVersion", "value": "5"},
            {"op": "add", "path": "/webhooks/1/clientConfig/caBundle", "value": "YQ=="},
        ]);
        assert_eq!(patch(&configuration, &ByteString(b"a".to_vec())), Some(wanted));
        let configuration = ValidatingWebhookConfiguration {
            webhooks: None,
            ..configuration
        };
        assert_eq!(patch(&configuration, &ByteString(b"a".to_vec())), None);
    }

    #[test]
    fn patch_leaves_definitions_without_conversion_alone() {
        let definition = |conversion: Value| -> CustomResourceDefinition {
            let names = json!({"kind": "A", "plural": "as"});
            let spec =
                json!({"group": "g", "names": names, "scope": "Namespaced", "versions": [], "conversion": conversion});
            serde_json::from_value(json!({"metadata": {"name": "as.g"}, "spec": spec})).unwrap()
        };
        let bundle = ByteString(b"a".to_vec());
        assert_eq!(patch(&definition(json!({"strategy": "None"})), &bundle), None);
        let webhook =
            json!({"strategy": "Webhook", "webhook": {"clientConfig": {}, "conversionReviewVersions": ["v1"]}});
        assert!(patch(&definition(webhook), &bundle).is_some());
    }
}
