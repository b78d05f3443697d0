//! How a launcher pod asks Multus for its taps, what the launcher is told of them, and what Multus reports back.
//!
//! Interface i of the instance is `tap<i>` in the pod. Addresses inside a tenant network are not known here.

use kubernest_crds::labels;
use kubernest_domain::{TapInterface, TapKind};
use serde::{Deserialize, Serialize};

use super::validate::{Binding, Nic};

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
    ports: Vec<ForwardedPort<'a>>,
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
            Binding::Masquerade(_) => TapKind::Masquerade,
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
            Binding::Masquerade(ports) => Selection {
                name: MASQUERADE_NETWORK,
                namespace: labels::SYSTEM_NAMESPACE,
                interface: tap(index),
                mac: None,
                cni_args: (!ports.is_empty()).then(|| CniArgs {
                    ports: ports
                        .iter()
                        .map(|port| ForwardedPort {
                            port: port.port,
                            protocol: port.protocol.as_deref().unwrap_or("TCP"),
                        })
                        .collect(),
                }),
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
