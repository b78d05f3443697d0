//! Attaching pods: carries out what a parsed CNI call asks for, in the pod's network namespace and in the overlay.
//!
//! Every step may be repeated, and what a failed ADD made is taken away again. Who may join which network is decided by
//! `kubernest-plan` from the owner that [`Owners`] tells.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::path::PathBuf;

use futures::future::BoxFuture;
use kubernest_plan::cni::{self, Removal, Request};
use kubernest_plan::names::node_port;
use kubernest_plan::{Attachment, L2, Mac, Masquerade, POD_INTERFACE, PodNetwork, Refused, TapName, Vni, rules};
use tokio::sync::watch;

use crate::links::LinkError;
use crate::netns::{Inside, Netns, NetnsError, NetnsId};
use crate::overlay::{Overlay, OverlayError};
use crate::records::{Joined, Record, RecordError, Records};
use crate::tap::{self, TapError};

/// Address of the pod's side of a masqueraded tap. Always the same, so that a guest restored from a snapshot in another
/// pod need not ask again who its router is.
const GATEWAY_MAC: &str = "02:00:0a:00:02:01";

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Asked for what must not be.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Too early.
    #[error("the outer API server's addresses are not known yet, so no guest can be kept from it")]
    OuterApiUnknown,
    /// The owner of a network is not known now.
    #[error("look up NetworkAllocation {name}", name = .0.allocation())]
    Owner(Vni, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// The network changed hands while a pod was attached.
    #[error("NetworkAllocation {name} was given to another TenantCluster meanwhile", name = .0.allocation())]
    ChangedHands(Vni),
    /// The pod has no pod network.
    #[error("the pod has no {POD_INTERFACE}: the cluster's own network must be attached first")]
    NoPodNetwork,
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The pod's namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The tenant's network.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// What we note about attachments.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// An attachment is not as ADD left it.
    #[error("the attachment is not whole: {0} is missing; delete the pod, so that it is made anew")]
    NotWhole(String),
}

impl From<LinkError> for AttachError {
    fn from(error: LinkError) -> Self {
        Self::Netns(error.into())
    }
}

impl AttachError {
    /// The error code of the CNI specification.
    pub fn code(&self) -> u32 {
        match self {
            Self::Refused(refused) => refused.code(),
            // "Try again later"
            Self::OuterApiUnknown | Self::Owner(..) | Self::Overlay(OverlayError::NodesUnknown) => 11,
            _ => 101,
        }
    }
}

/// The TenantCluster that holds a VNI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Its namespace.
    pub namespace: String,
    /// Its UID: a VNI that was given back may be another's next, also in the same namespace.
    pub uid: String,
}

/// Tells to whom a tenant's network belongs.
pub trait Owners: Send + Sync {
    /// The TenantCluster that holds a VNI now; `None` when it is not allocated.
    fn owner(&self, vni: Vni) -> BoxFuture<'_, Result<Option<Owner>, Box<dyn std::error::Error + Send + Sync>>>;
}

/// Addresses of the outer API server; `None` until known.
pub type OuterApi = watch::Receiver<Option<BTreeSet<SocketAddrV4>>>;

/// Attaches pods of one node.
pub struct Attacher {
    overlay: Overlay,
    owners: Box<dyn Owners>,
    outer_api: OuterApi,
    records: Records,
}

impl Attacher {
    /// Puts together what is needed.
    pub fn new(overlay: Overlay, owners: Box<dyn Owners>, outer_api: OuterApi, records: Records) -> Self {
        Self {
            overlay,
            owners,
            outer_api,
            records,
        }
    }

    /// The overlay that pods are attached to.
    pub fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    /// Whether ADD would be served.
    ///
    /// # Errors
    /// What is waited for.
    pub fn ready(&self) -> Result<(), AttachError> {
        if !self.overlay.ready() {
            return Err(OverlayError::NodesUnknown.into());
        }
        self.outer_api
            .borrow()
            .as_ref()
            .map(drop)
            .ok_or(AttachError::OuterApiUnknown)
    }

