//! Writing objects: server-side apply with one field manager, create-if-absent, delete with a uid precondition, and
//! finalizers. What was already applied is not sent again, so that at rest nothing is written.
//!
//! It decides nothing about what an object should be, and keeps no cache of objects: only hashes of what it sent.

use std::{
    collections::HashMap,
    fmt::Debug,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use kube::{
    Client, Resource, ResourceExt,
    api::{DeleteParams, GetParams, Patch, PatchParams, PostParams, Preconditions},
    core::Request,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A write that failed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The desired object has no name, or cannot be turned into a request.
    #[error("cannot build the request for {object}")]
    Request {
        /// Kind, namespace and name.
        object: String,
        /// What was wrong.
        #[source]
        source: kube::core::request::Error,
    },
    /// The desired object cannot be serialised.
    #[error("cannot serialise {object}")]
    Serialize {
        /// Kind, namespace and name.
        object: String,
        /// What was wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The API server refused, or could not be reached.
    #[error("cannot {verb} {object}")]
    Api {
        /// What was tried.
        verb: &'static str,
        /// Kind, namespace and name.
        object: String,
        /// What the API server said.
        #[source]
        source: Box<kube::Error>,
    },
}

impl ApplyError {
    /// HTTP code of the API server's answer, if it answered.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Api { source, .. } => code(source),
            _ => None,
        }
    }

    /// Whether the object changed in between (409).
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }

    /// Whether the API server refused the object's content (422), which a retry alone won't mend.
    pub fn is_invalid(&self) -> bool {
        self.code() == Some(422)
    }
}

fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// Bounds on an object that can be written. `kube` kinds, k8s-openapi kinds and `DynamicObject` have them.
pub trait Object: Resource + Clone + Debug + Serialize + DeserializeOwned {}
impl<K: Resource + Clone + Debug + Serialize + DeserializeOwned> Object for K {}

/// How many applied objects are remembered at most.
const REMEMBERED: usize = 65_536;
/// Longest resourceVersion that is remembered, in bytes: they have 20 digits at most, but a tenant's API server may say anything.
const VERSION_BYTES: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Target {
    url: String,
    name: String,
    part: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Sent {
    hash: [u8; 32],
    resource_version: String,
}

/// Writes objects for one field manager through one client. Clones share what they remember.
#[derive(Clone)]
pub struct Applier {
    client: Client,
    manager: &'static str,
    sent: Arc<Mutex<HashMap<Target, Sent>>>,
}

impl Debug for Applier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Applier")
            .field("manager", &self.manager)
            .finish_non_exhaustive()
    }
}

impl Applier {
    /// An applier whose field manager is `manager`.
    pub fn new(client: Client, manager: &'static str) -> Self {
        Self {
            client,
            manager,
            sent: Arc::default(),
        }
    }

    /// The client it writes through.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Server-side applies `desired` (force). Sends nothing, and returns `observed`, when the same was applied before and
    /// the object has not changed since.
    ///
    /// # Errors
    /// [`ApplyError`] when the request cannot be built or the API server refuses.
    pub async fn apply<K>(&self, desired: &K, observed: Option<&K>) -> Result<K, ApplyError>
    where
        K: Object,
        K::DynamicType: Default,
    {
        self.apply_with(&K::DynamicType::default(), desired, observed).await
    }

