//! Installs Kubernest's CRDs as the chart does, and waits until the API server serves them.

use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams},
    runtime::{conditions, wait::await_condition},
};

const FIELD_MANAGER: &str = "kubernest-integration";
const ESTABLISHED: Duration = Duration::from_secs(30);

/// Why the CRDs are not served.
#[derive(Debug, thiserror::Error)]
pub enum CrdError {
    /// The API server refused one.
    #[error("applying CRD {name} failed")]
    Apply {
        /// Its name.
        name: String,
        /// What the API server said.
        #[source]
        source: Box<kube::Error>,
    },
    /// One is not established in time.
    #[error("CRD {0} is not established after {ESTABLISHED:?}")]
    NotEstablished(String),
}

/// Applies all CRDs and waits until they are established.
///
/// # Errors
/// [`CrdError`].
pub async fn install_crds(client: &Client) -> Result<(), CrdError> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let params = PatchParams::apply(FIELD_MANAGER).force();
    for (_, crd) in kubernest_crds::all_crds() {
        let name = crd.name_any();
        let applied = api.patch(&name, &params, &Patch::Apply(&crd)).await;
        applied.map_err(|source| CrdError::Apply {
            name: name.clone(),
            source: Box::new(source),
        })?;
        let established = await_condition(api.clone(), &name, conditions::is_crd_established());
        match tokio::time::timeout(ESTABLISHED, established).await {
            Ok(Ok(_)) => {}
            _ => return Err(CrdError::NotEstablished(name)),
        }
    }
    Ok(())
}