    /// Waits until ADD would be served.
    pub async fn wait_ready(&self) {
        self.overlay.wait_ready().await;
        // An error means that the addresses are no longer followed: the agent is about to end.
        drop(self.outer_api.clone().wait_for(Option::is_some).await);
    }

    /// CNI ADD to a pod's namespace: returns the result.
    ///
    /// # Errors
    /// See [`AttachError`]; then nothing is left.
    pub async fn add(&self, request: &Request, pod: Netns) -> Result<serde_json::Value, AttachError> {
        let added = match &request.attachment {
            Attachment::Masquerade(masquerade) => self.add_masquerade(request, masquerade, &pod).await,
            Attachment::L2(l2) => self.add_l2(request, l2, &pod).await,
        };
        match added {
            Ok(mac) => Ok(cni::added(request, &mac)),
            // A refused call made nothing, and must not disturb what may be there by right.
            Err(refused @ AttachError::Refused(_)) => Err(refused),
            Err(error) => {
                if let Err(left) = self.remove(&request.container_id, &request.tap, Some(&pod)).await {
                    tracing::warn!(pod = request.pod.name, tap = %request.tap, error = &left as &dyn std::error::Error,
                        "a failed attachment left something behind; the runtime's DEL will try again");
                }
                Err(error)
            }
        }
    }

