//! A tenant cluster, reached as its owner reaches it: by the kubeconfig in its Secret, through the ingress.

use std::path::PathBuf;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Node, Secret};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use kubernest_crds::{TenantCluster, conditions};
use serde_json::json;

use crate::outer::{Outer, kubectl};
use crate::wait;

/// A tenant cluster.
pub struct Tenant<'a> {
    outer: &'a Outer,
    /// Namespace of its TenantCluster.
    pub namespace: String,
    /// Name of its TenantCluster.
    pub name: String,
    kubeconfig: PathBuf,
}

impl<'a> Tenant<'a> {
    /// Applies a TenantCluster and lets its host name resolve.
    pub async fn apply(outer: &'a Outer, namespace: &str, name: &str, spec: serde_json::Value) -> Result<Self> {
        let spaces = Api::<k8s_openapi::api::core::v1::Namespace>::all(outer.client.clone());
        let space = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        spaces
            .patch(namespace, &PatchParams::apply("e2e"), &Patch::Apply(&space))
            .await?;
        let object = json!({
            "apiVersion": "kubernest.io/v1alpha1", "kind": "TenantCluster",
            "metadata": {"name": name, "namespace": namespace}, "spec": spec,
        });
        Self::api(outer, namespace)
            .create(&PostParams::default(), &serde_json::from_value(object)?)
            .await?;
        Self::open(outer, namespace, name).await
    }

    /// One that was applied by other means.
    pub async fn open(outer: &'a Outer, namespace: &str, name: &str) -> Result<Self> {
        let host = format!("{name}.{namespace}.kubernest.test");
        outer.bed.add_host(outer.ingress_address().await?, &host)?;
        let kubeconfig = std::env::temp_dir().join(format!("kubernest-e2e-{}-{namespace}-{name}", std::process::id()));
        Ok(Self {
            outer,
            namespace: namespace.into(),
            name: name.into(),
            kubeconfig,
        })
    }

    fn api(outer: &Outer, namespace: &str) -> Api<TenantCluster> {
        Api::namespaced(outer.client.clone(), namespace)
    }

    /// The TenantCluster as it is now.
    pub async fn object(&self) -> Result<TenantCluster> {
        Ok(Self::api(self.outer, &self.namespace).get(&self.name).await?)
    }

    /// Waits for a condition to be True.
    pub async fn wait_for(&self, condition: &'static str) -> Result<TenantCluster> {
        let holds = move |object: Option<&TenantCluster>| {
            let conditions = object
                .and_then(|cluster| cluster.status.as_ref())
                .map(|status| &status.conditions);
            conditions.is_some_and(|all| all.iter().any(|one| one.type_ == condition && one.status == "True"))
        };
        let api = Self::api(self.outer, &self.namespace);
        wait::until(&api, &self.name, condition, holds)
            .await?
            .context("the TenantCluster is gone")
    }

    /// Waits until it is Ready and keeps its kubeconfig.
    pub async fn ready(&self) -> Result<TenantCluster> {
        let cluster = self.wait_for(conditions::READY).await?;
        self.fetch_kubeconfig().await?;
        Ok(cluster)
    }

    /// Waits for the admin kubeconfig in its Secret and keeps it.
    pub async fn fetch_kubeconfig(&self) -> Result<()> {
        let secrets = Api::<Secret>::namespaced(self.outer.client.clone(), &self.namespace);
        let name = format!("{}-kubeconfig", self.name);
        let secret = wait::until(&secrets, &name, "Secret", |secret: Option<&Secret>| secret.is_some())
            .await?
            .context("the kubeconfig Secret is gone")?;
        let value = secret
            .data
            .unwrap_or_default()
            .remove("value")
            .context("key `value` of the kubeconfig Secret")?;
        std::fs::write(&self.kubeconfig, value.0)?;
        Ok(())
    }

    /// How to reach it through the ingress, by the kubeconfig that was kept.
    pub async fn config(&self) -> Result<kube::Config> {
        let kubeconfig = kube::config::Kubeconfig::read_from(&self.kubeconfig)?;
        Ok(kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?)
    }

    /// A client through the ingress.
    pub async fn client(&self) -> Result<Client> {
        Ok(Client::try_from(self.config().await?)?)
    }

    /// The real kubectl with the tenant's kubeconfig, through the ingress.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let program = self.outer.bed.kubectl();
        kubectl(
            program.to_str().context("path")?,
            self.kubeconfig.to_str().context("path")?,
            args,
        )
    }

    /// Waits until a node is Ready in the tenant and, when given, was started again since it had `not_boot_id`.
    pub async fn node_ready(&self, name: &str, not_boot_id: Option<String>) -> Result<Node> {
        let holds = move |node: Option<&Node>| {
            let Some(status) = node.and_then(|node| node.status.as_ref()) else {
                return false;
            };
            let ready = status
                .conditions
                .iter()
                .flatten()
                .any(|one| one.type_ == "Ready" && one.status == "True");
            let boot_id = status.node_info.as_ref().map(|info| info.boot_id.clone());
            ready && (not_boot_id.is_none() || boot_id != not_boot_id)
        };
        let api = Api::<Node>::all(self.client().await?);
        wait::until(&api, name, "node Ready", holds)
            .await?
            .context("the node is gone")
    }

    /// Deletes the TenantCluster and waits until it is gone.
    pub async fn delete(&self) -> Result<()> {
        let api = Self::api(self.outer, &self.namespace);
        let uid = api.get(&self.name).await?.uid().context("uid")?;
        api.delete(&self.name, &DeleteParams::default()).await?;
        wait::until(&api, &self.name, "gone", kube::runtime::conditions::is_deleted(&uid)).await?;
        Ok(())
    }
}

impl Drop for Tenant<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.kubeconfig);
    }
}
