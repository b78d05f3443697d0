//! All that a tenant may leave behind, in the outer cluster and on its nodes.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Secret, Service};
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, ListParams};
use kube::{Resource, ResourceExt};
use kubernest_crds::NetworkAllocation;
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance, VirtualMachineInstanceReplicaSet};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::Outer;
use crate::wait::until;

/// How long Kubernetes' garbage collector may take.
const COLLECTED: Duration = Duration::from_secs(60);

/// Fails with what is there and was not. A launcher's Secret belongs to its instance, and is collected after it.
///
/// # Errors
/// When something was left behind.
pub async fn nothing_since(outer: &Outer, namespace: &str, before: &BTreeSet<String>) -> Result<()> {
    println!("-- {namespace}: what is left");
    let secrets = Api::<Secret>::namespaced(outer.client.clone(), namespace);
    for secret in secrets.list(&ListParams::default()).await? {
        if secret
            .owner_references()
            .iter()
            .any(|owner| owner.kind == VirtualMachineInstance::kind(&()))
        {
            let name = secret.name_any();
            let collected = until(&secrets, &name, "collected", |secret: Option<&Secret>| secret.is_none());
            timeout(COLLECTED, collected)
                .await
                .with_context(|| format!("{name} stays"))??;
        }
    }
    let after = inventory(outer, namespace).await?;
    let left: Vec<_> = after.difference(before).collect();
    ensure!(left.is_empty(), "left behind in {namespace}: {left:#?}");
    Ok(())
}

/// What is there now: objects of the namespace, allocations and routes. Taken before and after, the two must be equal.
pub async fn inventory(outer: &Outer, namespace: &str) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    objects::<Pod>(outer, namespace, &mut found).await?;
    objects::<Secret>(outer, namespace, &mut found).await?;
    objects::<Service>(outer, namespace, &mut found).await?;
    objects::<ConfigMap>(outer, namespace, &mut found).await?;
    objects::<PersistentVolumeClaim>(outer, namespace, &mut found).await?;
    objects::<VirtualMachine>(outer, namespace, &mut found).await?;
    objects::<VirtualMachineInstance>(outer, namespace, &mut found).await?;
    objects::<VirtualMachineInstanceReplicaSet>(outer, namespace, &mut found).await?;
    let kind = GroupVersionKind::gvk("k8s.cni.cncf.io", "v1", "NetworkAttachmentDefinition");
    let resource = ApiResource::from_gvk_with_plural(&kind, "network-attachment-definitions");
    let networks = Api::<DynamicObject>::namespaced_with(outer.client.clone(), namespace, &resource);
    found.extend(
        networks
            .list(&ListParams::default())
            .await?
            .iter()
            .map(|one| format!("network {}", one.name_any())),
    );
    let allocations = Api::<NetworkAllocation>::all(outer.client.clone())
        .list(&ListParams::default())
        .await?;
    found.extend(allocations.iter().map(|one| format!("allocation {}", one.name_any())));
    found.extend(routes(outer)?.into_iter().map(|route| format!("route {route}")));
    Ok(found)
}

/// Fails with what any machine left on any node: taps, bridges, VXLANs, processes and mounts of launcher pods. Stories that
/// run alone ask at their start too, for those that ran side by side.
///
/// # Errors
/// When something was left behind.
pub fn nodes_are_clean(outer: &Outer) -> Result<()> {
    let mut left = Vec::new();
    for node in 0..outer.bed.plan().nodes() {
        left.extend(
            on_node(outer, node)?
                .into_iter()
                .map(|what| format!("node {node}: {what}")),
        );
    }
    ensure!(left.is_empty(), "left behind: {left:#?}");
    Ok(())
}

async fn objects<K>(outer: &Outer, namespace: &str, found: &mut BTreeSet<String>) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let all = Api::<K>::namespaced(outer.client.clone(), namespace)
        .list(&ListParams::default())
        .await?;
    // The API server puts this one into every namespace, in its own time.
    let own = all.iter().filter(|one| one.name_any() != "kube-root-ca.crt");
    found.extend(own.map(|one| format!("{} {}", K::kind(&()), one.name_any())));
    Ok(())
}

/// Host names in the map that HAProxy's sidecar keeps.
fn routes(outer: &Outer) -> Result<Vec<String>> {
    let text = outer.kubectl(&[
        "exec",
        "-n",
        "kubernest-system",
        "deployment/kubernest-ingress",
        "-c",
        "haproxy",
        "--",
        "cat",
        "/run/haproxy/routes.map",
    ])?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn on_node(outer: &Outer, node: usize) -> Result<Vec<String>> {
    // Names of links in the node's namespace that are ours, what its agent noted of attachments, and launchers' processes
    // and mounts below it.
    let script = "ip -o link show | grep -oE '(kn-|k6t-|tap)[^:@ ]*' || true; \
        find /run/kubernest/attachments -type f 2>/dev/null || true; \
        grep -hoE 'virt-launcher-[^/ ]*' /proc/mounts | sort -u | sed 's/^/mount of /' || true; \
        for p in /proc/[0-9]*; do case $(readlink $p/exe 2>/dev/null) in *qemu-system*|*virtiofsd*|*libvirtd*|*kubernest-launcher*) \
        readlink $p/exe ;; esac; done; true";
    let command = outer
        .bed
        .node_command(node, &["sh".into(), "-c".into(), script.into()])?;
    let output = Command::new(&command[0]).args(&command[1..]).output()?;
    anyhow::ensure!(
        output.status.success(),
        "looking at node {node}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(str::to_owned)
        .collect())
}