    /// [`Self::apply`] for kinds known at run time only.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub async fn apply_with<K: Object>(
        &self,
        kind: &K::DynamicType,
        desired: &K,
        observed: Option<&K>,
    ) -> Result<K, ApplyError> {
        let mut body = serialize(kind, desired)?;
        // Fields of the server's; sending them would be refused or would claim them.
        if let Some(metadata) = body.get_mut("metadata").and_then(Value::as_object_mut) {
            for field in [
                "managedFields",
                "resourceVersion",
                "uid",
                "creationTimestamp",
                "generation",
            ] {
                metadata.remove(field);
            }
        }
        if let Some(object) = body.as_object_mut() {
            object.remove("status");
        }
        self.patch(kind, desired, "", body, observed).await
    }

    /// Server-side applies `status` to the status subresource of exactly `observed` (its uid), under the same rule of
    /// silence.
    ///
    /// # Errors
    /// As [`Self::apply`]; [`ApplyError::is_conflict`] when another object has its name by now.
    pub async fn apply_status<K>(&self, observed: &K, status: &(impl Serialize + Sync)) -> Result<K, ApplyError>
    where
        K: Object,
        K::DynamicType: Default,
    {
        let kind = K::DynamicType::default();
        let status = serde_json::to_value(status).map_err(|source| ApplyError::Serialize {
            object: describe(&kind, observed),
            source,
        })?;
        let mut metadata = json!({"name": observed.name_any(), "uid": observed.uid()});
        if let Some(namespace) = observed.namespace() {
            metadata["namespace"] = namespace.into();
        }
        let body = json!({
            "apiVersion": K::api_version(&kind),
            "kind": K::kind(&kind),
            "metadata": metadata,
            "status": status,
        });
        self.patch(&kind, observed, "status", body, Some(observed)).await
    }

    async fn patch<K: Object>(
        &self,
        kind: &K::DynamicType,
        object: &K,
        part: &'static str,
        body: Value,
        observed: Option<&K>,
    ) -> Result<K, ApplyError> {
        let target = target(kind, object, part);
        let hash = hash(&body);
        if let Some(observed) = observed
            && self.already_sent(&target, hash, observed.resource_version().as_deref())
        {
            return Ok(observed.clone());
        }
        let request = Request::new(&target.url);
        let params = PatchParams::apply(self.manager).force();
        let request = match part {
            "" => request.patch(&target.name, &params, &Patch::Apply(&body)),
            part => request.patch_subresource(part, &target.name, &params, &Patch::Apply(&body)),
        };
        let applied: K = self.send(kind, object, "apply", request).await?;
        let version = applied.resource_version();
        if let Some(resource_version) = version.filter(|version| version.len() <= VERSION_BYTES) {
            let mut remembered = self.remembered();
            // Objects that others deleted leave their entries behind; forgetting all costs one idle request an object.
            if remembered.len() >= REMEMBERED {
                remembered.clear();
            }
            remembered.insert(target, Sent { hash, resource_version });
        }
        Ok(applied)
    }

    /// Creates `desired`; if an object of that name exists already, returns that one unchanged. For objects that are
    /// made once: keys, allocations, CAs.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub async fn create_if_absent<K>(&self, desired: &K) -> Result<K, ApplyError>
    where
        K: Object,
        K::DynamicType: Default,
    {
        let kind = K::DynamicType::default();
        let target = target(&kind, desired, "");
        let body = serialize(&kind, desired)?;
        let bytes = serde_json::to_vec(&body).map_err(|source| ApplyError::Serialize {
            object: describe(&kind, desired),
            source,
        })?;
        let params = PostParams {
            field_manager: Some(self.manager.to_owned()),
            ..PostParams::default()
        };
        let created = self
            .send(
                &kind,
                desired,
                "create",
                Request::new(&target.url).create(&params, bytes),
            )
            .await;
        match created {
            Err(ApplyError::Api { source, .. }) if already_exists(&source) => {
                let request = Request::new(&target.url).get(&target.name, &GetParams::default());
                self.send(&kind, desired, "get", request).await
            }
            other => other,
        }
    }

    /// Deletes exactly this object (its uid). Gone already, or replaced by another of that name, is success; one whose
    /// deletion began already is left alone.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub async fn delete<K>(&self, object: &K) -> Result<(), ApplyError>
    where
        K: Object,
        K::DynamicType: Default,
    {
        self.delete_with(object, DeleteParams::background()).await
    }

    /// [`Self::delete`] with a grace period or propagation of the caller's.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub async fn delete_with<K>(&self, object: &K, params: DeleteParams) -> Result<(), ApplyError>
    where
        K: Object,
        K::DynamicType: Default,
    {
        if object.meta().deletion_timestamp.is_some() && params.grace_period_seconds.is_none() {
            return Ok(());
        }
        let kind = K::DynamicType::default();
        let target = target(&kind, object, "");
        let params = params.preconditions(Preconditions {
            uid: object.uid(),
            ..Preconditions::default()
        });
        let request = Request::new(&target.url).delete(&target.name, &params);
        let deleted: Result<Value, _> = self.send(&kind, object, "delete", request).await;
        match deleted {
            Ok(_) => {}
            Err(error) if matches!(error.code(), Some(404 | 409)) => {}
            Err(error) => return Err(error),
        }
        self.remembered()
            .retain(|known, _| known.url != target.url || known.name != target.name);
        Ok(())
    }

    /// Adds `finalizer` unless the object has it or is being deleted. Guarded by the observed resourceVersion.
    ///
    /// # Errors
    /// As [`Self::apply`]; [`ApplyError::is_conflict`] when the object changed in between.
    pub async fn add_finalizer<K>(&self, object: &K, finalizer: &str) -> Result<K, ApplyError>
    where
        K: Object,
        K::DynamicType: Default,
    {
        if object.finalizers().iter().any(|name| name == finalizer) || object.meta().deletion_timestamp.is_some() {
            return Ok(object.clone());
        }
        let mut finalizers = object.finalizers().to_vec();
        finalizers.push(finalizer.to_owned());
        self.set_finalizers(object, finalizers).await
    }

    /// Removes `finalizer` if the object has it. An object that is gone is success.
    ///
    /// # Errors
    /// As [`Self::add_finalizer`].
    pub async fn remove_finalizer<K>(&self, object: &K, finalizer: &str) -> Result<(), ApplyError>
    where
        K: Object,
        K::DynamicType: Default,
    {
        if !object.finalizers().iter().any(|name| name == finalizer) {
            return Ok(());
        }
        let left = object
            .finalizers()
            .iter()
            .filter(|name| *name != finalizer)
            .cloned()
            .collect();
        match self.set_finalizers(object, left).await {
            Err(error) if error.code() == Some(404) => Ok(()),
            other => other.map(drop),
        }
    }

    async fn set_finalizers<K>(&self, object: &K, finalizers: Vec<String>) -> Result<K, ApplyError>
    where
        K: Object,
        K::DynamicType: Default,
    {
        let kind = K::DynamicType::default();
        let target = target(&kind, object, "");
        let body = json!({"metadata": {
            "uid": object.uid(), "resourceVersion": object.resource_version(), "finalizers": finalizers,
        }});
        let params = PatchParams {
            field_manager: Some(self.manager.to_owned()),
            ..PatchParams::default()
        };
        let request = Request::new(&target.url).patch(&target.name, &params, &Patch::Merge(&body));
        self.send(&kind, object, "change the finalizers of", request).await
    }

    async fn send<K: Object, T: DeserializeOwned>(
        &self,
        kind: &K::DynamicType,
        object: &K,
        verb: &'static str,
        request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<T, ApplyError> {
        let request = request.map_err(|source| ApplyError::Request {
            object: describe(kind, object),
            source,
        })?;
        self.client.request(request).await.map_err(|source| ApplyError::Api {
            verb,
            object: describe(kind, object),
            source: Box::new(source),
        })
    }

    fn already_sent(&self, target: &Target, hash: [u8; 32], resource_version: Option<&str>) -> bool {
        self.remembered()
            .get(target)
            .is_some_and(|sent| sent.hash == hash && Some(sent.resource_version.as_str()) == resource_version)
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, HashMap<Target, Sent>> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn already_exists(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.reason == "AlreadyExists")
}

fn target<K: Object>(kind: &K::DynamicType, object: &K, part: &'static str) -> Target {
    Target {
        url: K::url_path(kind, object.namespace().as_deref()),
        name: object.name_any(),
        part,
    }
}

/// The object as the API wants it, apiVersion and kind included whatever the type serialises.
fn serialize<K: Object>(kind: &K::DynamicType, object: &K) -> Result<Value, ApplyError> {
    let mut body = serde_json::to_value(object).map_err(|source| ApplyError::Serialize {
        object: describe(kind, object),
        source,
    })?;
    if let Some(fields) = body.as_object_mut() {
        fields.insert("apiVersion".to_owned(), K::api_version(kind).into());
        fields.insert("kind".to_owned(), K::kind(kind).into());
    }
    Ok(body)
}

/// `Secret org-acme/customera-kubeconfig`, for messages.
pub fn describe<K: Resource>(kind: &K::DynamicType, object: &K) -> String {
    match object.namespace() {
        Some(namespace) => format!("{} {namespace}/{}", K::kind(kind), object.name_any()),
        None => format!("{} {}", K::kind(kind), object.name_any()),
    }
}

/// serde_json keeps object keys sorted, so equal objects have equal bytes.
fn hash(body: &Value) -> [u8; 32] {
    Sha256::digest(body.to_string()).into()
}

#[cfg(test)]
mod tests;
