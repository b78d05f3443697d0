//! Addresses on the pod side of a masquerade interface (KubeVirt's defaults).

use std::net::Ipv4Addr;

/// The tap's address: the guest's router and DHCP server.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Net mask of both.
pub const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
