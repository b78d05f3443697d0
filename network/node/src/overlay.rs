//! The tenants' networks on this node: one VXLAN device and one bridge per VNI that a pod here uses, flood entries for
//! all other nodes, and the node's protection.
//!
//! Owns every `kn-` device of the node's namespace; one lock orders all changes, so that a network is never taken away
//! while a pod is being plugged into it. Knows no pod: it only sees ports.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use kubernest_plan::names::PORT_PREFIX;
use kubernest_plan::overlay::{Link, flood_changes, max_mtu, present, unused};
use kubernest_plan::{Vni, rules};
use tokio::sync::{Mutex, watch};

use crate::links::{Device, LinkError};
use crate::netns::{Inside, Netns, NetnsError};

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// Nobody told us the cluster's nodes yet.
    #[error("the cluster's Nodes are not known yet: kubernest-node has not reached the API server")]
    NodesUnknown,
    /// VXLAN has nothing to send from.
    #[error("no device of this node holds its InternalIP {0}: correct the kubelet's --node-ip")]
    NoUnderlay(Ipv4Addr),
    /// Frames would not fit.
    #[error(
        "the tenant network's MTU {asked} does not fit: the nodes' network has {underlay}, so at most {max} is possible"
    )]
    Mtu {
        /// What the network asks for.
        asked: u32,
        /// That of the device of the node's InternalIP.
        underlay: u32,
        /// What would fit.
        max: u32,
    },
    /// Entering the node's namespace, its rules or its devices.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

impl From<LinkError> for OverlayError {
    fn from(error: LinkError) -> Self {
        Self::Netns(error.into())
    }
}

/// The nodes of the outer cluster, as far as the overlay needs them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nodes {
    /// InternalIP of this node.
    pub own: Ipv4Addr,
    /// InternalIPs of all nodes, this one included.
    pub all: BTreeSet<Ipv4Addr>,
}

/// The overlay of one node.
#[derive(Debug)]
pub struct Overlay {
    host: Netns,
    nodes: Mutex<Option<Nodes>>,
    ready: watch::Sender<bool>,
}

impl Overlay {
    /// The overlay in a node's namespace. Changes nothing yet.
    pub fn new(host: Netns) -> Self {
        Self {
            host,
            nodes: Mutex::new(None),
            ready: watch::Sender::new(false),
        }
    }

    /// Whether attachments can be made.
    pub fn ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Waits until attachments can be made.
    pub async fn wait_ready(&self) {
        // The sender lives in `self`, so that this ends only when it is so.
        drop(self.ready.subscribe().wait_for(|ready| *ready).await);
    }

    /// Takes note of the cluster's nodes: renews the node's rules and every network's flood entries.
    ///
    /// # Errors
    /// See [`OverlayError`]; then the same nodes may be given again.
    pub async fn set_nodes(&self, nodes: Nodes) -> Result<(), OverlayError> {
        let mut known = self.nodes.lock().await;
        if known.as_ref() == Some(&nodes) {
            return Ok(());
        }
        let now = nodes.clone();
        self.host
            .enter(async move |inside: Inside| {
                // Rules first: from here on nobody but a node is heard.
                inside.nft(&rules::node(&now.all))?;
                for device in inside
                    .links
                    .list()
                    .await?
                    .iter()
                    .filter(|device| device.vxlan_local.is_some())
                {
                    if let Some(vni) = Vni::of_device(&device.link.name) {
                        network(&inside, vni, device.mtu, &now).await?;
                    }
                }
                Ok::<_, OverlayError>(())
            })
            .await?;
        *known = Some(nodes);
        self.ready.send_replace(true);
        Ok(())
    }

    /// Makes the network of a VNI on this node, if need be, and a cable from it into a pod. Returns the MTU.
    ///
    /// # Errors
    /// See [`OverlayError`].
    pub async fn plug(
        &self,
        vni: Vni,
        mtu: Option<u32>,
        port: String,
        pod: &Netns,
        name_in_pod: String,
    ) -> Result<u32, OverlayError> {
        let known = self.nodes.lock().await;
        let nodes = known.clone().ok_or(OverlayError::NodesUnknown)?;
        let pod = pod.clone();
        self.host
            .enter(async move |inside: Inside| {
                let links = &inside.links;
                let underlay = links
                    .mtu_of_address(nodes.own)
                    .await?
                    .ok_or(OverlayError::NoUnderlay(nodes.own))?;
                let max = max_mtu(underlay);
                let mtu = mtu.unwrap_or(max);
                if mtu > max {
                    return Err(OverlayError::Mtu {
                        asked: mtu,
                        underlay,
                        max,
                    });
                }
                let bridge = network(&inside, vni, mtu, &nodes).await?;
                let cable = links.add_cable(&port, mtu, &pod, &name_in_pod).await?;
                links.plug(&cable, &bridge).await?;
                Ok(mtu)
            })
            .await
    }

