//! Flags, each also an environment variable.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, str::FromStr};

use ipnet::Ipv4Net;
use kubernest_admission::Installation;
use kubernest_runtime::telemetry::Format;

use crate::subresources;

/// Kubernest's API: admission webhooks and the aggregated API subresources.kubevirt.io.
#[derive(Debug, clap::Parser)]
#[command(name = "kubernest-api", version)]
pub struct Args {
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Where webhooks and aggregated API are served (HTTPS).
    #[arg(long, env = "KUBERNEST_ADDR", default_value = "0.0.0.0:8443")]
    pub addr: SocketAddr,
    /// Where metrics and health are served (HTTP).
    #[arg(long, env = "KUBERNEST_METRICS_ADDR", default_value = "0.0.0.0:8080")]
    pub metrics_addr: SocketAddr,
    /// Namespace that Kubernest runs in. The pod's own (`POD_NAMESPACE`) when not given.
    #[arg(long, env = "KUBERNEST_NAMESPACE", default_value_t = kubernest_runtime::process::namespace(kubernest_crds::labels::SYSTEM_NAMESPACE))]
    pub namespace: String,
    /// Service that the API server reaches webhooks and aggregated API through.
    #[arg(long, env = "KUBERNEST_SERVICE", default_value = "kubernest-api")]
    pub service: String,
    /// Further names and addresses that the serving certificate is valid for.
    #[arg(long = "san", env = "KUBERNEST_SANS", value_delimiter = ',')]
    pub sans: Vec<String>,
    /// Validating and MutatingWebhookConfiguration whose caBundle is kept right.
    #[arg(long, env = "KUBERNEST_WEBHOOK_CONFIGURATION", default_value = "kubernest")]
    pub webhook_configuration: String,
    /// APIServices whose caBundle is kept right; those that do not exist are left out.
    #[arg(long = "api-service", env = "KUBERNEST_API_SERVICES", value_delimiter = ',',
          default_values_t = subresources::resources::VERSIONS.map(|version| format!("{version}.{}", subresources::resources::GROUP)))]
    pub api_services: Vec<String>,
    /// CustomResourceDefinitions whose conversion's caBundle is kept right; those that do not exist are left out.
    #[arg(long = "definition", env = "KUBERNEST_DEFINITIONS", value_delimiter = ',',
          default_values_t = kubernest_crds::kubevirt::PLURALS.map(|plural| format!("{plural}.kubevirt.io")))]
    pub definitions: Vec<String>,
    /// Node images by Kubernetes version, as JSON; the same as the operator's. Only the versions matter here.
    #[arg(long, env = "KUBERNEST_NODE_IMAGES", default_value = "{}", global = true)]
    pub node_images: Versions,
    /// Addresses that tenants' nodes get theirs from; the same as the operator's.
    #[arg(
        long,
        env = "KUBERNEST_NODE_CIDR_POOL",
        default_value = "100.64.0.0/10",
        global = true
    )]
    pub node_cidr_pool: Ipv4Net,
    /// Domain that host names of tenants end in; the same as the operator's.
    #[arg(
        long,
        env = "KUBERNEST_BASE_DOMAIN",
        default_value = "kubernest.local",
        global = true
    )]
    pub base_domain: String,
    /// How log lines look.
    #[arg(long, env = "KUBERNEST_LOG_FORMAT", default_value = "json", global = true)]
    pub log_format: Format,
}

/// What else it can do.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Says what admission would answer to manifests: YAML, JSON or JSON lines; one line of JSON a manifest.
    Admit(AdmitArgs),
}

/// Flags of `admit`.
#[derive(Debug, clap::Args)]
pub struct AdmitArgs {
    /// Files to read, `-` for standard input.
    #[arg(short, long = "filename", required = true)]
    pub files: Vec<PathBuf>,
}

/// Versions in a JSON map version → node image, sorted.
#[derive(Clone, Debug)]
pub struct Versions(pub Vec<String>);

impl FromStr for Versions {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let images: BTreeMap<String, serde_json::Value> = serde_json::from_str(text)?;
        Ok(Self(images.into_keys().collect()))
    }
}

impl Args {
    /// What this installation can do, for admission.
    pub fn installation(&self) -> Installation {
        Installation {
            versions: self.node_images.0.clone(),
            node_cidr_pool: self.node_cidr_pool,
            base_domain: self.base_domain.clone(),
        }
    }
}
