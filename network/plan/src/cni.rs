//! What a CNI call asks for (CNI specification 1.1.0, <https://www.cni.dev/docs/spec/>): from the environment and JSON that
//! the runtime gives the plugin to a value that can only be carried out, or a refusal that names the remedy.
//!
//! Carries nothing out, and trusts nothing in the network's configuration: a NetworkAttachmentDefinition is written by
//! whoever may write one in the pod's namespace.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::guest::GuestNetwork;
use crate::names::{Mac, NameError, TapName, Vni};
use crate::{LAUNCHER_HEALTH_PORT, LAUNCHER_TLS_PORT};

/// Versions of the CNI specification whose calls and results are the same for what this plugin does.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The smallest MTU of a tenant network: what IPv6 asks of every link (RFC 8200, section 5).
pub const MIN_MTU: u32 = 1280;

/// A call as the plugin binary passes it on: what the runtime gave, unread.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WireCall {
    /// `CNI_COMMAND`.
    pub command: String,
    /// `CNI_CONTAINERID`.
    #[serde(rename = "containerID", default)]
    pub container_id: String,
    /// `CNI_NETNS`: a path in the caller's mount namespace; empty in a DEL whose namespace is gone.
    #[serde(default)]
    pub netns: String,
    /// `CNI_IFNAME`.
    #[serde(default)]
    pub ifname: String,
    /// `CNI_ARGS`, split.
    #[serde(default)]
    pub args: BTreeMap<String, String>,
    /// Standard input.
    #[serde(default)]
    pub config: Value,
}

/// A call that can be carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// Attach a pod.
    Add(Request),
    /// Say whether an attachment is still whole.
    Check(Request),
    /// Take away an attachment; `None` when no attachment of ours can have this name.
    Del(Option<Removal>),
    /// Say whether ADD would be served.
    Status,
}

/// The command of a call, for logs and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// ADD
    Add,
    /// CHECK
    Check,
    /// DEL
    Del,
    /// STATUS
    Status,
}

/// An attachment and the pod it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The specification version that the result is to have.
    pub version: String,
    /// The sandbox.
    pub container_id: String,
    /// Path of its network namespace, as the caller sees it.
    pub netns: String,
    /// The tap to make.
    pub tap: TapName,
    /// For whom.
    pub pod: Pod,
    /// What.
    pub attachment: Attachment,
}

/// Which attachment to take away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// The sandbox.
    pub container_id: String,
    /// Path of its network namespace as the caller sees it, while it exists.
    pub netns: Option<String>,
    /// The tap.
    pub tap: TapName,
}

/// The pod that a call is for, as the container runtime says; the pod itself has no say in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// The two kinds of attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attachment {
    /// The pod network, with the guest behind the pod's address.
    Masquerade(Masquerade),
    /// A tenant's network.
    L2(L2),
}

/// The pod network with the guest behind the pod's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masquerade {
    /// What reaches the guest.
    pub ports: Ports,
    /// Its addresses.
    pub network: GuestNetwork,
}

/// The ports of the pod's address that lead to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ports {
    /// All protocols and ports but the launcher's own.
    All,
    /// These.
    Listed {
        /// TCP ports.
        tcp: BTreeSet<u16>,
        /// UDP ports.
        udp: BTreeSet<u16>,
    },
}

/// A tenant's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct L2 {
    /// Which.
    pub vni: Vni,
    /// Bytes; `None`: the largest that the nodes' network carries.
    pub mtu: Option<u32>,
    /// The only sender address that the guest may use.
    pub mac: Mac,
}

