//! What to change on a node so that its overlay is as it should be: flood entries of a VXLAN device, and tenant networks
//! that no pod on this node uses any more. Compares; changes nothing itself.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use crate::names::{BRIDGE_PREFIX, VXLAN_PREFIX, Vni};

/// Where frames for unknown or all receivers are to be sent: the other nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FloodChanges {
    /// Peers that get no copy yet.
    pub add: BTreeSet<Ipv4Addr>,
    /// Peers that are no longer nodes.
    pub remove: BTreeSet<Ipv4Addr>,
}

/// The changes that turn the flood entries `actual` into one for each of `nodes` except `own`.
pub fn flood_changes(actual: &BTreeSet<Ipv4Addr>, nodes: &BTreeSet<Ipv4Addr>, own: Ipv4Addr) -> FloodChanges {
    let wanted: BTreeSet<_> = nodes.iter().copied().filter(|node| *node != own).collect();
    FloodChanges {
        add: wanted.difference(actual).copied().collect(),
        remove: actual.difference(&wanted).copied().collect(),
    }
}

/// A network device as the kernel lists it, as far as the overlay needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Kernel's index, unique in its network namespace.
    pub index: u32,
    /// Device name.
    pub name: String,
    /// Index of the bridge that it is a port of.
    pub bridge: Option<u32>,
}

/// The tenant networks of a node, whether whole or half made.
pub fn present(links: &[Link]) -> BTreeSet<Vni> {
    links.iter().filter_map(|link| Vni::of_device(&link.name)).collect()
}

/// The tenant networks of a node whose bridge, if any, has no port but the VXLAN device: no pod is attached to them.
pub fn unused(links: &[Link]) -> BTreeSet<Vni> {
    present(links)
        .into_iter()
        .filter(|vni| {
            let bridge = links
                .iter()
                .find(|link| link.name == vni.bridge())
                .map(|link| link.index);
            !links
                .iter()
                .any(|link| bridge.is_some() && link.bridge == bridge && !link.name.starts_with(VXLAN_PREFIX))
        })
        .collect()
}

/// The largest MTU of a tenant network over an underlay of `underlay` bytes.
pub fn max_mtu(underlay: u32) -> u32 {
    underlay.saturating_sub(crate::VXLAN_OVERHEAD)
}

/// Whether a device is one of the bridges of tenants.
pub fn is_tenant_bridge(name: &str) -> bool {
    name.starts_with(BRIDGE_PREFIX) && Vni::of_device(name).is_some()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn link(index: u32, name: &str, bridge: Option<u32>) -> Link {
        Link {
            index,
            name: name.into(),
            bridge,
        }
    }

    fn vnis(numbers: &[u32]) -> BTreeSet<Vni> {
        numbers.iter().map(|n| Vni::try_from(*n).unwrap()).collect()
    }

    #[test]
    fn plan_unused_networks_have_no_pod_port() {
        let links = [
            link(1, "lo", None),
            link(2, "kn-b4097", None),
            link(3, "kn-x4097", Some(2)),
            link(4, "kn-v0011223344", Some(2)),
            link(5, "kn-b4098", None),
            link(6, "kn-x4098", Some(5)),
            link(7, "kn-x4099", None),
            link(8, "docker0", None),
        ];
        assert_eq!(present(&links), vnis(&[4097, 4098, 4099]));
        assert_eq!(unused(&links), vnis(&[4098, 4099]));
    }

    #[test]
    fn plan_flood_skips_own_node() {
        let ip = |n| Ipv4Addr::new(10, 0, 0, n);
        let changes = flood_changes(&[ip(2), ip(9)].into(), &[ip(1), ip(2), ip(3)].into(), ip(1));
        assert_eq!(
            changes,
            FloodChanges {
                add: [ip(3)].into(),
                remove: [ip(9)].into()
            }
        );
    }

    proptest! {
        #[test]
        fn plan_flood_changes_lead_to_all_other_nodes(
            actual in proptest::collection::btree_set(0u32..20, 0..20),
            nodes in proptest::collection::btree_set(0u32..20, 0..20),
            own in 0u32..20,
        ) {
            let ips = |set: &BTreeSet<u32>| set.iter().map(|n| Ipv4Addr::from(*n)).collect::<BTreeSet<_>>();
            let (mut state, nodes, own) = (ips(&actual), ips(&nodes), Ipv4Addr::from(own));
            let changes = flood_changes(&state, &nodes, own);
            state.extend(&changes.add);
            state.retain(|ip| !changes.remove.contains(ip));
            prop_assert!(!state.contains(&own));
            prop_assert!(nodes.iter().filter(|n| **n != own).all(|n| state.contains(n)));
            prop_assert_eq!(flood_changes(&state, &nodes, own), FloodChanges::default());
        }
    }
}
