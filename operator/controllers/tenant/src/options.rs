//! Flags of the tenant half. Parses them; decides nothing.

use std::{collections::BTreeMap, str::FromStr};

use clap::Args;
use ipnet::Ipv4Net;
use serde::Deserialize;

/// Flags of the tenant half, each with an environment variable.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Node images as JSON: {"v1.35.4": {"image": "…", "kernelArgs": "…", "emulationKernelArgs": "…"}}
    #[arg(long, env = "KUBERNEST_NODE_IMAGES", value_name = "JSON", default_value = "{}")]
    pub node_images: NodeImages,
    /// Pool that each tenant's node addresses (a /24) are taken from
    #[arg(
        long,
        env = "KUBERNEST_NODE_CIDR_POOL",
        value_name = "CIDR",
        default_value = "100.64.0.0/10"
    )]
    pub node_cidr_pool: Ipv4Net,
    /// Domain below which tenants get host names: <name>.<namespace>.<base domain>
    #[arg(
        long,
        env = "KUBERNEST_BASE_DOMAIN",
        value_name = "DOMAIN",
        default_value = "kubernest.local"
    )]
    pub base_domain: String,
    /// Port at which users reach tenants' API servers
    #[arg(long, env = "KUBERNEST_INGRESS_PORT", value_name = "PORT", default_value_t = 6443)]
    pub ingress_port: u16,
}

/// A node image: one per Kubernetes version.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeImage {
    /// Reference of the containerDisk, by digest.
    pub image: String,
    /// Kernel command line.
    #[serde(default)]
    pub kernel_args: String,
    /// Added to it where no hardware virtualisation is used.
    #[serde(default)]
    pub emulation_kernel_args: String,
}

/// Node images by Kubernetes version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct NodeImages(pub BTreeMap<String, NodeImage>);

impl FromStr for NodeImages {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text)
    }
}

impl NodeImages {
    /// The versions that tenants can have, for messages.
    pub fn versions(&self) -> String {
        self.0.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_node_images_refuse_unknown_fields() {
        assert!(r#"{"v1.35.4":{"image":"a","bogus":1}}"#.parse::<NodeImages>().is_err());
        let images: NodeImages = r#"{"v1.35.4":{"image":"a","kernelArgs":"quiet"}}"#.parse().unwrap();
        assert_eq!(images.versions(), "v1.35.4");
    }
}
