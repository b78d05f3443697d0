//! Interfaces of a VMI and the taps made for them → network cards.

use std::net::Ipv4Addr;

use kubernest_crds::kubevirt::v1::{
    DHCP_PRIVATE, DHCP_TOTAL_BYTES, DHCP_VALUE_BYTES, DhcpOptions, GuestNetwork, Interface,
};

use super::{PlanError, invalid, missing, unsupported};
use crate::machine::{Dhcp, Nic};
use crate::{Launch, TapInterface, TapKind};

/// Device models that KubeVirt's API knows; all are qemu's.
const MODELS: [&str; 6] = ["virtio", "e1000", "e1000e", "ne2k_pci", "pcnet", "rtl8139"];
/// Longest name of a network device (Linux `IFNAMSIZ` - 1).
const MAX_DEVICE_NAME: usize = 15;
/// Numbers of DHCP options (RFC 2132, sections 8.3, 9.4 and 9.5).
const NTP_SERVERS: u8 = 42;
const TFTP_SERVER_NAME: u8 = 66;
const BOOT_FILE_NAME: u8 = 67;

pub(super) fn nics(launch: &Launch) -> Result<Vec<Nic>, PlanError> {
    let interfaces = launch.vmi.spec.domain.devices.interfaces.as_deref().unwrap_or_default();
    if let Some(tap) = launch
        .interfaces
        .iter()
        .find(|tap| !interfaces.iter().any(|i| i.name == tap.name))
    {
        return Err(missing("interfaces", &tap.name));
    }
    let masqueraded = launch
        .interfaces
        .iter()
        .filter(|tap| tap.kind == TapKind::Masquerade)
        .count();
    if masqueraded > 1 {
        return Err(invalid(
            "interfaces",
            "only one masquerade interface can be served with DHCP",
        ));
    }
    interfaces
        .iter()
        .enumerate()
        .map(|(i, interface)| {
            let field = format!("spec.domain.devices.interfaces[{i}]");
            let tap = launch
                .interfaces
                .iter()
                .find(|tap| tap.name == interface.name)
                .ok_or_else(|| missing(format!("{field}.name"), &interface.name))?;
            nic(&field, interface, tap, guest_network(launch, &interface.name)?)
        })
        .collect()
}

/// The guest's network behind an interface; KubeVirt's where the pod network names none.
fn guest_network(launch: &Launch, name: &str) -> Result<GuestNetwork, PlanError> {
    let mut networks = launch.vmi.spec.networks.iter().flatten().enumerate();
    let pod =
        networks.find_map(|(index, network)| Some((index, network.pod.as_ref().filter(|_| network.name == name)?)));
    let Some((index, pod)) = pod else {
        return Ok(GuestNetwork::default());
    };
    let field = format!("spec.networks[{index}].pod.vmNetworkCIDR");
    pod.guest_network()
        .map_err(|_| invalid(field, "is no IPv4 network that a guest can be on"))
}

fn nic(field: &str, interface: &Interface, tap: &TapInterface, network: GuestNetwork) -> Result<Nic, PlanError> {
    let kind = match (&interface.masquerade, &interface.bridge) {
        (Some(_), None) => TapKind::Masquerade,
        (None, Some(_)) => TapKind::Bridge,
        _ => return Err(invalid(field, "must have exactly one binding")),
    };
    if kind != tap.kind {
        return Err(invalid(
            format!("interfaces.{}.kind", tap.name),
            "is not the VMI's binding",
        ));
    }
    let model = interface
        .model
        .as_deref()
        .filter(|model| !model.is_empty())
        .unwrap_or("virtio");
    if !MODELS.contains(&model) {
        return Err(unsupported(format!("{field}.model")));
    }
    if interface.boot_order == Some(0) {
        return Err(invalid(format!("{field}.bootOrder"), "must be greater than 0"));
    }
    let device = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    if tap.tap.is_empty() || tap.tap.len() > MAX_DEVICE_NAME || !tap.tap.bytes().all(device) {
        return Err(invalid(
            format!("interfaces.{}.tap", tap.name),
            "is no name of a network device",
        ));
    }
    if !(68..=65521).contains(&tap.mtu) {
        return Err(invalid(
            format!("interfaces.{}.mtu", tap.name),
            "must be between 68 and 65521 bytes",
        ));
    }
    let dhcp = match (kind, &interface.dhcp_options) {
        (TapKind::Masquerade, options) => {
            let options = options.clone().unwrap_or_default();
            Some(dhcp(&format!("{field}.dhcpOptions"), network, &options)?)
        }
        (TapKind::Bridge, None) => None,
        (TapKind::Bridge, Some(_)) => return Err(unsupported(format!("{field}.dhcpOptions"))),
    };
    let mac =
        mac(&tap.mac).ok_or_else(|| invalid(format!("interfaces.{}.mac", tap.name), "is no unicast MAC address"))?;
    Ok(Nic {
        name: name(&format!("{field}.name"), &interface.name)?,
        tap: tap.tap.clone(),
        kind,
        mac,
        mtu: tap.mtu,
        model: model.to_owned(),
        boot_order: interface.boot_order,
        dhcp,
    })
}

fn dhcp(field: &str, network: GuestNetwork, asked: &DhcpOptions) -> Result<Dhcp, PlanError> {
    if asked.bytes() > DHCP_TOTAL_BYTES {
        return Err(invalid(field, "must not take more than 768 bytes in an answer"));
    }
    if let Some((path, _)) = asked.texts().find(|(_, text)| text.len() > DHCP_VALUE_BYTES) {
        return Err(invalid(format!("{field}.{path}"), "must not have more than 255 bytes"));
    }
    let mut options: Vec<(u8, Vec<u8>)> = Vec::new();
    for (number, text) in [
        (TFTP_SERVER_NAME, &asked.tftp_server_name),
        (BOOT_FILE_NAME, &asked.boot_file_name),
    ] {
        options.extend(text.as_ref().map(|text| (number, text.as_bytes().to_vec())));
    }
    let mut servers = Vec::new();
    for (index, server) in asked.ntp_servers.iter().flatten().enumerate() {
        let address: Result<Ipv4Addr, _> = server.parse();
        let address = address.map_err(|_| invalid(format!("{field}.ntpServers[{index}]"), "is no IPv4 address"))?;
        servers.extend(address.octets());
    }
    options.push((NTP_SERVERS, servers));
    for (index, private) in asked.private_options.iter().flatten().enumerate() {
        let at = format!("{field}.privateOptions[{index}].option");
        let number = u8::try_from(private.option).ok();
        let number = number.filter(|_| DHCP_PRIVATE.contains(&private.option));
        let number = number.ok_or_else(|| invalid(&at, "must be in range 224 to 254"))?;
        if options.iter().any(|(other, _)| *other == number) {
            return Err(invalid(at, "is used twice"));
        }
        options.push((number, private.value.as_bytes().to_vec()));
    }
    options.retain(|(_, value)| !value.is_empty());
    let boot_server = asked.tftp_server_name.as_ref().and_then(|name| name.parse().ok());
    Ok(Dhcp {
        network,
        options,
        boot_server,
    })
}

/// A name that libvirt takes as part of an alias; KubeVirt's admission lets in no other.
fn name(field: &str, text: &str) -> Result<String, PlanError> {
    let safe = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    if text.is_empty() || !text.bytes().all(safe) {
        return Err(invalid(field, "must be letters, digits, '-' and '_'"));
    }
    Ok(text.to_owned())
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}
