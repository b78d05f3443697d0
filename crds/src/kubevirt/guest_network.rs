//! The addresses on the guest's side of a masquerade interface: `vmNetworkCIDR` of the pod network.
//!
//! The network exists in one pod's namespace only, so any number of machines may have the same. Whether it is in the way
//! of that pod's own addresses is not known here.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::Ipv4Net;

/// Longest prefix that leaves a router and a guest (KubeVirt wants four addresses).
const LONGEST_PREFIX: u8 = 30;
/// Shortest prefix: no site has a larger network of its own (RFC 1918).
const SHORTEST_PREFIX: u8 = 8;
/// Networks whose addresses mean something else to every host (RFC 6890): "this" network, loopback, link-local; and all
/// from multicast on.
const RESERVED: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3),
];
/// KubeVirt's.
const DEFAULT: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 2, 0), 24);

/// A network of one guest and its router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestNetwork(Ipv4Net);

/// Why a text is no network for a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuestNetworkError {
    /// Go's words for it, which KubeVirt logs.
    #[error("invalid CIDR address: {0}")]
    Shape(String),
    /// Of the other family.
    #[error("{0} is not an IPv4 network")]
    Family(String),
    /// KubeVirt's words for it.
    #[error("less than 4 addresses on network")]
    TooSmall,
    /// A short prefix.
    #[error("the prefix must have at least {SHORTEST_PREFIX} bits")]
    TooLarge,
    /// Of special meaning.
    #[error("overlaps {0}, whose addresses no guest can have")]
    Reserved(Ipv4Net),
}

impl GuestNetwork {
    /// The tap's address: the guest's router and DHCP server.
    pub fn gateway(self) -> Ipv4Addr {
        self.nth(1)
    }

    /// The guest's address.
    pub fn guest(self) -> Ipv4Addr {
        self.nth(2)
    }

    /// Net mask of both.
    pub fn mask(self) -> Ipv4Addr {
        self.0.netmask()
    }

    /// Whether both have an address in common.
    pub fn overlaps(self, other: Ipv4Net) -> bool {
        self.0.contains(&other) || other.contains(&self.0)
    }

    // Every network that is let in has four addresses.
    fn nth(self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.0.network().to_bits().saturating_add(n))
    }
}

impl Default for GuestNetwork {
    fn default() -> Self {
        Self(DEFAULT)
    }
}

impl fmt::Display for GuestNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for GuestNetwork {
    type Err = GuestNetworkError;

    /// Bits below the prefix are taken for zeroes, as KubeVirt does.
    fn from_str(text: &str) -> Result<Self, GuestNetworkError> {
        let network = match text.parse() {
            Ok(ipnet::IpNet::V4(network)) => network.trunc(),
            Ok(ipnet::IpNet::V6(_)) => return Err(GuestNetworkError::Family(text.to_owned())),
            Err(_) => return Err(GuestNetworkError::Shape(text.to_owned())),
        };
        if network.prefix_len() > LONGEST_PREFIX {
            return Err(GuestNetworkError::TooSmall);
        }
        if network.prefix_len() < SHORTEST_PREFIX {
            return Err(GuestNetworkError::TooLarge);
        }
        let wanted = Self(network);
        match RESERVED.into_iter().find(|reserved| wanted.overlaps(*reserved)) {
            Some(reserved) => Err(GuestNetworkError::Reserved(reserved)),
            None => Ok(wanted),
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("10.0.2.0/24", "10.0.2.0/24 10.0.2.1 10.0.2.2 255.255.255.0")]
    #[case("10.10.10.7/24", "10.10.10.0/24 10.10.10.1 10.10.10.2 255.255.255.0")]
    #[case("192.168.7.252/30", "192.168.7.252/30 192.168.7.253 192.168.7.254 255.255.255.252")]
    #[case("10.0.0.0/8", "10.0.0.0/8 10.0.0.1 10.0.0.2 255.0.0.0")]
    fn guest_network_reads(#[case] text: &str, #[case] expected: &str) {
        let network: GuestNetwork = text.parse().unwrap();
        let (gateway, guest, mask) = (network.gateway(), network.guest(), network.mask());
        assert_eq!(format!("{network} {gateway} {guest} {mask}"), expected);
    }

    #[rstest]
    #[case("", "invalid CIDR address: ")]
    #[case("abc", "invalid CIDR address: abc")]
    #[case("10.0.2.0", "invalid CIDR address: 10.0.2.0")]
    #[case("10.0.2.0/33", "invalid CIDR address: 10.0.2.0/33")]
    #[case("10.0.2.0/31", "less than 4 addresses on network")]
    #[case("10.0.0.0/7", "the prefix must have at least 8 bits")]
    #[case("fd10:0:2::/120", "fd10:0:2::/120 is not an IPv4 network")]
    #[case("127.0.1.0/24", "overlaps 127.0.0.0/8, whose addresses no guest can have")]
    #[case("169.254.169.0/24", "overlaps 169.254.0.0/16, whose addresses no guest can have")]
    #[case("169.0.0.0/8", "overlaps 169.254.0.0/16, whose addresses no guest can have")]
    #[case("255.255.255.0/24", "overlaps 224.0.0.0/3, whose addresses no guest can have")]
    fn guest_network_refuses(#[case] text: &str, #[case] message: &str) {
        assert_eq!(text.parse::<GuestNetwork>().unwrap_err().to_string(), message);
    }

    #[test]
    fn guest_network_is_kubevirts_by_default() {
        assert_eq!(GuestNetwork::default(), "10.0.2.0/24".parse().unwrap());
    }
}
