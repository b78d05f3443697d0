//! The CNI configuration of the node's containerd, made from what the tenant's network add-on leaves on the node.
//!
//! It installs no plugins (the node image has them) and assigns no addresses (host-local does).

use std::fs;
use std::path::Path;

use kubernest_bootstrap::Cni;
use serde_json::json;

use crate::files::{self, FileError};

/// Written by flanneld (pkg/subnet/subnet.go, WriteSubnetFile).
const FLANNEL_SUBNET: &str = "/run/flannel/subnet.env";
/// Read by containerd, the first file in the order of names.
const CONFIGURATION: &str = "/etc/cni/net.d/10-kubernest.conflist";

/// Why there is no CNI configuration.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The add-on wrote something unexpected.
    #[error("{FLANNEL_SUBNET} lacks a usable {key}")]
    Subnet {
        /// Which line.
        key: &'static str,
    },
    /// The file could not be written.
    #[error("cannot write the CNI configuration")]
    Write(#[source] FileError),
}

/// Brings the configuration up to date; true if it changed. Nothing happens before the add-on has spoken.
pub fn refresh(cni: &Cni) -> Result<bool, CniError> {
    let Cni::Flannel = cni;
    let Ok(environment) = fs::read_to_string(FLANNEL_SUBNET) else {
        return Ok(false);
    };
    let text = flannel(&environment)?;
    files::write(Path::new(CONFIGURATION), text.as_bytes(), 0o600).map_err(CniError::Write)
}

/// What flannel's own plugin would delegate to: it is not to be had as a Go module, and bridge, host-local and portmap
/// do the same.
fn flannel(environment: &str) -> Result<String, CniError> {
    let value = |key: &'static str| {
        let found = environment
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        found.filter(|value| !value.is_empty()).ok_or(CniError::Subnet { key })
    };
    let subnet = network(value("FLANNEL_SUBNET")?).ok_or(CniError::Subnet { key: "FLANNEL_SUBNET" })?;
    let mtu: u32 = value("FLANNEL_MTU")?
        .parse()
        .map_err(|_| CniError::Subnet { key: "FLANNEL_MTU" })?;
    let cluster = value("FLANNEL_NETWORK")?;
    let conflist = json!({
        "cniVersion": "1.0.0",
        "name": "kubernest",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipMasq": false,
                "hairpinMode": true,
                "mtu": mtu,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/kubernest/cni",
                    "ranges": [[{"subnet": subnet}]],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": cluster}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    Ok(format!("{conflist:#}\n"))
}

/// The network of an address with prefix: `10.10.1.1/24` is in `10.10.1.0/24`, which is what host-local wants.
fn network(address: &str) -> Option<String> {
    let (ip, length) = address.split_once('/')?;
    let ip: std::net::Ipv4Addr = ip.parse().ok()?;
    let length: u32 = length.parse().ok().filter(|length| (1..=30).contains(length))?;
    let mask = u32::MAX << (32 - length);
    Some(format!("{}/{length}", std::net::Ipv4Addr::from(u32::from(ip) & mask)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENVIRONMENT: &str =
        "FLANNEL_NETWORK=10.10.0.0/16\nFLANNEL_SUBNET=10.10.1.1/24\nFLANNEL_MTU=1350\nFLANNEL_IPMASQ=true\n";

    #[test]
    fn cni_flannel_hands_the_nodes_subnet_to_host_local() {
        let conflist: serde_json::Value = serde_json::from_str(&flannel(ENVIRONMENT).unwrap()).unwrap();
        let bridge = &conflist["plugins"][0];
        assert_eq!(bridge["ipam"]["ranges"][0][0]["subnet"], "10.10.1.0/24");
        assert_eq!(bridge["mtu"], 1350);
        assert_eq!(bridge["ipam"]["routes"][1]["dst"], "10.10.0.0/16");
    }

    #[test]
    fn cni_flannel_names_what_is_missing() {
        let error = flannel("FLANNEL_NETWORK=10.10.0.0/16\nFLANNEL_MTU=1350\n").unwrap_err();
        assert!(error.to_string().contains("FLANNEL_SUBNET"));
        assert!(flannel(&ENVIRONMENT.replace("10.10.1.1/24", "10.10.1.1/0")).is_err());
    }
}