/// Why a call is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The configuration's `cniVersion`.
    #[error("CNI version {0:?} is not supported: set cniVersion of the network to one of 0.3.1, 0.4.0, 1.0.0, 1.1.0")]
    Version(String),
    /// `CNI_COMMAND`.
    #[error("CNI command {0:?} is not one of ADD, DEL, CHECK, STATUS")]
    Command(String),
    /// `CNI_CONTAINERID`.
    #[error("CNI_CONTAINERID {0:?} is not a container id")]
    ContainerId(String),
    /// `CNI_NETNS`.
    #[error("CNI_NETNS is empty: the runtime must make the pod's network namespace first")]
    NoNetns,
    /// `CNI_IFNAME`.
    #[error("CNI_IFNAME: set \"interface\" of the network in the pod's annotation to tap and the interface's number")]
    Interface(#[source] NameError),
    /// `CNI_ARGS`.
    #[error("CNI_ARGS lacks {0}: only pods of Kubernetes can be attached")]
    NoPod(&'static str),
    /// The JSON on standard input.
    #[error("the network's configuration cannot be read: {0}")]
    Config(String),
    /// `mode`.
    #[error("mode {0:?} of the network is not masquerade or l2")]
    Mode(String),
    /// `vni`.
    #[error("mode l2 of the network needs vni, the number of the tenant's NetworkAllocation")]
    NoVni,
    /// `vni`.
    #[error("vni of the network")]
    Vni(#[source] NameError),
    /// `mtu`.
    #[error("mtu {0} of the network is below {MIN_MTU}")]
    Mtu(u32),
    /// No address was asked for.
    #[error("mode l2 needs the slot's address: set \"mac\" of the network in the pod's annotation")]
    NoMac,
    /// The address asked for.
    #[error("\"mac\" of the network in the pod's annotation")]
    Mac(#[source] NameError),
    /// A port of masquerade.
    #[error("port {port} {protocol}: {reason}")]
    Port {
        /// As asked.
        port: u32,
        /// As asked.
        protocol: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The guest's network.
    #[error("network {0:?} is not an IPv4 network of at least 4 addresses that a guest can be on, such as 10.0.2.0/24")]
    Network(String),
    /// The guest's network and what the pod needs for itself.
    #[error(
        "the guest's network {network} overlaps {taken}, which the pod or its cluster uses: choose another vmNetworkCIDR of the \
         machine's pod network"
    )]
    Taken {
        /// As asked.
        network: GuestNetwork,
        /// What the pod or its cluster uses.
        taken: Ipv4Net,
    },
    /// The VNI belongs to no tenant.
    #[error("VNI {0} is not allocated: the network belongs to no TenantCluster (no NetworkAllocation {name})", name = .0.allocation())]
    NotAllocated(Vni),
    /// The VNI belongs to somebody else.
    #[error(
        "VNI {vni} is not of a TenantCluster in namespace {namespace}: a pod joins only networks of its own namespace"
    )]
    NotYours {
        /// The VNI asked for.
        vni: Vni,
        /// The pod's namespace.
        namespace: String,
    },
}

