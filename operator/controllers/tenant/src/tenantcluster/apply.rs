//! Writes a cluster's objects into the outer cluster: what was built, in the order that keeps a crash harmless. Needs
//! a client; decides nothing about content.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Secret, Service};
use kube::{
    Api, Resource, ResourceExt,
    core::{DynamicObject, NamespaceResourceScope},
};
use kubernest_crds::{NetworkAllocation, TenantCluster};
use kubernest_pki::{IssueError, issue};
use kubernest_runtime::{
    Applier, ApplyError,
    apply::{Object, describe},
};

use super::{
    build::{
        bootstrap, kubeconfig,
        network::{self, Network, NetworkError},
        pki::{self, Authorities, Authority, Origin, PkiError},
        slots::{self, Slot},
    },
    console,
    dereference::{self, DereferenceError, Observed, is_owned},
    validate::Validated,
};

/// Slots that are written at a time.
const SLOTS_AT_ONCE: usize = 8;

/// Why something was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The API server refused, or can't be reached.
    #[error("writing failed")]
    Apply(#[source] ApplyError),
    /// Something else has the name.
    #[error("{0} exists and does not belong to this TenantCluster: delete or rename it")]
    Foreign(String),
    /// Whether the name is free can't be read.
    #[error("whether {0} exists can't be read")]
    Claim(String, #[source] kube::Error),
    /// Its data disk is gone.
    #[error(
        "PersistentVolumeClaim {0}, which has all that the tenant's etcd knows, is gone: restore it under this name, from a \
         snapshot for example, or delete the TenantCluster; no empty one is made in its place"
    )]
    DataGone(String),
    /// Allocations can't be read.
    #[error("choosing a network failed")]
    Allocations(#[source] DereferenceError),
    /// No network is left.
    #[error("there is no network for the tenant")]
    Network(#[source] NetworkError),
    /// Keys or certificates.
    #[error("keys and certificates can't be made")]
    Pki(#[source] PkiError),
    /// The admin's certificate.
    #[error("the admin's certificate was not issued")]
    Admin(#[source] IssueError),
    /// The Service has no address yet.
    #[error("Service {0} has no ClusterIP")]
    NoClusterIp(String),
    /// A bootstrap document.
    #[error("the bootstrap document of {slot} can't be serialised")]
    Bootstrap {
        /// The slot.
        slot: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// The cluster's network: its own among `all` allocations, or the first free one that the API server gives us.
pub async fn network(
    applier: &Applier,
    cluster: &TenantCluster,
    valid: &Validated,
    pool: ipnet::Ipv4Net,
    mut all: Vec<NetworkAllocation>,
) -> Result<Network, WriteError> {
    let preferred = cluster.status.as_ref().and_then(|status| status.vni);
    let mut refused = BTreeSet::new();
    loop {
        if let Some(own) = network::own(&all, &valid.uid, preferred) {
            return Network::of(&own).map_err(WriteError::Network);
        }
        // Listed before their clusters are, so that no cluster's is taken for an orphan while both are being made.
        let (held, orphans) = dereference::held_and_orphaned(applier.client(), all)
            .await
            .map_err(WriteError::Allocations)?;
        for orphan in orphans {
            tracing::warn!(
                allocation = orphan.name_any(),
                cluster = orphan.spec.owner.name,
                namespace = orphan.spec.owner.namespace,
                "takes back the network of a TenantCluster that is gone"
            );
            applier.delete(&orphan).await.map_err(WriteError::Apply)?;
        }
        let desired = network::candidate(valid, pool, &held, &refused).map_err(WriteError::Network)?;
        let got = applier.create_if_absent(&desired).await.map_err(WriteError::Apply)?;
        if got.spec.owner.uid == valid.uid {
            return Network::of(&got).map_err(WriteError::Network);
        }
        // Someone was faster: look again, and never ask for the same one twice.
        refused.insert(desired.spec.vni);
        all = dereference::all_allocations(applier.client())
            .await
            .map_err(WriteError::Allocations)?;
    }
}

/// Server-side applies an object of ours. One that was not observed is looked up first, so that something of the same
/// name that is not ours is never taken over.
async fn put<K>(applier: &Applier, desired: &K, observed: Option<&K>, uid: &str) -> Result<K, WriteError>
where
    K: Object + Resource<Scope = NamespaceResourceScope>,
    K::DynamicType: Default,
{
    unclaimed(applier, desired, observed, uid).await?;
    applier.apply(desired, observed).await.map_err(WriteError::Apply)
}

/// Nothing that is not ours has the name.
async fn unclaimed<K>(applier: &Applier, desired: &K, observed: Option<&K>, uid: &str) -> Result<(), WriteError>
where
    K: Object + Resource<Scope = NamespaceResourceScope>,
    K::DynamicType: Default,
{
    if observed.is_some() {
        return Ok(());
    }
    let namespace = desired.namespace().unwrap_or_default();
    claim(
        &Api::<K>::namespaced(applier.client().clone(), &namespace),
        desired,
        uid,
    )
    .await
}

async fn claim<K>(api: &Api<K>, desired: &K, uid: &str) -> Result<(), WriteError>
where
    K: Object,
    K::DynamicType: Default,
{
    let object = || describe(&K::DynamicType::default(), desired);
    let found = api.get_metadata_opt(&desired.name_any()).await;
    let found = found.map_err(|source| WriteError::Claim(object(), source))?;
    match found {
        Some(found) if !is_owned(&found, uid) => Err(WriteError::Foreign(object())),
        _ => Ok(()),
    }
}

/// The tenant network as Multus knows it.
pub async fn attachment(
    applier: &Applier,
    valid: &Validated,
    network: &Network,
    observed: &Observed,
) -> Result<(), WriteError> {
    let kind = network::nad_kind();
    let desired = network::attachment(valid, network);
    let observed = observed.attachments.get(&valid.name);
    if observed.is_none() {
        let api = Api::<DynamicObject>::namespaced_with(applier.client().clone(), &valid.namespace, &kind);
        let object = || format!("NetworkAttachmentDefinition {}/{}", valid.namespace, valid.name);
        let found = api.get_metadata_opt(&valid.name).await;
        let found = found.map_err(|source| WriteError::Claim(object(), source))?;
        if found.is_some_and(|found| !is_owned(&found, &valid.uid)) {
            return Err(WriteError::Foreign(object()));
        }
    }
    applier
        .apply_with(&kind, &desired, observed)
        .await
        .map(drop)
        .map_err(WriteError::Apply)
}

/// The Service before the API servers; its address.
pub async fn service(applier: &Applier, valid: &Validated, observed: &Observed) -> Result<IpAddr, WriteError> {
    let desired = network::api_service(valid);
    let observed = observed.services.get(&desired.name_any());
    let service: Service = put(applier, &desired, observed, &valid.uid).await?;
    let address = service
        .spec
        .as_ref()
        .and_then(|spec| spec.cluster_ip.as_deref())
        .and_then(|text| text.parse().ok());
    address.ok_or_else(|| WriteError::NoClusterIp(service.name_any()))
}

/// CAs and keys: those that exist, and new ones for those that don't. Never made twice: created, not applied.
pub async fn authorities(
    applier: &Applier,
    valid: &Validated,
    observed: &Observed,
) -> Result<Arc<Authorities>, WriteError> {
    let stored: BTreeMap<Origin, Secret> = stream::iter(Origin::ALL)
        .map(|origin| async move {
            let name = origin.secret_name(&valid.name);
            if let Some(secret) = observed.secrets.get(&name) {
                return Ok((origin, secret.clone()));
            }
            let desired = origin.generate(valid).map_err(WriteError::Pki)?;
            let secret = applier.create_if_absent(&desired).await.map_err(WriteError::Apply)?;
            if !is_owned(&secret, &valid.uid) {
                return Err(WriteError::Pki(PkiError::Foreign { secret: name }));
            }
            Ok((origin, secret))
        })
        .buffer_unordered(Origin::ALL.len())
        .try_collect()
        .await?;
    Authorities::parse(valid, &stored)
        .map(Arc::new)
        .map_err(WriteError::Pki)
}

/// The admin's kubeconfig; when its certificate ends.
pub async fn kubeconfig(
    applier: &Applier,
    valid: &Validated,
    authorities: &Authorities,
    observed: &Observed,
    now: Timestamp,
) -> Result<Timestamp, WriteError> {
    let stored = observed.secrets.get(&kubeconfig::secret_name(&valid.name));
    let credential = match kubeconfig::reuse(stored, authorities, now) {
        Some(credential) => credential,
        None => {
            let issuer = authorities.issuer(Authority::Cluster);
            issue(issuer, &kubeconfig::leaf()).await.map_err(WriteError::Admin)?
        }
    };
    put(
        applier,
        &kubeconfig::secret(valid, authorities, &credential),
        stored,
        &valid.uid,
    )
    .await?;
    Ok(credential.not_after)
}

/// What all slots are made from.
pub struct SlotInput<'a> {
    /// The cluster.
    pub valid: &'a Validated,
    /// Its network.
    pub network: &'a Network,
    /// Its CAs and keys.
    pub authorities: &'a Authorities,
    /// Address of its API Service.
    pub cluster_ip: IpAddr,
    /// What exists.
    pub observed: &'a Observed,
    /// Nodes that are Ready in the tenant.
    pub ready: &'a BTreeSet<String>,
    /// The time.
    pub now: Timestamp,
}

/// When certificates of a slot end, by profile name.
pub type Expiries = Vec<(&'static str, Timestamp)>;

/// Each slot's Secret, claim and machine, all slots side by side, the control plane's first.
pub async fn slots(applier: &Applier, input: &SlotInput<'_>, slots: &[Slot]) -> Result<Vec<Expiries>, WriteError> {
    let Some(control_plane_ip) = slots.iter().find(|slot| slot.is_control_plane()).map(|slot| slot.ip) else {
        return Ok(Vec::new());
    };
    // Collected first: a stream over a closure that borrows is not Send (rust-lang/rust#64552).
    let writes: Vec<_> = slots
        .iter()
        .map(|slot| one_slot(applier, input, slot, control_plane_ip))
        .collect();
    stream::iter(writes).buffered(SLOTS_AT_ONCE).try_collect().await
}

/// Secret and claim, either a record of the slot's address, come before the machine.
async fn one_slot(
    applier: &Applier,
    input: &SlotInput<'_>,
    slot: &Slot,
    control_plane_ip: std::net::Ipv4Addr,
) -> Result<Expiries, WriteError> {
    let SlotInput {
        valid,
        network,
        authorities,
        cluster_ip,
        observed,
        ready,
        now,
    } = *input;
    let stored = observed.secrets.get(&slots::secret_name(&slot.name));
    let profiles = pki::profiles(valid, slot, cluster_ip);
    let credentials = pki::credentials(&profiles, authorities, stored, now)
        .await
        .map_err(WriteError::Pki)?;
    let built = bootstrap::Input {
        valid,
        network,
        slot,
        control_plane_ip,
        authorities,
        credentials: &credentials,
    };
    let secret = bootstrap::secret(&built).map_err(|source| WriteError::Bootstrap {
        slot: slot.name.clone(),
        source,
    })?;
    let machine = observed.machines.get(&slot.name);
    let request = console::request(machine, ready.contains(&slot.name), now);
    let desired = slots::machine(valid, slot, request.as_deref());
    // Every request on the way to a new machine delays the tenant: what can go side by side does.
    futures::try_join!(
        put(applier, &secret, stored, &valid.uid),
        data_disk(applier, valid, slot, observed),
        unclaimed(applier, &desired, machine, &valid.uid),
    )?;
    applier.apply(&desired, machine).await.map_err(WriteError::Apply)?;
    Ok(credentials
        .iter()
        .map(|(name, credential)| (*name, credential.not_after))
        .collect())
}

/// A slot's claim, made once; its size is not changed. A control plane that has a machine, or ever answered, had one: in
/// place of what is gone no empty one is made, which would be an empty cluster of the same name.
async fn data_disk(applier: &Applier, valid: &Validated, slot: &Slot, observed: &Observed) -> Result<(), WriteError> {
    let desired = slots::claim(valid, slot);
    let name = desired.name_any();
    if observed.claims.contains_key(&name) {
        return Ok(());
    }
    let had_one = observed.has_answered || observed.machines.contains_key(&slot.name);
    if !(slot.is_control_plane() && had_one) {
        return put(applier, &desired, None, &valid.uid).await.map(drop);
    }
    // One that somebody restored is not known for the cluster's by labels and owner.
    let claims = Api::<PersistentVolumeClaim>::namespaced(applier.client().clone(), &valid.namespace);
    let found = claims.get_metadata_opt(&name).await;
    let found = found.map_err(|source| WriteError::Claim(format!("PersistentVolumeClaim {name}"), source))?;
    found.map(drop).ok_or(WriteError::DataGone(name))
}
