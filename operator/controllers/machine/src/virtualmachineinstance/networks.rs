//! How a launcher pod asks Multus for its taps, what the launcher is told of them, and what Multus reports back.
//!
//! Interface i of the instance is `tap<i>` in the pod. Addresses inside a tenant network are not known here.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1::Node;
use kubernest_crds::kubevirt::v1::GuestNetwork;
use kubernest_crds::labels;
use kubernest_domain::{TapInterface, TapKind};
use serde::{Deserialize, Serialize};

use super::validate::{Binding, Machine, Nic, Obstacle};

/// Annotation by which a pod asks for networks (Multus, k8snetworkplumbingwg's de-facto standard).
pub const ANNOTATION: &str = "k8s.v1.cni.cncf.io/networks";
/// Annotation in which Multus reports what it attached.
pub const STATUS_ANNOTATION: &str = "k8s.v1.cni.cncf.io/network-status";
/// NetworkAttachmentDefinition in the system namespace that puts a tap behind the pod's address.
pub const MASQUERADE_NETWORK: &str = "kubernest-masquerade";
/// MTU in bytes that guests are offered: that of the tenants' networks, and below that of common pod networks.
pub const GUEST_MTU: u32 = 1400;

#[derive(Debug, Serialize)]
struct Selection<'a> {
    name: &'a str,
    namespace: &'a str,
    interface: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<&'a str>,
    #[serde(rename = "cni-args", skip_serializing_if = "Option::is_none")]
    cni_args: Option<CniArgs<'a>>,
}

#[derive(Debug, Serialize)]
struct CniArgs<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ports: Vec<ForwardedPort<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<String>,
}

#[derive(Debug, Serialize)]
struct ForwardedPort<'a> {
    port: i32,
    protocol: &'a str,
}

/// The device of the interface at `index`.
pub fn tap(index: usize) -> String {
    format!("tap{index}")
}

/// What the launcher is told.
pub fn taps(nics: &[Nic]) -> Vec<TapInterface> {
    let describe = |(index, nic): (usize, &Nic)| TapInterface {
        name: nic.name.clone(),
        kind: match nic.binding {
            Binding::Masquerade { .. } => TapKind::Masquerade,
            Binding::Bridge(..) => TapKind::Bridge,
        },
        tap: tap(index),
        mac: nic.mac.clone(),
        mtu: GUEST_MTU,
    };
    nics.iter().enumerate().map(describe).collect()
}

/// Value of [`ANNOTATION`]; none without interfaces.
pub fn annotation(nics: &[Nic]) -> Option<String> {
    let select = |(index, nic): (usize, &'_ Nic)| -> serde_json::Value {
        let selection = match &nic.binding {
            Binding::Masquerade { ports, network } => Selection {
                name: MASQUERADE_NETWORK,
                namespace: labels::SYSTEM_NAMESPACE,
                interface: tap(index),
                mac: None,
                cni_args: Some(CniArgs {
                    network: chosen(*network).map(|network| network.to_string()),
                    ports: ports
                        .iter()
                        .map(|port| ForwardedPort {
                            port: port.port,
                            protocol: port.protocol.as_deref().unwrap_or("TCP"),
                        })
                        .collect(),
                })
                .filter(|args| !args.ports.is_empty() || args.network.is_some()),
            },
            Binding::Bridge(namespace, name) => Selection {
                name,
                namespace,
                interface: tap(index),
                mac: Some(&nic.mac),
                cni_args: None,
            },
        };
        // A struct of strings and numbers always serialises.
        serde_json::to_value(selection).unwrap_or_default()
    };
    if nics.is_empty() {
        return None;
    }
    Some(serde_json::Value::Array(nics.iter().enumerate().map(select).collect()).to_string())
}

/// A network that somebody chose; nothing is said of the one that everybody has by default.
fn chosen(network: GuestNetwork) -> Option<GuestNetwork> {
    Some(network).filter(|network| *network != GuestNetwork::default())
}

/// Refuses a network of the user's choice that has addresses of nodes, or of pods where nodes say which those are: what
/// they ask the launcher (probes, console) would be answered to the guest. The node agent, which alone sees the pod's own
/// addresses, refuses those.
pub fn clear_of_the_cluster<'a>(
    machine: Machine,
    mut nodes: impl Iterator<Item = &'a Node>,
) -> Result<Machine, Obstacle> {
    let network = machine.nics.iter().find_map(|nic| match nic.binding {
        Binding::Masquerade { network, .. } => chosen(network),
        Binding::Bridge(..) => None,
    });
    let Some(network) = network else { return Ok(machine) };
    match nodes.find_map(|node| addresses(node).find(|taken| network.overlaps(*taken))) {
        None => Ok(machine),
        Some(taken) => {
            let mut networks = machine.instance.spec.networks.iter().flatten();
            let at = networks.position(|network| network.pod.is_some()).unwrap_or_default();
            Err(Obstacle::Invalid {
                field: format!("spec.networks[{at}].pod.vmNetworkCIDR"),
                problem: format!("{network} overlaps {taken}, where nodes or pods of this cluster are: choose another"),
            })
        }
    }
}

/// IPv4 addresses of a node and of its pods.
fn addresses(node: &Node) -> impl Iterator<Item = Ipv4Net> {
    let pods = node.spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten());
    let pods = pods.filter_map(|text| text.parse::<Ipv4Net>().ok());
    let own = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let own = own.filter_map(|own| own.address.parse::<Ipv4Addr>().ok());
    pods.chain(own.map(Ipv4Net::from))
}

/// An attachment as Multus reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Attachment {
    /// Device in the pod.
    pub interface: String,
    /// MAC address.
    pub mac: String,
}

/// Reads the value of [`STATUS_ANNOTATION`]; what cannot be read is nothing.
pub fn attachments(value: Option<&String>) -> Vec<Attachment> {
    value
        .and_then(|json| serde_json::from_str(json).ok())
        .unwrap_or_default()
}
