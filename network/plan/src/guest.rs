//! The guest's network behind masquerade: which may be asked for, and which is in the way of the pod's own addresses.
//!
//! It lives in the pod's namespace alone, so nobody else notices it. But a pod that has the addresses of those it talks to
//! on its tap answers the guest instead of them, and the kubelet never sees it ready.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::str::FromStr;

use ipnet::Ipv4Net;

use crate::cni::Refused;

/// KubeVirt's default.
const DEFAULT: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 2, 0), 24);
/// Prefix lengths that leave a router and a guest, and no more than a site has of its own (RFC 1918).
const PREFIXES: std::ops::RangeInclusive<u8> = 8..=30;
/// Networks that are something else to every host (RFC 6890): "this" network, loopback, link-local, multicast and all after.
const RESERVED: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// The network of a guest and its router, the tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestNetwork(Ipv4Net);

/// What the pod network's plugin gave a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodNetwork {
    /// Its addresses, with the prefix of their network.
    pub addresses: Vec<Ipv4Net>,
    /// Routers that it sends to.
    pub gateways: Vec<Ipv4Addr>,
    /// Networks that it has a route to, besides the one to everywhere.
    pub routes: Vec<Ipv4Net>,
}

impl GuestNetwork {
    /// The tap's address: the guest's router.
    pub fn gateway(self) -> Ipv4Addr {
        self.nth(1)
    }

    /// The guest's address.
    pub fn guest(self) -> Ipv4Addr {
        self.nth(2)
    }

    /// Length of the prefix.
    pub fn prefix(self) -> u8 {
        self.0.prefix_len()
    }

    /// Whether a pod with these addresses can have it, in a cluster whose API server is at `outer_api`: among those
    /// addresses is one of the Services' range, where the cluster's DNS is as well.
    ///
    /// The default is held against the pod's own address and routers only, without which nothing works: where pods have a
    /// network as wide as 10.0.0.0/8, machines that chose nothing run all the same.
    ///
    /// # Errors
    /// [`Refused::Taken`].
    pub fn clear_of(self, pod: &PodNetwork, outer_api: &BTreeSet<SocketAddrV4>) -> Result<(), Refused> {
        let single = |address: &Ipv4Addr| Ipv4Net::from(*address);
        let own = pod.addresses.iter().map(|own| single(&own.addr()));
        let own = own.chain(pod.gateways.iter().map(single));
        let around = pod.addresses.iter().chain(&pod.routes).map(Ipv4Net::trunc);
        let around = around.chain(outer_api.iter().map(|api| single(api.ip())));
        let around = around.filter(|_| self.0 != DEFAULT);
        match own.chain(around).find(|taken| overlap(&self.0, taken)) {
            None => Ok(()),
            Some(taken) => Err(Refused::Taken { network: self, taken }),
        }
    }

    // Every network that is let in has four addresses.
    fn nth(self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.0.network().to_bits().saturating_add(n))
    }
}

