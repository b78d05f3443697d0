//! Interfaces and the networks that they attach to.

use std::collections::BTreeMap;

use kubernest_crds::kubevirt::v1::{Interface, Network, PodNetwork, VirtualMachineInstanceSpec};

use super::{dhcp, unsupported};
use crate::decision::{Report, reasons};

const MODELS: [&str; 6] = ["e1000", "e1000e", "ne2k_pci", "pcnet", "rtl8139", "virtio"];
/// MAC address of the bridge in the pod (KubeVirt's).
const RESERVED_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0];

/// Checks `domain.devices.interfaces` and `networks`.
pub fn check(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let interfaces = spec.domain.devices.interfaces.as_deref().unwrap_or_default();
    let networks = spec.networks.as_deref().unwrap_or_default();
    let by_name: BTreeMap<&str, &Network> = networks
        .iter()
        .map(|network| (network.name.as_str(), network))
        .collect();

    check_networks(report, f, networks, interfaces);
    for (index, interface) in interfaces.iter().enumerate() {
        let at = format!("{f}.domain.devices.interfaces[{index}]");
        let network = by_name.get(interface.name.as_str()).copied();
        if network.is_none() {
            report.invalid(
                format!("{at}.name"),
                format!("{at}.name '{}' not found.", interface.name),
            );
        }
        if interfaces[..index].iter().any(|other| other.name == interface.name) {
            report.add(
                reasons::DUPLICATE,
                format!("{at}.name"),
                "Only one interface can be connected to one specific network",
            );
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if interface.name.is_empty() || !interface.name.bytes().all(allowed) {
            report.invalid(
                format!("{at}.name"),
                "Network interface name can only contain alphabetical characters, numbers, dashes (-) or underscores (_)",
            );
        }
        binding(report, &at, interface, network);
        properties(report, &at, interface);
        ports(report, &at, interface);
        dhcp::check(report, f, &at, interface);
    }
}

fn check_networks(report: &mut Report, f: &str, networks: &[Network], interfaces: &[Interface]) {
    if networks.iter().filter(|network| network.pod.is_some()).count() > 1 {
        let field = format!("{f}.interfaces");
        let message = format!("more than one interface is connected to a pod network in {field}");
        report.add(reasons::DUPLICATE, field, message);
    }
    for (index, network) in networks.iter().enumerate() {
        let at = format!("{f}.networks[{index}]");
        match (&network.pod, &network.multus) {
            (None, None) if report.mentions_below(&at) => {}
            (None, None) => report.add(reasons::REQUIRED, &at, "should have a network type"),
            (Some(_), Some(_)) => report.add(reasons::REQUIRED, &at, "should have only one network type"),
            (None, Some(multus)) if multus.network_name.is_empty() => {
                report.add(reasons::REQUIRED, &at, "CNI delegating plugin must have a networkName");
            }
            _ => {}
        }
        // KubeVirt lets any text in, and its launcher then fails by it.
        if let Some(Err(why)) = network.pod.as_ref().map(PodNetwork::guest_network) {
            let field = format!("{at}.pod.vmNetworkCIDR");
            let message = format!("{field}: {why}");
            report.invalid(field, message);
        }
        if networks[..index].iter().any(|other| other.name == network.name) {
            let message = format!(
                "Network with name \"{}\" already exists, every network must have a unique name",
                network.name
            );
            report.add(reasons::DUPLICATE, format!("{at}.name"), message);
        }
        if !interfaces.iter().any(|interface| interface.name == network.name) {
            report.add(
                reasons::REQUIRED,
                format!("{at}.name"),
                format!("{at}.name '{}' not found.", network.name),
            );
        }
    }
}

fn binding(report: &mut Report, at: &str, interface: &Interface, network: Option<&Network>) {
    let on_pod = network.is_some_and(|network| network.pod.is_some());
    let bindings = usize::from(interface.masquerade.is_some()) + usize::from(interface.bridge.is_some());
    if bindings > 1 || bindings == 0 && !report.mentions_below(at) {
        let message = format!(
            "logical {} interface must have exactly one binding method or binding plugin",
            interface.name
        );
        report.invalid(at, message);
    }
    if interface.masquerade.is_some() && !on_pod {
        report.invalid(
            format!("{at}.name"),
            "Masquerade interface only implemented with pod network",
        );
    }
    if interface.bridge.is_some() && on_pod {
        unsupported(report, format!("{at}.bridge"));
    }
}

fn properties(report: &mut Report, at: &str, interface: &Interface) {
    if let Some(model) = interface.model.as_deref()
        && !model.is_empty()
        && !MODELS.contains(&model)
    {
        report.not_supported(
            format!("{at}.model"),
            format!("interface {at}.name uses model {model} that is not supported."),
        );
    }
    let Some(text) = interface.mac_address.as_deref().filter(|text| !text.is_empty()) else {
        return;
    };
    let field = format!("{at}.macAddress");
    match mac(text) {
        None => report.invalid(
            field,
            format!("interface {at}.name has malformed MAC address ({text})."),
        ),
        Some(bytes) if bytes.len() > 6 => {
            report.invalid(field, format!("interface {at}.name has too long MAC address ({text})."));
        }
        Some(bytes) if bytes == RESERVED_MAC => report.invalid(
            field,
            "The requested MAC address is reserved for the in-pod bridge. Please choose another one.",
        ),
        Some(_) => {}
    }
}

/// The bytes of hexadecimal digits without anything between.
fn octets(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2);
    let bytes: Option<Vec<u8>> = pairs
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect();
    bytes.filter(|bytes| matches!(bytes.len(), 6 | 8 | 20))
}

