//! The writes that `kubernest_runtime::Applier` has not: a status bound to one object at one version, and creates whose
//! answer tells whether it was ours.
//!
//! A status computed from an old copy must not land on a newer object, and least of all on another one of the same name:
//! uid and resourceVersion go along, and the API server answers 409 if either differs.

use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::names::MANAGER;

/// Applies `status` to exactly the `observed` object; `None` when it changed since, which its watch event will tell.
///
/// # Errors
/// When the API server refuses for another reason, or is not reached.
pub async fn status<K>(
    client: &Client,
    observed: &K,
    status: &(impl Serialize + Sync),
) -> Result<Option<K>, kube::Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let body = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {
            "name": observed.name_any(),
            "namespace": observed.namespace(),
            "uid": observed.uid(),
            "resourceVersion": observed.resource_version(),
        },
        "status": status,
    });
    let params = PatchParams::apply(MANAGER).force();
    match api::<K>(client, observed)
        .patch_status(&observed.name_any(), &params, &Patch::Apply(&body))
        .await
    {
        Ok(written) => Ok(Some(written)),
        Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What a create came to.
pub enum Created<K> {
    /// It is there now.
    New(K),
    /// An object of that name was there before.
    Existing(K),
    /// An object of that name was there and went in the same moment, or the namespace is going.
    Lost,
}

/// Creates `desired`, or reads what stands in its place.
///
/// # Errors
/// When the API server refuses for another reason, or is not reached.
pub async fn create<K>(client: &Client, desired: &K) -> Result<Created<K>, kube::Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
{
    create_with(client, desired, &params()).await
}

/// What [`create`] would come to: all that may refuse it is asked, and nothing is stored.
///
/// # Errors
/// As of [`create`].
pub async fn rehearse<K>(client: &Client, desired: &K) -> Result<Created<K>, kube::Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
{
    let params = PostParams {
        dry_run: true,
        ..params()
    };
    create_with(client, desired, &params).await
}

async fn create_with<K>(client: &Client, desired: &K, params: &PostParams) -> Result<Created<K>, kube::Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
{
    let api = api::<K>(client, desired);
    match api.create(params, desired).await {
        Ok(created) => Ok(Created::New(created)),
        Err(kube::Error::Api(answer)) if answer.reason == "AlreadyExists" => Ok(api
            .get_opt(&desired.name_any())
            .await?
            .map_or(Created::Lost, Created::Existing)),
        Err(error) => Err(error),
    }
}

/// Creates `desired`, which nobody else may have made.
///
/// # Errors
/// When an object of that name was there before, the API server refuses, or is not reached.
pub async fn create_own<K>(client: &Client, desired: &K) -> Result<(), kube::Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
{
    let created = api::<K>(client, desired).create(&params(), desired).await;
    created.map(|_| ())
}

fn params() -> PostParams {
    PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    }
}

/// The API of an object's kind in its namespace.
pub fn api<K>(client: &Client, object: &K) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    Api::namespaced(client.clone(), object.namespace().as_deref().unwrap_or_default())
}