fn overlap(a: &Ipv4Net, b: &Ipv4Net) -> bool {
    a.contains(b) || b.contains(a)
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
    type Err = Refused;

    fn from_str(text: &str) -> Result<Self, Refused> {
        let network = text.parse::<Ipv4Net>().ok().filter(|network| {
            network.trunc() == *network
                && PREFIXES.contains(&network.prefix_len())
                && !RESERVED.iter().any(|reserved| overlap(network, reserved))
        });
        network.map(Self).ok_or_else(|| Refused::Network(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> PodNetwork {
        PodNetwork {
            addresses: vec!["10.244.1.5/24".parse().unwrap()],
            gateways: vec!["10.244.1.1".parse().unwrap()],
            routes: vec!["10.244.0.0/16".parse().unwrap(), "10.244.1.0/24".parse().unwrap()],
        }
    }

    #[test]
    fn plan_guest_network_gives_router_and_guest() {
        let network: GuestNetwork = "192.168.7.252/30".parse().unwrap();
        assert_eq!(
            (
                network.gateway().octets()[3],
                network.guest().octets()[3],
                network.prefix()
            ),
            (253, 254, 30)
        );
        let default = GuestNetwork::default();
        assert_eq!(default, "10.0.2.0/24".parse().unwrap());
        assert_eq!(
            (default.gateway(), default.guest()),
            ([10, 0, 2, 1].into(), [10, 0, 2, 2].into())
        );
    }

    /// Admission reads it too, of a crate that is too large for the CNI plugin: what that lets in and writes down is taken here,
    /// with the same addresses, and nothing else.
    #[test]
    fn plan_guest_network_is_the_one_that_admission_takes() {
        for prefix in 0..=32 {
            for first in ["0", "10", "100", "126", "127", "128", "169", "192", "223", "224", "255"] {
                for second in ["0", "2", "253", "254", "255"] {
                    let text = format!("{first}.{second}.0.0/{prefix}");
                    let admitted = text.parse::<kubernest_crds::kubevirt::v1::GuestNetwork>().ok();
                    let written = admitted.map_or_else(|| text.clone(), |network| network.to_string());
                    let taken = written.parse::<GuestNetwork>().ok();
                    let theirs = admitted.map(|network| (network.to_string(), network.gateway(), network.guest()));
                    let ours = taken.map(|network| (network.to_string(), network.gateway(), network.guest()));
                    assert_eq!(ours, theirs, "{text}");
                }
            }
        }
        assert_eq!(
            GuestNetwork::default().to_string(),
            kubernest_crds::kubevirt::v1::GuestNetwork::default().to_string()
        );
    }

    #[test]
    fn plan_guest_network_refuses_what_breaks_the_pod() {
        for text in [
            "",
            "x",
            "10.0.2.0",
            "10.0.2.5/24",
            "10.0.2.0/31",
            "10.0.0.0/7",
            "0.0.0.0/8",
            "127.0.0.0/24",
            "169.254.169.0/24",
            "169.0.0.0/8",
            "224.0.0.0/8",
            "255.255.255.0/24",
            "fd10::/64",
            "10.0.2.0/24; drop",
        ] {
            assert_eq!(
                text.parse::<GuestNetwork>(),
                Err(Refused::Network(text.to_owned())),
                "{text}"
            );
        }
    }

    #[test]
    fn plan_guest_network_stays_clear_of_the_pods_own() {
        let check =
            |network: &str, pod: &PodNetwork| network.parse::<GuestNetwork>().unwrap().clear_of(pod, &[].into());
        for free in ["10.0.2.0/24", "10.10.10.0/24", "192.168.0.0/16"] {
            assert_eq!(check(free, &pod()), Ok(()), "{free}");
        }
        for taken in ["10.244.1.0/24", "10.244.1.4/30", "10.244.9.0/24", "10.0.0.0/8"] {
            assert!(matches!(check(taken, &pod()), Err(Refused::Taken { .. })), "{taken}");
        }
    }

    #[test]
    fn plan_guest_network_of_machines_that_chose_none() {
        let wide = PodNetwork {
            addresses: vec!["10.9.1.5/8".parse().unwrap()],
            gateways: vec!["10.0.0.1".parse().unwrap()],
            routes: vec!["10.0.0.0/8".parse().unwrap()],
        };
        assert_eq!(GuestNetwork::default().clear_of(&wide, &[].into()), Ok(()));
        let chosen = "10.0.3.0/24".parse::<GuestNetwork>().unwrap();
        assert!(chosen.clear_of(&wide, &[].into()).is_err());
        let same = PodNetwork {
            gateways: vec!["10.0.2.1".parse().unwrap()],
            ..PodNetwork::default()
        };
        let refused = GuestNetwork::default()
            .clear_of(&same, &[].into())
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("10.0.2.0/24") && refused.contains("10.0.2.1"),
            "{refused}"
        );
    }

    #[test]
    fn plan_guest_network_stays_clear_of_the_outer_api() {
        let api = ["10.96.0.1:443", "10.0.2.15:6443"]
            .map(|api| api.parse().unwrap())
            .into();
        let check = |network: &str| network.parse::<GuestNetwork>().unwrap().clear_of(&pod(), &api);
        for taken in ["10.96.0.0/24", "10.96.0.0/30", "10.0.2.0/25"] {
            assert!(matches!(check(taken), Err(Refused::Taken { .. })), "{taken}");
        }
        for free in ["10.96.1.0/24", "192.168.7.0/29", "10.0.2.0/24"] {
            assert_eq!(check(free), Ok(()), "{free}");
        }
    }
}
