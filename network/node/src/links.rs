//! Network devices by rtnetlink (rtnetlink(7)): the few operations that the agent needs, each safe to repeat.
//!
//! Acts in the network namespace of the thread that connected. Decides nothing.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use futures::{Stream, TryStreamExt as _};
use ipnet::Ipv4Net;
use kubernest_plan::overlay::Link;
use kubernest_plan::{Mac, PodNetwork, VXLAN_PORT, Vni};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan, RouteMessageBuilder};

use crate::netns::Netns;

/// The address that stands for all receivers that are not known: a flood entry.
const ALL_UNKNOWN: [u8; 6] = [0; 6];

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No netlink socket.
    #[error("open a netlink socket")]
    Connect(#[source] io::Error),
    /// The kernel refused.
    #[error("{what}: {}", kernel_said(.source))]
    Refused {
        /// What was asked.
        what: String,
        #[allow(missing_docs)]
        source: Box<rtnetlink::Error>,
    },
    /// A device that must be there is not.
    #[error("there is no device {0}")]
    Missing(String),
}

/// The kernel's answer in words: rtnetlink prints only the error's number.
fn kernel_said(error: &rtnetlink::Error) -> String {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().to_string(),
        other => other.to_string(),
    }
}

trait Context<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, LinkError>;
}

impl<T> Context<T> for Result<T, rtnetlink::Error> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, LinkError> {
        self.map_err(|source| LinkError::Refused {
            what: what(),
            source: Box::new(source),
        })
    }
}

/// A device with all that the agent looks at.
#[derive(Debug, Clone)]
pub struct Device {
    /// Index, name and bridge.
    pub link: Link,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Hardware address, if it is one of Ethernet.
    pub mac: Option<Mac>,
    /// Sender address of a VXLAN device.
    pub vxlan_local: Option<Ipv4Addr>,
}

/// A connection to the kernel.
#[derive(Debug)]
pub struct Links(Handle);