    async fn add_masquerade(&self, request: &Request, asked: &Masquerade, pod: &Netns) -> Result<String, AttachError> {
        let api = self.outer_api.borrow().clone().ok_or(AttachError::OuterApiUnknown)?;
        let network = asked.network;
        network.clear_of(&pod_network(pod).await?, &api)?;
        self.note(request, pod, None)?;
        let rules = rules::masquerade(&request.tap, network, &asked.ports, &api);
        let tap = request.tap.clone();
        pod.enter(async move |inside: Inside| {
            let links = &inside.links;
            let eth0 = links.find(POD_INTERFACE).await?.ok_or(AttachError::NoPodNetwork)?;
            inside.nft(&rules)?;
            // By default Linux answers ARP for any address of the host on any device: on a pod network that is a wire, the
            // pod would draw what is meant for another one with the tap's address (ip-sysctl, arp_ignore).
            inside.sysctl(&format!("net/ipv4/conf/{POD_INTERFACE}/arp_ignore"), "1")?;
            tap::create(&tap)?;
            let name = tap.as_str();
            inside.sysctl_if_there(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
            let device = links.get(name).await?;
            links.shape(&device, eth0.mtu, GATEWAY_MAC.parse::<Mac>().ok()).await?;
            links.add_address(&device, network.gateway(), network.prefix()).await?;
            inside.sysctl("net/ipv4/ip_forward", "1")?;
            links.up(&device).await?;
            Ok::<_, AttachError>(())
        })
        .await?;
        // The API server may have moved between reading its addresses and writing the rules.
        let now = self.outer_api.borrow().clone();
        if let Some(now) = now.filter(|now| *now != api) {
            self.forbid(pod, &request.tap, &now).await?;
        }
        Ok(GATEWAY_MAC.to_owned())
    }

    async fn add_l2(&self, request: &Request, asked: &L2, pod: &Netns) -> Result<String, AttachError> {
        let owner = self.owner(asked.vni).await?;
        let namespace = owner.as_ref().map(|owner| owner.namespace.as_str());
        cni::admit(asked.vni, namespace, &request.pod)?;
        let joined = owner.clone().map(|owner| Joined {
            vni: asked.vni,
            owner: owner.uid,
        });
        self.note(request, pod, joined)?;
        let port = node_port(&request.container_id, &request.tap);
        let mtu = self
            .overlay
            .plug(asked.vni, asked.mtu, port, pod, request.tap.cable())
            .await?;
        // Strangers may have been looked for between the note and the plug, and this one was not one yet, or had no port.
        if self.owner(asked.vni).await? != owner {
            return Err(AttachError::ChangedHands(asked.vni));
        }
        let (tap, mac) = (request.tap.clone(), asked.mac);
        pod.enter(async move |inside: Inside| {
            let links = &inside.links;
            // Rules first, so that nothing unchecked ever passes. Where br_netfilter shows bridged frames to the rules of
            // routed packets, it is told not to, as the pod's own rules know nothing of them.
            inside.nft(&rules::l2(&tap, mac))?;
            for family in ["arp", "ip", "ip6"] {
                inside.sysctl_if_there(&format!("net/bridge/bridge-nf-call-{family}tables"), "0")?;
            }
            let bridge = links.add_bridge(&tap.bridge(), mtu).await?;
            tap::create(&tap)?;
            for name in [tap.bridge(), tap.cable(), tap.to_string()] {
                inside.sysctl_if_there(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
            }
            links.up_as_wire(&bridge).await?;
            let device = links.get(tap.as_str()).await?;
            links.shape(&device, mtu, None).await?;
            links.plug(&device, &bridge).await?;
            links.plug(&links.get(&tap.cable()).await?, &bridge).await?;
            Ok(device.mac.map(|mac| mac.to_string()).unwrap_or_default())
        })
        .await
    }

    async fn owner(&self, vni: Vni) -> Result<Option<Owner>, AttachError> {
        let owner = self.owners.owner(vni).await;
        owner.map_err(|error| AttachError::Owner(vni, error))
    }

    fn note(&self, request: &Request, pod: &Netns, joined: Option<Joined>) -> Result<(), AttachError> {
        let netns = pod.id().map_err(NetnsError::Enter)?;
        let record = Record {
            container_id: request.container_id.clone(),
            tap: request.tap.clone(),
            namespace: request.pod.namespace.clone(),
            pod: request.pod.name.clone(),
            masquerade: joined.is_none(),
            joined,
            netns,
        };
        Ok(self.records.write(&record)?)
    }

    /// CNI DEL: succeeds also when there is nothing left. A namespace that is gone (`None`) took its devices along.
    ///
    /// # Errors
    /// See [`AttachError`]; the runtime then calls again.
    pub async fn del(&self, removal: &Removal, pod: Option<Netns>) -> Result<(), AttachError> {
        self.remove(&removal.container_id, &removal.tap, pod.as_ref()).await
    }

    async fn remove(&self, container_id: &str, tap: &TapName, pod: Option<&Netns>) -> Result<(), AttachError> {
        if let Some(pod) = pod {
            let tap = tap.clone();
            pod.enter(async move |inside: Inside| {
                for name in [tap.to_string(), tap.cable(), tap.bridge()] {
                    inside.links.del(&name).await?;
                }
                inside.nft(&rules::without(&tap))?;
                Ok::<_, AttachError>(())
            })
            .await?;
        }
        self.overlay.unplug(node_port(container_id, tap)).await?;
        Ok(self.records.remove(container_id, tap)?)
    }

    /// CNI CHECK.
    ///
    /// # Errors
    /// [`AttachError::NotWhole`] names the first thing that is missing.
    pub async fn check(&self, request: &Request, pod: Netns) -> Result<(), AttachError> {
        let tap = request.tap.clone();
        let l2 = match &request.attachment {
            Attachment::Masquerade(_) => None,
            Attachment::L2(l2) => Some(l2.vni),
        };
        pod.enter(async move |inside: Inside| {
            let mut names = vec![tap.to_string()];
            if l2.is_some() {
                names.extend([tap.bridge(), tap.cable()]);
            }
            for name in names {
                inside
                    .links
                    .find(&name)
                    .await?
                    .ok_or(AttachError::NotWhole(format!("device {name}")))?;
            }
            for family in if l2.is_some() {
                &["inet", "bridge"][..]
            } else {
                &["inet"]
            } {
                if !inside.has_table(family, &tap.table())? {
                    return Err(AttachError::NotWhole(format!("nft table {family} {}", tap.table())));
                }
            }
            Ok(())
        })
        .await?;
        let Some(vni) = l2 else { return Ok(()) };
        let port = node_port(&request.container_id, &request.tap);
        if self.overlay.plugged(vni, port.clone()).await? {
            Ok(())
        } else {
            Err(AttachError::NotWhole(format!("port {port} of {}", vni.bridge())))
        }
    }

    /// Unplugs every pod from a tenant network that is no longer its tenant's: a machine that outlived its TenantCluster must
    /// not find itself among the machines of whoever has the VNI next. `holders` may be behind; nobody is unplugged whose
    /// owner holds the VNI now.
    ///
    /// # Errors
    /// [`AttachError::Record`] when the attachments cannot be listed; what fails for one of them is logged, and it is looked
    /// at again the next time.
    pub async fn unplug_strangers(&self, holders: &BTreeMap<Vni, Owner>) -> Result<(), AttachError> {
        for record in self.records.list()? {
            let Some(joined) = &record.joined else { continue };
            if holders.get(&joined.vni).is_some_and(|owner| owner.uid == joined.owner) {
                continue;
            }
            if let Err(error) = self.unplug_stranger(&record, joined).await {
                tracing::error!(
                    pod = record.pod,
                    namespace = record.namespace,
                    vni = joined.vni.get(),
                    error = &error as &dyn std::error::Error,
                    "this pod may be on a network that is no longer its tenant's; delete the pod"
                );
            }
        }
        Ok(())
    }

    async fn unplug_stranger(&self, record: &Record, joined: &Joined) -> Result<(), AttachError> {
        let owner = self.owner(joined.vni).await?;
        if owner.is_some_and(|owner| owner.uid == joined.owner) {
            return Ok(());
        }
        let port = node_port(&record.container_id, &record.tap);
        self.overlay.unplug(port).await?;
        self.records.remove(&record.container_id, &record.tap)?;
        tracing::warn!(
            pod = record.pod,
            namespace = record.namespace,
            vni = joined.vni.get(),
            "unplugged: the TenantCluster whose network this pod had joined is gone"
        );
        Ok(())
    }

    /// Writes the outer API server's present addresses into all attachments, and forgets those whose pod is gone.
    ///
    /// # Errors
    /// [`AttachError::Record`] when the attachments cannot be listed; what fails for one of them is logged.
    pub async fn refresh_outer_api(&self, api: &BTreeSet<SocketAddrV4>) -> Result<(), AttachError> {
        let records = self.records.list()?;
        let namespaces = namespaces_of_processes();
        for record in records.into_iter().filter(|record| record.masquerade) {
            let Some((_, path)) = namespaces.iter().find(|(id, _)| *id == record.netns) else {
                // A pod that is just being made has no process yet.
                self.records.remove_old(&record)?;
                continue;
            };
            let refreshed = match Netns::open(path) {
                // Between the listing and now the process may have ended and its number been given to another.
                Ok(pod) if pod.id().ok() == Some(record.netns) => self.forbid(&pod, &record.tap, api).await,
                Ok(_) => continue,
                Err(error) => Err(error.into()),
            };
            if let Err(error) = refreshed {
                tracing::error!(
                    pod = record.pod,
                    namespace = record.namespace,
                    error = &error as &dyn std::error::Error,
                    "the guest of this pod is not kept from the outer API server's new address; delete the pod"
                );
            }
        }
        Ok(())
    }

    async fn forbid(&self, pod: &Netns, tap: &TapName, api: &BTreeSet<SocketAddrV4>) -> Result<(), AttachError> {
        let script = rules::outer_api(tap, api);
        pod.enter(async move |inside: Inside| Ok::<_, AttachError>(inside.nft(&script)?))
            .await
    }
}

/// What the pod has from the cluster's own network. Only that device counts: a call that comes again finds its own tap.
async fn pod_network(pod: &Netns) -> Result<PodNetwork, AttachError> {
    pod.enter(async move |inside: Inside| {
        let links = &inside.links;
        let eth0 = links.find(POD_INTERFACE).await?.ok_or(AttachError::NoPodNetwork)?;
        Ok(links.network_of(&eth0).await?)
    })
    .await
}

/// The network namespaces that some process is in. A pod's is that of its sandbox's process at least.
fn namespaces_of_processes() -> Vec<(NetnsId, PathBuf)> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let paths = processes.map(|process| process.path().join("ns/net"));
    let mut found: Vec<(NetnsId, PathBuf)> = Vec::new();
    for path in paths {
        if let Ok(id) = NetnsId::at(&path)
            && !found.iter().any(|(known, _)| *known == id)
        {
            found.push((id, path));
        }
    }
    found
}