impl Refused {
    /// The error code of the CNI specification, section "Error".
    pub fn code(&self) -> u32 {
        match self {
            Self::Version(_) => 1,
            Self::Command(_) | Self::ContainerId(_) | Self::NoNetns | Self::Interface(_) | Self::NoPod(_) => 4,
            Self::Config(_) => 6,
            Self::NotAllocated(_) | Self::NotYours { .. } => 100,
            _ => 7,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    mode: String,
    vni: Option<u32>,
    mtu: Option<u32>,
    #[serde(default)]
    args: Args,
    #[serde(default)]
    runtime_config: RuntimeConfig,
}

/// Multus puts `cni-args` of the pod's annotation here.
#[derive(Default, Deserialize)]
struct Args {
    #[serde(default)]
    cni: PodArgs,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct PodArgs {
    ports: Option<Vec<PodPort>>,
    network: Option<String>,
    mac: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PodPort {
    port: u32,
    #[serde(default = "tcp")]
    protocol: String,
    #[serde(default)]
    #[allow(dead_code, reason = "KubeVirt's ports may carry a name; it means nothing here")]
    name: Option<String>,
}

fn tcp() -> String {
    "TCP".into()
}

#[derive(Default, Deserialize)]
struct RuntimeConfig {
    mac: Option<String>,
}

impl Call {
    /// Reads a call.
    ///
    /// # Errors
    /// Anything that cannot be carried out as asked. A DEL is never refused for its configuration, as its pod could not
    /// be deleted then.
    pub fn parse(wire: WireCall) -> Result<Self, Refused> {
        match wire.command.as_str() {
            "ADD" => Request::parse(wire).map(Self::Add),
            "CHECK" => Request::parse(wire).map(Self::Check),
            "DEL" => Removal::parse(wire).map(Self::Del),
            "STATUS" => Ok(Self::Status),
            other => Err(Refused::Command(other.to_owned())),
        }
    }

    /// Which command it is.
    pub fn command(&self) -> Command {
        match self {
            Self::Add(_) => Command::Add,
            Self::Check(_) => Command::Check,
            Self::Del(_) => Command::Del,
            Self::Status => Command::Status,
        }
    }
}

impl Removal {
    fn parse(wire: WireCall) -> Result<Option<Self>, Refused> {
        let container_id = container_id(wire.container_id)?;
        let netns = Some(wire.netns).filter(|path| !path.is_empty());
        // We never made an interface of another name, so there is nothing to take away.
        Ok(wire.ifname.parse().ok().map(|tap| Self {
            container_id,
            netns,
            tap,
        }))
    }
}

impl Request {
    fn parse(wire: WireCall) -> Result<Self, Refused> {
        let container_id = container_id(wire.container_id)?;
        if wire.netns.is_empty() {
            return Err(Refused::NoNetns);
        }
        let tap = wire.ifname.parse().map_err(Refused::Interface)?;
        let arg = |key| {
            wire.args
                .get(key)
                .filter(|value| !value.is_empty())
                .cloned()
                .ok_or(Refused::NoPod(key))
        };
        let pod = Pod {
            namespace: arg("K8S_POD_NAMESPACE")?,
            name: arg("K8S_POD_NAME")?,
        };
        let config: Config = serde_json::from_value(wire.config).map_err(|error| Refused::Config(error.to_string()))?;
        if !VERSIONS.contains(&config.cni_version.as_str()) {
            return Err(Refused::Version(config.cni_version));
        }
        let attachment = match config.mode.as_str() {
            "masquerade" => Attachment::Masquerade(Masquerade {
                ports: ports(config.args.cni.ports)?,
                network: match config.args.cni.network {
                    None => GuestNetwork::default(),
                    Some(network) => network.parse()?,
                },
            }),
            "l2" => {
                let vni = config.vni.ok_or(Refused::NoVni)?.try_into().map_err(Refused::Vni)?;
                if let Some(mtu) = config.mtu.filter(|mtu| *mtu < MIN_MTU) {
                    return Err(Refused::Mtu(mtu));
                }
                // Multus gives the annotation's "mac" in CNI_ARGS, or as runtimeConfig where the network asks for that.
                let mac = wire
                    .args
                    .get("MAC")
                    .cloned()
                    .or(config.runtime_config.mac)
                    .or(config.args.cni.mac);
                let mac = mac.ok_or(Refused::NoMac)?.parse().map_err(Refused::Mac)?;
                Attachment::L2(L2 {
                    vni,
                    mtu: config.mtu,
                    mac,
                })
            }
            other => return Err(Refused::Mode(other.to_owned())),
        };
        Ok(Self {
            version: config.cni_version,
            container_id,
            netns: wire.netns,
            tap,
            pod,
            attachment,
        })
    }
}

/// The id also names a file of the agent, so its form matters (CNI specification, section "Parameters").
fn container_id(id: String) -> Result<String, Refused> {
    let first = id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if first && id.len() <= 128 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
        Ok(id)
    } else {
        Err(Refused::ContainerId(id))
    }
}

fn ports(asked: Option<Vec<PodPort>>) -> Result<Ports, Refused> {
    // An empty list is what KubeVirt takes for "all".
    let Some(asked) = asked.filter(|list| !list.is_empty()) else {
        return Ok(Ports::All);
    };
    let (mut tcp, mut udp) = (BTreeSet::new(), BTreeSet::new());
    for PodPort { port, protocol, .. } in asked {
        let refused = |reason| Refused::Port {
            port,
            protocol: protocol.clone(),
            reason,
        };
        let number = u16::try_from(port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| refused("not 1 to 65535"))?;
        match protocol.as_str() {
            "TCP" if [LAUNCHER_HEALTH_PORT, LAUNCHER_TLS_PORT].contains(&number) => {
                return Err(refused("kept for the launcher"));
            }
            "TCP" => tcp.insert(number),
            "UDP" => udp.insert(number),
            _ => return Err(refused("the protocol is not TCP or UDP")),
        };
    }
    Ok(Ports::Listed { tcp, udp })
}

/// Whether a pod may join a tenant's network: only if the VNI's allocation names an owner in the pod's own namespace.
///
/// # Errors
/// [`Refused::NotAllocated`] or [`Refused::NotYours`]; the latter does not say whose it is.
pub fn admit(vni: Vni, owner_namespace: Option<&str>, pod: &Pod) -> Result<(), Refused> {
    match owner_namespace {
        None => Err(Refused::NotAllocated(vni)),
        Some(owner) if owner == pod.namespace => Ok(()),
        Some(_) => Err(Refused::NotYours {
            vni,
            namespace: pod.namespace.clone(),
        }),
    }
}

/// The result of ADD: the tap in the pod, and no address, as the guest has it and not the pod.
pub fn added(request: &Request, tap_mac: &str) -> Value {
    json!({
        "cniVersion": request.version,
        "interfaces": [{"name": request.tap.as_str(), "mac": tap_mac, "sandbox": request.netns}],
        "dns": {},
    })
}

/// An error as the specification wants it on standard output.
pub fn failed(code: u32, msg: &str, details: &str) -> Value {
    json!({"cniVersion": "1.0.0", "code": code, "msg": msg, "details": details})
}

#[cfg(test)]
mod tests;