impl Links {
    /// Connects in the namespace of the calling thread, from inside its runtime.
    ///
    /// # Errors
    /// [`LinkError::Connect`].
    pub fn connect() -> Result<Self, LinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(LinkError::Connect)?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// All devices.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn list(&self) -> Result<Vec<Device>, LinkError> {
        let links: Vec<_> = self
            .0
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .during(|| "list network devices".into())?;
        Ok(links.iter().map(device).collect())
    }

    /// One device by its name.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn find(&self, name: &str) -> Result<Option<Device>, LinkError> {
        let found = first(self.0.link().get().match_name(name).execute()).await;
        match found {
            Err(error) if is(&error, nix::libc::ENODEV) => Ok(None),
            other => Ok(other.during(|| format!("look for {name}"))?.as_ref().map(device)),
        }
    }

    /// One device that must be there.
    ///
    /// # Errors
    /// [`LinkError::Missing`], [`LinkError::Refused`].
    pub async fn get(&self, name: &str) -> Result<Device, LinkError> {
        self.find(name)
            .await?
            .ok_or_else(|| LinkError::Missing(name.to_owned()))
    }

    /// The MTU of the device that holds an address; `None` when none does.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn mtu_of_address(&self, address: Ipv4Addr) -> Result<Option<u32>, LinkError> {
        let request = self.0.address().get().set_address_filter(IpAddr::V4(address)).execute();
        let found: Vec<_> = request
            .try_collect()
            .await
            .during(|| format!("look for address {address}"))?;
        let index = found.iter().find_map(|message| {
            let local = message
                .attributes
                .iter()
                .any(|a| matches!(a, AddressAttribute::Local(ip) | AddressAttribute::Address(ip) if *ip == address));
            local.then_some(message.header.index)
        });
        let Some(index) = index else { return Ok(None) };
        let link = first(self.0.link().get().match_index(index).execute()).await;
        Ok(link
            .during(|| format!("look for device {index}"))?
            .as_ref()
            .map(|link| device(link).mtu))
    }

    /// Makes a bridge that resolves no addresses and leaves multicast alone, still down. One that is there stays.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn add_bridge(&self, name: &str, mtu: u32) -> Result<Device, LinkError> {
        let bridge = LinkBridge::new(name).mcast_snooping(false).mtu(mtu).build();
        self.add(name, bridge).await
    }

    /// Makes a VXLAN device that learns senders and sends from `local`, still down. One that is there stays.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn add_vxlan(&self, vni: Vni, local: Ipv4Addr, mtu: u32) -> Result<Device, LinkError> {
        let name = vni.vxlan();
        let vxlan = LinkVxlan::new(&name, vni.get())
            .local(local)
            .port(VXLAN_PORT)
            .learning(true)
            .mtu(mtu)
            .build();
        self.add(&name, vxlan).await
    }

    /// Makes a cable from here to another namespace, both ends down.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn add_cable(&self, name: &str, mtu: u32, there: &Netns, name_there: &str) -> Result<Device, LinkError> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(name_there.to_owned())
            .mtu(mtu)
            .setns_by_fd(there.raw_fd())
            .build();
        let cable = LinkVeth::new(name, name_there)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .mtu(mtu);
        self.add(name, cable.build()).await
    }

    async fn add(&self, name: &str, message: LinkMessage) -> Result<Device, LinkError> {
        match self.0.link().add(message).execute().await {
            Err(error) if is(&error, nix::libc::EEXIST) => {}
            other => other.during(|| format!("make {name}"))?,
        }
        self.get(name).await
    }

    /// Deletes a device, if it is there.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn del(&self, name: &str) -> Result<(), LinkError> {
        let Some(device) = self.find(name).await? else {
            return Ok(());
        };
        match self.0.link().del(device.link.index).execute().await {
            Err(error) if is(&error, nix::libc::ENODEV) => Ok(()),
            other => other.during(|| format!("delete {name}")),
        }
    }

    /// Brings a device up.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn up(&self, device: &Device) -> Result<(), LinkError> {
        self.set(device, "bring up", LinkUnspec::new_with_index(device.link.index).up())
            .await
    }

    /// Brings up a bridge that is only a wire: it asks for and answers no ARP itself.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn up_as_wire(&self, device: &Device) -> Result<(), LinkError> {
        self.set(
            device,
            "bring up",
            LinkUnspec::new_with_index(device.link.index).arp(false).up(),
        )
        .await
    }

    /// Makes a device a port of a bridge and brings it up.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn plug(&self, port: &Device, bridge: &Device) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(port.link.index)
            .controller(bridge.link.index)
            .up();
        self.set(port, "plug into its bridge", message).await
    }

    /// Sets MTU and, if given, the hardware address.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn shape(&self, device: &Device, mtu: u32, mac: Option<Mac>) -> Result<(), LinkError> {
        let mut message = LinkUnspec::new_with_index(device.link.index).mtu(mtu);
        if let Some(mac) = mac {
            message = message.address(mac.octets().to_vec());
        }
        self.set(device, "set MTU and address", message).await
    }

    async fn set(&self, on: &Device, what: &str, message: LinkMessageBuilder<LinkUnspec>) -> Result<(), LinkError> {
        let result = self.0.link().set(message.build()).execute().await;
        result.during(|| format!("{what}: {}", on.link.name))
    }

    /// Gives a device an address, unless it has it.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn add_address(&self, device: &Device, address: Ipv4Addr, prefix: u8) -> Result<(), LinkError> {
        let request = self.0.address().add(device.link.index, IpAddr::V4(address), prefix);
        match request.execute().await {
            Err(error) if is(&error, nix::libc::EEXIST) => Ok(()),
            other => other.during(|| format!("give {} the address {address}/{prefix}", device.link.name)),
        }
    }

    /// Addresses of a device and the routes that lead through it.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn network_of(&self, device: &Device) -> Result<PodNetwork, LinkError> {
        let index = device.link.index;
        let addresses = self.0.address().get().set_link_index_filter(index).execute();
        let addresses: Vec<_> = addresses
            .try_collect()
            .await
            .during(|| format!("list addresses of {}", device.link.name))?;
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes: Vec<_> = self
            .0
            .route()
            .get(v4)
            .execute()
            .try_collect()
            .await
            .during(|| format!("list routes through {}", device.link.name))?;
        let through = |route: &&RouteMessage| route.attributes.contains(&RouteAttribute::Oif(index));
        let mut network = PodNetwork {
            addresses: addresses.iter().filter_map(address).collect(),
            ..PodNetwork::default()
        };
        for route in routes.iter().filter(through) {
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => network.gateways.push(*gateway),
                    RouteAttribute::Destination(RouteAddress::Inet(to)) => {
                        let to = Ipv4Net::new(*to, route.header.destination_prefix_length);
                        network.routes.extend(to.ok().filter(|to| to.prefix_len() > 0));
                    }
                    _ => {}
                }
            }
        }
        Ok(network)
    }

    /// The nodes to which a VXLAN device sends what is for unknown or all receivers.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn flooded(&self, vxlan: &Device) -> Result<BTreeSet<Ipv4Addr>, LinkError> {
        let request = self
            .0
            .neighbours()
            .get()
            .set_address_family(AddressFamily::Bridge)
            .execute();
        let entries: Vec<_> = request
            .try_collect()
            .await
            .during(|| format!("list peers of {}", vxlan.link.name))?;
        let ours = |entry: &&NeighbourMessage| {
            let unknown = NeighbourAttribute::LinkLayerAddress(ALL_UNKNOWN.to_vec());
            entry.header.ifindex == vxlan.link.index && entry.attributes.contains(&unknown)
        };
        Ok(entries
            .iter()
            .filter(ours)
            .flat_map(|entry| &entry.attributes)
            .filter_map(peer)
            .collect())
    }

    /// Adds a node to which a VXLAN device floods.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn flood(&self, vxlan: &Device, peer: Ipv4Addr) -> Result<(), LinkError> {
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(flood_entry(vxlan, peer)));
        // rtnetlink's own request replaces or excludes; a flood list has many entries of one address.
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
        let what = || format!("add peer {peer} to {}", vxlan.link.name);
        let answers = self.0.clone().request(request).during(what)?;
        let mut answers = std::pin::pin!(answers);
        while let Some(answer) = futures::StreamExt::next(&mut answers).await {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.raw_code() != -nix::libc::EEXIST
                && error.code.is_some()
            {
                return Err(rtnetlink::Error::NetlinkError(error)).during(what);
            }
        }
        Ok(())
    }

    /// Takes a node away from those to which a VXLAN device floods.
    ///
    /// # Errors
    /// [`LinkError::Refused`].
    pub async fn unflood(&self, vxlan: &Device, peer: Ipv4Addr) -> Result<(), LinkError> {
        match self.0.neighbours().del(flood_entry(vxlan, peer)).execute().await {
            Err(error) if is(&error, nix::libc::ENOENT) => Ok(()),
            other => other.during(|| format!("take peer {peer} from {}", vxlan.link.name)),
        }
    }
}

