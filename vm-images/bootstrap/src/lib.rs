//! The bootstrap document: what the operator writes into a slot's Secret and `kubernest-guest` carries out.
//!
//! The operator decides everything (flags, files, units, their order); the guest is generic and knows no Kubernetes
//! version. The document is one JSON object under [`NODE_CONFIG_KEY`]; each file's content is another key of the same
//! Secret, so that a rotated certificate changes one key and nothing else.
//!
//! This crate does no I/O and knows no Kubernetes type.

use serde::{Deserialize, Serialize};

/// Version written into [`NodeConfig::api_version`]; a guest refuses any other.
pub const API_VERSION: &str = "bootstrap.kubernest.io/v1";
/// Key of the Secret, and name of the file on the share, that holds the [`NodeConfig`].
pub const NODE_CONFIG_KEY: &str = "node.json";
/// virtiofs tag of the share, and name of the VMI's volume and filesystem.
pub const SHARE_TAG: &str = "bootstrap";
/// Where the guest mounts the share.
pub const SHARE_PATH: &str = "/run/kubernest/bootstrap";
/// Where the guest mounts the slot's data disk (etcd, kubelet, containerd live below it).
pub const DATA_PATH: &str = "/var/lib/kubernest";
/// virtio serial of the slot's data disk: `/dev/disk/by-id/virtio-data`.
pub const DATA_DISK_SERIAL: &str = "data";
/// Each line of progress that the guest says on its serial console starts so.
pub const CONSOLE_PREFIX: &str = "kubernest-guest: ";

/// Everything one node needs to become part of its cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeConfig {
    /// Always [`API_VERSION`].
    pub api_version: String,
    /// Host name and Kubernetes node name: the slot's name.
    pub hostname: String,
    /// Interfaces with fixed addresses, found by MAC. The pod network (`eth0`) is not listed: it uses DHCP.
    pub interfaces: Vec<Interface>,
    /// Extra lines of /etc/hosts (localhost and the own name are always there).
    #[serde(default)]
    pub hosts: Vec<HostEntry>,
    /// Files to write before any unit starts, and again whenever their content changes.
    pub files: Vec<File>,
    /// Units to start, stage by stage.
    pub stages: Vec<Stage>,
    /// What the guest's own CNI configuration is made from.
    pub cni: Cni,
}

/// An interface of the tenant network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Interface {
    /// Name it gets, for example `eth1`.
    pub name: String,
    /// MAC address it is found by, lower case with colons.
    pub mac: String,
    /// Address with prefix length, for example `100.64.0.10/24`.
    pub address: String,
    /// MTU in bytes.
    pub mtu: u32,
}

/// One line of /etc/hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HostEntry {
    /// The address.
    pub ip: String,
    /// Names that resolve to it.
    pub names: Vec<String>,
}

/// A file of the node, its content under another key of the share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct File {
    /// Absolute path in the guest; missing parents are made with mode 0755.
    pub path: String,
    /// Key of the Secret whose value is the content.
    pub key: String,
    /// Permission bits in octal, for example `0600`. Owner is always root.
    pub mode: String,
    /// Units to restart when the content changes after they were started. Programs that reload by themselves
    /// (kube-apiserver and its serving certificate) need none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restart: Vec<String>,
}

/// Units that start together; the next stage starts when `wait_for` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Stage {
    /// What the guest says on the console while it is at it, for example `control plane`.
    pub name: String,
    /// systemd units, for example `etcd.service`.
    pub units: Vec<String>,
    /// Condition for the stage to be done; none means as soon as the units are started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_for: Option<WaitFor>,
}

/// An HTTPS address that must answer 200.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WaitFor {
    /// For example `https://127.0.0.1:6443/readyz`.
    pub url: String,
    /// Path of the CA certificate (PEM) that must have signed the server's.
    pub ca_file: String,
    /// Client certificate and key (PEM paths); kube-apiserver's health endpoints need none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<ClientFiles>,
}

/// A client certificate on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClientFiles {
    /// PEM certificate path.
    pub cert_file: String,
    /// PEM key path.
    pub key_file: String,
}

/// The CNI configuration that the guest keeps for the node's containerd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    rename_all = "camelCase",
    rename_all_fields = "camelCase",
    deny_unknown_fields,
    tag = "type"
)]
pub enum Cni {
    /// bridge + host-local + portmap from the subnet that flannel writes to /run/flannel/subnet.env.
    Flannel,
}

/// Why a document is not one that this guest can carry out.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// Not JSON of the expected shape.
    #[error("{NODE_CONFIG_KEY} is not a valid node configuration")]
    Parse(#[source] serde_json::Error),
    /// Another version of the document.
    #[error(
        "{NODE_CONFIG_KEY} has apiVersion {found:?}; this node image understands {API_VERSION:?}: use a node image of the operator's release"
    )]
    Version {
        /// What the document says.
        found: String,
    },
}

impl NodeConfig {
    /// Reads a document, refusing versions and fields that this guest does not know.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Head {
            api_version: String,
        }
        let head: Head = serde_json::from_slice(bytes).map_err(ParseError::Parse)?;
        if head.api_version != API_VERSION {
            return Err(ParseError::Version {
                found: head.api_version,
            });
        }
        serde_json::from_slice(bytes).map_err(ParseError::Parse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bootstrap_parse_names_an_unknown_version() {
        let error = NodeConfig::parse(br#"{"apiVersion":"bootstrap.kubernest.io/v9"}"#).unwrap_err();
        assert!(error.to_string().contains("bootstrap.kubernest.io/v9"));
    }

    #[test]
    fn bootstrap_parse_refuses_unknown_fields() {
        let text = br#"{"apiVersion":"bootstrap.kubernest.io/v1","hostname":"a","interfaces":[],"files":[],"stages":[],"cni":{"type":"flannel"},"bogus":1}"#;
        assert!(matches!(NodeConfig::parse(text), Err(ParseError::Parse(_))));
    }
}
