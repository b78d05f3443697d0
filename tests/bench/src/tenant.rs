//! Tenants that are measured while they start.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{Api, DeleteParams, ListParams};
use kube::{Config, ResourceExt};
use kubernest_crds::kubevirt::v1::VirtualMachine;
use kubernest_crds::{TenantCluster, labels};
use kubernest_e2e::{Outer, Tenant, pods, wait};
use procfs::{Current, Uptime};
use serde_json::json;
use tempfile::TempDir;

use crate::readyz;

const NAMESPACE: &str = "bench";

/// How a control plane started, and what is needed to start it again by hand.
pub struct Start {
    /// Seconds from apply to /readyz.
    pub ready: f64,
    /// Seconds from apply to qemu's start.
    pub qemu: f64,
    /// The slot's bootstrap folder.
    pub bootstrap: TempDir,
    /// The tenant's kubeconfig.
    pub config: Config,
    /// Its machine has hardware virtualisation.
    pub kvm: bool,
}

/// A launcher pod.
#[derive(Debug)]
pub struct Launcher {
    /// Its machine.
    pub machine: String,
    /// Its uid.
    pub uid: String,
    /// It was given /dev/kvm.
    pub kvm: bool,
}

/// Starts a tenant of one control plane and no workers, asks it through the ingress until it is ready, deletes it.
pub async fn start(outer: &Outer, version: &str) -> Result<Start> {
    let (uptime, began) = (Uptime::current()?.uptime, Instant::now());
    let spec = json!({"version": version, "nodePools": []});
    let tenant = Tenant::apply(outer, NAMESPACE, "api", spec).await?;
    tenant.fetch_kubeconfig().await?;
    let config = tenant.config().await?;
    let ready = readyz::wait(config.clone()).await?.duration_since(began).as_secs_f64();
    let launchers = launchers(outer, NAMESPACE).await?;
    let [launcher] = launchers.as_slice() else {
        anyhow::bail!("one launcher of a tenant without workers, found {launchers:?}")
    };
    let qemu = pods::qemu_start(&launcher.uid)? - uptime;
    let bootstrap = bootstrap(outer, &format!("{}-bootstrap", launcher.machine)).await?;
    tenant.delete().await?;
    remove_namespace(outer, NAMESPACE).await?;
    Ok(Start {
        ready,
        qemu,
        bootstrap,
        config,
        kvm: launcher.kvm,
    })
}

/// The sample of the documentation, applied as users apply it.
pub struct Sample<'a> {
    outer: &'a Outer,
    tenant: Tenant<'a>,
    /// Seconds from apply until the TenantCluster, and so each of its nodes, is Ready.
    pub ready: f64,
}

impl<'a> Sample<'a> {
    /// Applies the one TenantCluster in `manifest` and waits for it.
    pub async fn apply(outer: &'a Outer, manifest: &Path) -> Result<Self> {
        let began = Instant::now();
        outer.kubectl(&["apply", "-f", manifest.to_str().context("path")?])?;
        let all = Api::<TenantCluster>::all(outer.client.clone())
            .list(&ListParams::default())
            .await?;
        let [cluster] = all.items.as_slice() else {
            anyhow::bail!("one TenantCluster on the bed, found {}", all.items.len())
        };
        let namespace = cluster.namespace().context("namespace")?;
        let tenant = Tenant::open(outer, &namespace, &cluster.name_any()).await?;
        tenant.ready().await?;
        let ready = began.elapsed().as_secs_f64();
        Ok(Self { outer, tenant, ready })
    }

    /// The launcher pods of its machines.
    pub async fn launchers(&self) -> Result<Vec<Launcher>> {
        launchers(self.outer, &self.tenant.namespace).await
    }

    /// Deletes it and its namespace.
    pub async fn delete(self) -> Result<()> {
        self.tenant.delete().await?;
        remove_namespace(self.outer, &self.tenant.namespace).await
    }
}

async fn launchers(outer: &Outer, namespace: &str) -> Result<Vec<Launcher>> {
    let machines = Api::<VirtualMachine>::namespaced(outer.client.clone(), namespace)
        .list(&ListParams::default())
        .await?;
    let mut found = Vec::new();
    for machine in machines.iter().map(ResourceExt::name_any) {
        for pod in outer.launchers(namespace, &machine).await? {
            let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
            let limits = containers.filter_map(|container| container.resources.as_ref()?.limits.as_ref());
            found.push(Launcher {
                machine: machine.clone(),
                uid: pod.uid().context("uid")?,
                kvm: limits
                    .into_iter()
                    .any(|limits| limits.contains_key(labels::KVM_RESOURCE)),
            });
        }
    }
    Ok(found)
}

/// One file for each key of the slot's Secret, as the boot script takes them.
async fn bootstrap(outer: &Outer, secret: &str) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let secrets = Api::<Secret>::namespaced(outer.client.clone(), NAMESPACE);
    for (key, value) in secrets.get(secret).await?.data.unwrap_or_default() {
        fs::write(folder.path().join(key), value.0)?;
    }
    Ok(folder)
}

async fn remove_namespace(outer: &Outer, name: &str) -> Result<()> {
    let api = Api::<Namespace>::all(outer.client.clone());
    let uid = api.get(name).await?.uid().context("uid")?;
    api.delete(name, &DeleteParams::default()).await?;
    wait::until(&api, name, "gone", kube::runtime::conditions::is_deleted(&uid)).await?;
    Ok(())
}