fn address(message: &AddressMessage) -> Option<Ipv4Net> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(IpAddr::V4(ip)) => Some(*ip),
        _ => None,
    });
    Ipv4Net::new(local?, message.header.prefix_len).ok()
}

fn flood_entry(vxlan: &Device, peer: Ipv4Addr) -> NeighbourMessage {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Bridge;
    entry.header.ifindex = vxlan.link.index;
    entry.header.state = NeighbourState::Permanent;
    entry.header.flags = NeighbourFlags::Own;
    entry.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(ALL_UNKNOWN.to_vec()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet(peer)),
    ];
    entry
}

fn peer(attribute: &NeighbourAttribute) -> Option<Ipv4Addr> {
    match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(*ip),
        // The crate reads addresses by the message's family, which here is that of bridges.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
            <[u8; 4]>::try_from(bytes.as_slice()).ok().map(Ipv4Addr::from)
        }
        _ => None,
    }
}

fn device(message: &LinkMessage) -> Device {
    let link = Link {
        index: message.header.index,
        name: String::new(),
        bridge: None,
    };
    let mut device = Device {
        link,
        mtu: 0,
        mac: None,
        vxlan_local: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.link.name.clone_from(name),
            LinkAttribute::Controller(index) => device.link.bridge = Some(*index),
            LinkAttribute::Mtu(mtu) => device.mtu = *mtu,
            LinkAttribute::Address(address) => {
                let text: Vec<_> = address.iter().map(|byte| format!("{byte:02x}")).collect();
                device.mac = text.join(":").parse().ok();
            }
            LinkAttribute::LinkInfo(infos) => {
                let vxlan = infos.iter().find_map(|info| match info {
                    LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
                    _ => None,
                });
                device.vxlan_local = vxlan.into_iter().flatten().find_map(|data| match data {
                    InfoVxlan::Local(ip) => Some(*ip),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    device
}

async fn first<T>(stream: impl Stream<Item = Result<T, rtnetlink::Error>>) -> Result<Option<T>, rtnetlink::Error> {
    std::pin::pin!(stream).try_next().await
}

fn is(error: &rtnetlink::Error, errno: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -errno)
}
