//! Reads what exists of a cluster in the outer cluster. Needs a client; decides nothing.
//!
//! Always read from the API server, not from a cache: a reconcile runs only when something changed, and what it reads
//! is never older than its own last write. Objects that carry our label but belong to someone else are left out.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Secret, Service};
use kube::{Api, Client, Resource, ResourceExt, api::ListParams, core::DynamicObject};
use kubernest_crds::{
    NetworkAllocation, TenantCluster,
    kubevirt::v1::{VirtualMachine, VirtualMachineInstance},
    labels,
};
use serde::de::DeserializeOwned;

use super::build::{
    network::nad_kind,
    slots::{claim_name, image_of},
};
use crate::options::{NodeImage, NodeImages};

/// Objects of the whole installation in one answer.
const PAGE: u32 = 100;

/// Something can't be read.
#[derive(Debug, thiserror::Error)]
#[error("reading {what} failed")]
pub struct DereferenceError {
    what: &'static str,
    #[source]
    source: kube::Error,
}

/// What exists, by name.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Machines.
    pub machines: BTreeMap<String, VirtualMachine>,
    /// Data disks.
    pub claims: BTreeMap<String, PersistentVolumeClaim>,
    /// Keys, certificates, kubeconfigs, bootstrap documents.
    pub secrets: BTreeMap<String, Secret>,
    /// The Service before the API servers.
    pub services: BTreeMap<String, Service>,
    /// The tenant network as Multus knows it.
    pub attachments: BTreeMap<String, DynamicObject>,
    /// The tenant's API server has answered: its etcd has data.
    pub has_answered: bool,
}

impl Observed {
    /// Every slot of which anything exists, with its host address where one is written down; machines decide.
    pub fn slots(&self) -> BTreeMap<String, Option<std::net::Ipv4Addr>> {
        let mut all = BTreeMap::new();
        let secrets = self.secrets.values().map(|object| &object.metadata);
        let claims = self.claims.values().map(|object| &object.metadata);
        let machines = self.machines.values().map(|object| &object.metadata);
        for metadata in claims.chain(secrets).chain(machines) {
            let label = metadata.labels.as_ref().and_then(|labels| labels.get(labels::SLOT));
            let Some(slot) = label else { continue };
            let written = metadata
                .annotations
                .as_ref()
                .and_then(|annotations| annotations.get(labels::NODE_IP));
            let address = written.and_then(|text| text.parse().ok());
            let entry: &mut Option<std::net::Ipv4Addr> = all.entry(slot.clone()).or_default();
            *entry = address.or(*entry);
        }
        all
    }

    /// Whether a slot's machine runs and is to stay.
    pub fn runs(&self, slot: &str) -> bool {
        self.machines.get(slot).is_some_and(|machine| {
            let stays = machine.metadata.deletion_timestamp.is_none();
            stays && machine.status.as_ref().is_some_and(|status| status.ready)
        })
    }

    /// Whether somebody deleted a slot's data disk: it stays while a machine uses it (Kubernetes' pvc-protection).
    pub fn is_losing_data(&self, slot: &str) -> bool {
        let claim = self.claims.get(&claim_name(slot));
        claim.is_some_and(|claim| claim.metadata.deletion_timestamp.is_some())
    }
}

/// Reads all that belongs to the cluster.
pub async fn dereference(client: &Client, cluster: &TenantCluster) -> Result<Observed, DereferenceError> {
    let namespace = cluster.namespace().unwrap_or_default();
    let nad_kind = nad_kind();
    let attachments = Api::<DynamicObject>::namespaced_with(client.clone(), &namespace, &nad_kind);
    let (machines, claims, secrets, services, attachments) = futures::try_join!(
        owned(Api::namespaced(client.clone(), &namespace), "VirtualMachines", cluster),
        owned(
            Api::namespaced(client.clone(), &namespace),
            "PersistentVolumeClaims",
            cluster
        ),
        owned(Api::namespaced(client.clone(), &namespace), "Secrets", cluster),
        owned(Api::namespaced(client.clone(), &namespace), "Services", cluster),
        owned(
            attachments,
            "NetworkAttachmentDefinitions (is Multus installed?)",
            cluster
        ),
    )?;
    Ok(Observed {
        machines,
        claims,
        secrets,
        services,
        attachments,
        // Once known, status keeps it.
        has_answered: cluster.status.as_ref().is_some_and(|status| status.version.is_some()),
    })
}

async fn owned<K>(
    api: Api<K>,
    what: &'static str,
    cluster: &TenantCluster,
) -> Result<BTreeMap<String, K>, DereferenceError>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug,
{
    let selector = format!("{}={}", labels::CLUSTER, cluster.name_any());
    let all = listed(api, what, &ListParams::default().labels(&selector)).await?;
    let uid = cluster.uid().unwrap_or_default();
    let ours = all.into_iter().filter(|object| is_owned(object, &uid));
    Ok(ours.map(|object| (object.name_any(), object)).collect())
}

