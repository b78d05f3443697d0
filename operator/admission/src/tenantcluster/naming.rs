//! Names that follow from a cluster's and its pools': Service, host name, slots. They must all be valid and distinct.

use std::{collections::BTreeMap, net::IpAddr};

use kubernest_crds::{CONTROL_PLANE_POOL, TenantClusterSpec};
use serde_json::Value;

use crate::{
    Installation,
    decision::{Report, reasons},
    names,
};

/// Part of a slot's name that stands for the control plane.
const CONTROL_PLANE_SLOT: &str = "cp";
/// Longest DNS label (RFC 1035 section 2.3.4), which node, machine and Service names must be.
const LABEL: usize = 63;
/// Longest host name.
const HOST: usize = 253;

/// The cluster's own name, when it is created (a name never changes).
pub fn check_cluster(report: &mut Report, installation: &Installation, object: &Value, spec: &TenantClusterSpec) {
    let Some(name) = name(object) else { return };
    const FIELD: &str = "metadata.name";
    if names::dns_label(name).is_some_and(|_| name.len() <= LABEL)
        || !name.starts_with(|c: char| c.is_ascii_lowercase())
    {
        report.invalid(
            FIELD,
            format!(
                "{name:?} must consist of lower case letters, digits or '-', start with a letter and end with a letter \
                 or digit: it becomes part of machine, Service and host names"
            ),
        );
    }
    let service = format!("{name}-api");
    if service.len() > LABEL {
        report.invalid(
            FIELD,
            format!("{name:?} is too long: its Service {service} must be no more than {LABEL} characters"),
        );
    }
    let host = default_host(installation, object, name);
    if spec.access.hostname.is_empty() && host.len() > HOST {
        report.invalid(
            FIELD,
            format!("{name:?} is too long: its host name {host} must be no more than {HOST} characters; or set spec.access.hostname"),
        );
    }
}

/// The host name that users reach the API server at. Below the installation's own domain each tenant has its own name
/// only, so that none can take another's.
pub fn check_hostname(report: &mut Report, installation: &Installation, object: &Value, hostname: &str) {
    const FIELD: &str = "spec.access.hostname";
    let domain = &installation.base_domain;
    if hostname.is_empty() {
        return;
    }
    if hostname.parse::<IpAddr>().is_ok() {
        report.invalid(
            FIELD,
            format!("{hostname:?} is an address; a host name is needed, clients are told apart by it"),
        );
    } else if let Some(why) = names::dns_name(hostname) {
        report.invalid(FIELD, format!("{hostname:?} is not a host name: {why}"));
    } else if !hostname.contains('.') {
        report.invalid(
            FIELD,
            format!("{hostname:?} is not a full host name: it needs a domain, such as {hostname}.example.com"),
        );
    } else if let Some(name) = name(object)
        && (hostname == domain || hostname.ends_with(&format!(".{domain}")))
        && hostname != default_host(installation, object, name)
    {
        let own = default_host(installation, object, name);
        report.add(
            reasons::FORBIDDEN,
            FIELD,
            format!("{hostname:?} may be another tenant's: below {domain} this one's name is {own}"),
        );
    }
}

fn default_host(installation: &Installation, object: &Value, name: &str) -> String {
    let namespace = object
        .pointer("/metadata/namespace")
        .and_then(Value::as_str)
        .unwrap_or("default");
    format!("{name}.{namespace}.{}", installation.base_domain)
}

/// Names of pools and of all slots.
pub fn check_slots(report: &mut Report, object: &Value, spec: &TenantClusterSpec) {
    let mut seen = BTreeMap::new();
    for (index, pool) in spec.node_pools.iter().enumerate() {
        let field = format!("spec.nodePools[{index}].name");
        if let Some(why) = names::dns_label(&pool.name) {
            report.invalid(&field, format!("{:?} is not a pool name: {why}", pool.name));
        }
        if pool.name == CONTROL_PLANE_SLOT || pool.name == CONTROL_PLANE_POOL {
            report.invalid(
                &field,
                format!("{:?} stands for the control plane, choose another name", pool.name),
            );
        }
        if let Some(first) = seen.insert(pool.name.as_str(), index) {
            report.add(
                reasons::DUPLICATE,
                &field,
                format!("{:?} is the name of spec.nodePools[{first}] already", pool.name),
            );
        }
    }
    let Some(name) = name(object) else { return };
    let control_plane = format!(
        "{name}-{CONTROL_PLANE_SLOT}-{}",
        spec.control_plane.replicas.saturating_sub(1).max(0)
    );
    too_long(report, "metadata.name", name, &control_plane);
    for (index, pool) in spec.node_pools.iter().enumerate() {
        let last = format!("{name}-{}-{}", pool.name, pool.replicas.saturating_sub(1).max(0));
        too_long(report, &format!("spec.nodePools[{index}].name"), &pool.name, &last);
    }
}

fn too_long(report: &mut Report, field: &str, what: &str, slot: &str) {
    if slot.len() > LABEL {
        report.invalid(
            field,
            format!(
                "{what:?} is too long: the host name {slot} must be no more than {LABEL} characters, it has {}",
                slot.len()
            ),
        );
    }
}

/// The name, unless it is still to be generated by the API server.
fn name(object: &Value) -> Option<&str> {
    object
        .pointer("/metadata/name")
        .and_then(Value::as_str)
        .filter(|name| !name.is_empty())
}
