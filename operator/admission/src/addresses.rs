//! Rules of a tenant's address ranges: well-formed, of a size that the control plane accepts, and clear of each other
//! and of the ranges that the machines themselves use.

use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};

use crate::decision::{Report, reasons};

/// Link between a guest and its pod (KubeVirt's default for masquerade); the same in every guest.
pub const MACHINE_LINK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 2, 0), 24);

/// What a range is for, with the sizes it may have.
#[derive(Clone, Copy, Debug)]
pub struct Purpose {
    /// Shortest prefix length.
    pub shortest: u8,
    /// Why not shorter.
    pub too_large: &'static str,
    /// Longest prefix length.
    pub longest: u8,
    /// Why not longer.
    pub too_small: &'static str,
}

/// Range of pods. Nodes take a /24 each (kube-controller-manager `--node-cidr-mask-size`), and at most 2^16 of them.
pub const PODS: Purpose = Purpose {
    shortest: 8,
    too_large: "kube-controller-manager hands out at most 65536 ranges of /24",
    longest: 23,
    too_small: "each node takes a /24 of it, and there are at least two nodes",
};
/// Range of Services. kube-apiserver takes at most 20 bits (`cmd/kube-apiserver/app/options/validation.go`).
pub const SERVICES: Purpose = Purpose {
    shortest: 12,
    too_large: "kube-apiserver takes a /12 at most",
    longest: 26,
    too_small: "it would run out of Service addresses",
};

/// Reads the range in `field`, reporting what is wrong with it.
pub fn parse(report: &mut Report, field: &str, text: &str, purpose: Purpose) -> Option<Ipv4Net> {
    let net = match text.parse::<IpNet>() {
        Ok(IpNet::V4(net)) => net,
        Ok(IpNet::V6(_)) => {
            report.not_supported(field, format!("{text:?}: IPv6 is not supported yet"));
            return None;
        }
        Err(_) if text.parse::<std::net::Ipv6Addr>().is_ok() => {
            report.not_supported(field, format!("{text:?}: IPv6 is not supported yet"));
            return None;
        }
        Err(_) => {
            report.invalid(
                field,
                format!("{text:?} is not an address range; write it as 10.10.0.0/16"),
            );
            return None;
        }
    };
    let length = net.prefix_len();
    if net.addr() != net.network() {
        report.invalid(
            field,
            format!("{text:?} has bits set beyond its length; the range is {}", net.trunc()),
        );
    } else if length < purpose.shortest {
        report.invalid(
            field,
            format!(
                "{text:?} is too large, it must be a /{} at most: {}",
                purpose.shortest, purpose.too_large
            ),
        );
    } else if length > purpose.longest {
        report.invalid(
            field,
            format!(
                "{text:?} is too small, it must be a /{} at least: {}",
                purpose.longest, purpose.too_small
            ),
        );
    } else if let Some(special) = special(net) {
        report.invalid(field, format!("{text:?} overlaps {special}"));
    } else {
        return Some(net);
    }
    None
}

/// A range that no tenant can use, if `net` overlaps one (RFC 6890).
fn special(net: Ipv4Net) -> Option<&'static str> {
    const SPECIAL: [(Ipv4Addr, u8, &str); 5] = [
        (Ipv4Addr::new(0, 0, 0, 0), 8, "0.0.0.0/8, which means this host"),
        (Ipv4Addr::new(127, 0, 0, 0), 8, "the loopback range 127.0.0.0/8"),
        (Ipv4Addr::new(169, 254, 0, 0), 16, "the link-local range 169.254.0.0/16"),
        (Ipv4Addr::new(224, 0, 0, 0), 4, "the multicast range 224.0.0.0/4"),
        (Ipv4Addr::new(240, 0, 0, 0), 4, "the reserved range 240.0.0.0/4"),
    ];
    SPECIAL
        .into_iter()
        .find(|(addr, length, _)| overlaps(net, Ipv4Net::new_assert(*addr, *length)))
        .map(|s| s.2)
}

/// Whether two ranges share an address: one of them then contains the other.
pub fn overlaps(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// Reports `field` when its range overlaps that of `other`.
pub fn apart(report: &mut Report, field: &str, net: Option<Ipv4Net>, other: Option<Ipv4Net>, other_name: &str) {
    if let (Some(net), Some(other)) = (net, other)
        && overlaps(net, other)
    {
        report.add(
            reasons::INVALID,
            field,
            format!("\"{net}\" overlaps {other_name} {other}"),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("10.10.0.0/16", None)]
    #[case("10.10.0.0/33", Some("is not an address range"))]
    #[case("10.10.0.0", Some("is not an address range"))]
    #[case("", Some("is not an address range"))]
    #[case("10.10.1.0/16", Some("the range is 10.10.0.0/16"))]
    #[case("fd00::/48", Some("IPv6 is not supported yet"))]
    #[case("11.0.0.0/7", Some("bits set beyond"))]
    #[case("8.0.0.0/7", Some("too large"))]
    #[case("10.10.0.0/24", Some("too small"))]
    #[case("127.0.0.0/16", Some("loopback"))]
    fn pod_range_rules(#[case] text: &str, #[case] refused: Option<&str>) {
        let mut report = Report::default();
        let net = parse(&mut report, "f", text, PODS);
        let decision = report.decide(crate::decision::with_fields);
        assert_eq!(net.is_some(), refused.is_none());
        assert!(decision.message.contains(refused.unwrap_or("")), "{}", decision.message);
    }
}