async fn listed<K>(api: Api<K>, what: &'static str, which: &ListParams) -> Result<Vec<K>, DereferenceError>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug,
{
    let all = api.list(which).await;
    Ok(all.map_err(|source| DereferenceError { what, source })?.items)
}

/// Whether the object's owner is the cluster with this UID.
pub fn is_owned(object: &impl Resource, uid: &str) -> bool {
    object.owner_references().iter().any(|owner| owner.uid == uid)
}

/// The allocation that the cluster's status names, or all allocations when it names none that is its own.
pub async fn allocations(client: &Client, cluster: &TenantCluster) -> Result<Vec<NetworkAllocation>, DereferenceError> {
    let api = Api::<NetworkAllocation>::all(client.clone());
    let failed = |source| DereferenceError {
        what: "NetworkAllocations",
        source,
    };
    if let Some(vni) = cluster.status.as_ref().and_then(|status| status.vni) {
        let named = api.get_opt(&NetworkAllocation::name_for(vni)).await.map_err(failed)?;
        if let Some(own) = named.filter(|found| Some(&found.spec.owner.uid) == cluster.meta().uid.as_ref()) {
            return Ok(vec![own]);
        }
    }
    all_allocations(client).await
}

/// Every allocation.
pub async fn all_allocations(client: &Client) -> Result<Vec<NetworkAllocation>, DereferenceError> {
    let all = Api::all(client.clone());
    listed(all, "NetworkAllocations", &ListParams::default()).await
}

/// What decides upon a cluster besides its own spec and the flags.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// The image that its machines have, where its version is offered no more.
    pub image: Option<NodeImage>,
    /// The oldest cluster that asks for the same host name by its spec, maybe itself. Not looked for where it has a route:
    /// from then on the ingress decides who keeps the name.
    pub first_of_host: Option<TenantCluster>,
}

/// Reads what decides upon the cluster besides itself.
pub async fn surroundings(
    client: &Client,
    cluster: &TenantCluster,
    offered: &NodeImages,
) -> Result<Surroundings, DereferenceError> {
    let mut found = Surroundings::default();
    if !offered.0.contains_key(&cluster.spec.version) {
        found.image = image_in_use(client, cluster).await?;
    }
    let host = &cluster.spec.access.hostname;
    let routed = cluster.status.as_ref().is_some_and(|status| status.ingress.is_some());
    // Names of the installation's own domain need no look: admission leaves each to its cluster.
    if !host.is_empty() && !routed {
        found.first_of_host = first_of_host(client, host).await?;
    }
    Ok(found)
}

/// The image that the cluster's machines were made from: theirs are all of one version.
async fn image_in_use(client: &Client, cluster: &TenantCluster) -> Result<Option<NodeImage>, DereferenceError> {
    let machines = Api::namespaced(client.clone(), &cluster.namespace().unwrap_or_default());
    let machines = owned(machines, "VirtualMachines", cluster).await?;
    Ok(machines.values().find_map(image_of))
}

/// The oldest cluster whose spec asks for `host`. Of all clusters of the installation only a page is held at a time.
async fn first_of_host(client: &Client, host: &str) -> Result<Option<TenantCluster>, DereferenceError> {
    let api = Api::<TenantCluster>::all(client.clone());
    let mut which = ListParams::default().limit(PAGE);
    let mut first: Option<TenantCluster> = None;
    loop {
        let page = api.list(&which).await.map_err(|source| DereferenceError {
            what: "TenantClusters",
            source,
        })?;
        let same = |one: &TenantCluster| one.spec.access.hostname.eq_ignore_ascii_case(host);
        for one in page.items.into_iter().filter(same) {
            if first.as_ref().is_none_or(|first| one.is_senior_to(first)) {
                first = Some(one);
            }
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => which = which.continue_token(&token),
            None => return Ok(first),
        }
    }
}

/// `all` as those of TenantClusters that exist and those of ones that are no more: somebody took their finalizer away.
pub async fn held_and_orphaned(
    client: &Client,
    all: Vec<NetworkAllocation>,
) -> Result<(Vec<NetworkAllocation>, Vec<NetworkAllocation>), DereferenceError> {
    let clusters = Api::<TenantCluster>::all(client.clone());
    let clusters = clusters.list_metadata(&ListParams::default()).await;
    let clusters = clusters.map_err(|source| DereferenceError {
        what: "TenantClusters",
        source,
    })?;
    let uids: BTreeSet<_> = clusters.iter().filter_map(ResourceExt::uid).collect();
    let is_held = |allocation: &NetworkAllocation| uids.contains(&allocation.spec.owner.uid);
    Ok(all.into_iter().partition(is_held))
}

/// Instances in the cluster's namespace that are on the network `attachment` and not the cluster's, by name.
pub async fn strangers(
    client: &Client,
    cluster: &TenantCluster,
    attachment: &str,
) -> Result<Vec<String>, DereferenceError> {
    let namespace = cluster.namespace().unwrap_or_default();
    let all = Api::<VirtualMachineInstance>::namespaced(client.clone(), &namespace);
    let all = listed(all, "VirtualMachineInstances", &ListParams::default()).await?;
    let names = [attachment.to_owned(), format!("{namespace}/{attachment}")];
    let joined = all.into_iter().filter(|instance| {
        let networks = instance.spec.networks.iter().flatten();
        let mut multus = networks.filter_map(|network| network.multus.as_ref());
        multus.any(|multus| names.contains(&multus.network_name))
    });
    Ok(joined.map(|instance| instance.name_any()).collect())
}

/// The cluster's running instances by name, for what their guests said last.
pub async fn instances(
    client: &Client,
    cluster: &TenantCluster,
) -> Result<BTreeMap<String, VirtualMachineInstance>, DereferenceError> {
    let api = Api::<VirtualMachineInstance>::namespaced(client.clone(), &cluster.namespace().unwrap_or_default());
    let selector = format!("{}={}", labels::CLUSTER, cluster.name_any());
    let all = listed(api, "VirtualMachineInstances", &ListParams::default().labels(&selector)).await?;
    Ok(all.into_iter().map(|object| (object.name_any(), object)).collect())
}