    /// Takes away a pod's port, if it is there, and every network that then has none.
    ///
    /// # Errors
    /// [`OverlayError::Netns`].
    pub async fn unplug(&self, port: String) -> Result<(), OverlayError> {
        let _changing = self.nodes.lock().await;
        self.host
            .enter(async move |inside: Inside| {
                inside.links.del(&port).await?;
                collect(&inside).await.map(drop)
            })
            .await
    }

    /// Whether a port is plugged into the network of a VNI.
    ///
    /// # Errors
    /// [`OverlayError::Netns`].
    pub async fn plugged(&self, vni: Vni, port: String) -> Result<bool, OverlayError> {
        self.host
            .enter(async move |inside: Inside| {
                let (bridge, port) = (inside.links.find(&vni.bridge()).await?, inside.links.find(&port).await?);
                Ok(bridge
                    .zip(port)
                    .is_some_and(|(bridge, port)| port.link.bridge == Some(bridge.link.index)))
            })
            .await
    }

    /// Takes away every network that no pod uses. Returns which.
    ///
    /// # Errors
    /// [`OverlayError::Netns`].
    pub async fn collect(&self) -> Result<BTreeSet<Vni>, OverlayError> {
        let _changing = self.nodes.lock().await;
        self.host.enter(async |inside: Inside| collect(&inside).await).await
    }

    /// The networks on this node and the number of pods' ports, for metrics.
    ///
    /// # Errors
    /// [`OverlayError::Netns`].
    pub async fn census(&self) -> Result<(usize, usize), OverlayError> {
        self.host
            .enter(async |inside: Inside| {
                let links = links(&inside.links.list().await?);
                Ok((
                    present(&links).len(),
                    links.iter().filter(|link| link.name.starts_with(PORT_PREFIX)).count(),
                ))
            })
            .await
    }
}

/// Makes bridge and VXLAN device of a VNI whole.
async fn network(inside: &Inside, vni: Vni, mtu: u32, nodes: &Nodes) -> Result<Device, OverlayError> {
    let links = &inside.links;
    let bridge = links.add_bridge(&vni.bridge(), mtu).await?;
    inside.sysctl_if_there(&format!("net/ipv6/conf/{}/disable_ipv6", bridge.link.name), "1")?;
    links.up_as_wire(&bridge).await?;
    let mut vxlan = links.add_vxlan(vni, nodes.own, mtu).await?;
    for device in [&bridge, &vxlan].into_iter().filter(|device| device.mtu != mtu) {
        // The network's MTU was changed since.
        links.shape(device, mtu, None).await?;
    }
    if vxlan.vxlan_local != Some(nodes.own) {
        // The node got another address since; a VXLAN device cannot be moved to it.
        links.del(&vxlan.link.name).await?;
        vxlan = links.add_vxlan(vni, nodes.own, mtu).await?;
    }
    inside.sysctl_if_there(&format!("net/ipv6/conf/{}/disable_ipv6", vxlan.link.name), "1")?;
    flood(inside, &vxlan, nodes).await?;
    links.plug(&vxlan, &bridge).await?;
    Ok(bridge)
}

async fn flood(inside: &Inside, vxlan: &Device, nodes: &Nodes) -> Result<(), OverlayError> {
    let changes = flood_changes(&inside.links.flooded(vxlan).await?, &nodes.all, nodes.own);
    for peer in changes.add {
        inside.links.flood(vxlan, peer).await?;
    }
    for peer in changes.remove {
        inside.links.unflood(vxlan, peer).await?;
    }
    Ok(())
}

async fn collect(inside: &Inside) -> Result<BTreeSet<Vni>, OverlayError> {
    let gone = unused(&links(&inside.links.list().await?));
    for vni in &gone {
        inside.links.del(&vni.vxlan()).await?;
        inside.links.del(&vni.bridge()).await?;
    }
    Ok(gone)
}

fn links(devices: &[Device]) -> Vec<Link> {
    devices.iter().map(|device| device.link.clone()).collect()
}