/// Reads an EUI-48 or longer address as Go's net.ParseMAC does: two digits between `:` or `-`, four between dots.
pub fn mac(text: &str) -> Option<Vec<u8>> {
    if text.contains('.') {
        let dotted = text.split('.').all(|group| group.len() == 4);
        return dotted.then(|| octets(&text.replace('.', ""))).flatten();
    }
    let separator = if text.contains(':') { ':' } else { '-' };
    let bytes: Option<Vec<u8>> = text
        .split(separator)
        .map(|group| (group.len() == 2).then(|| u8::from_str_radix(group, 16).ok()).flatten())
        .collect();
    bytes.filter(|bytes| matches!(bytes.len(), 6 | 8 | 20))
}

fn ports(report: &mut Report, at: &str, interface: &Interface) {
    let ports = interface.ports.as_deref().unwrap_or_default();
    for (index, port) in ports.iter().enumerate() {
        let field = format!("{at}.ports[{index}]");
        match port.port {
            0 => report.add(reasons::REQUIRED, format!("{field}.port"), "Port field is mandatory."),
            1..=65535 => {}
            _ => report.invalid(format!("{field}.port"), "Port field must be in range 0 < x < 65536."),
        }
        if port
            .protocol
            .as_deref()
            .is_some_and(|protocol| !matches!(protocol, "" | "TCP" | "UDP"))
        {
            report.invalid(format!("{field}.protocol"), "Unknown protocol, only TCP or UDP allowed");
        }
        let name = port.name.as_deref().unwrap_or_default();
        if !name.is_empty() && !is_port_name(name) {
            let message = format!("Invalid name of the port: {name}");
            report.invalid(format!("{field}.name"), message);
        }
        if !name.is_empty() && ports[..index].iter().any(|other| other.name.as_deref() == Some(name)) {
            report.add(
                reasons::DUPLICATE,
                format!("{field}.name"),
                format!("Duplicate name of the port: {name}"),
            );
        }
    }
}

/// IANA_SVC_NAME (RFC 6335), which Kubernetes wants of ports.
fn is_port_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    name.len() <= 15
        && name.bytes().all(allowed)
        && name.bytes().any(|byte| byte.is_ascii_lowercase())
        && !name.contains("--")
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_reads_what_go_reads() {
        assert_eq!(mac("de:ad:00:00:be:af").map(|bytes| bytes.len()), Some(6));
        assert_eq!(mac("de-ad-00-00-be-af").map(|bytes| bytes.len()), Some(6));
        assert_eq!(mac("de:ad:00:00:be:af:be:af").map(|bytes| bytes.len()), Some(8));
        assert_eq!(mac("dead.0000.beaf").map(|bytes| bytes.len()), Some(6));
        assert_eq!(mac("de:ad:00:00:be"), None);
        assert_eq!(mac("de:ad:00:00:be:zz"), None);
        assert_eq!(mac("d:ad:00:00:be:af"), None);
    }
}
