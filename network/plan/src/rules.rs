//! nft rules (nftables 1.0, `man nft`) that keep guest, launcher, node and tenants apart. Each function gives a whole
//! script for `nft -f -`, which the kernel takes as one transaction: afterwards either all of it holds or nothing changed.
//!
//! Rules are written as text because text is what people audit. Everything put into it is an address, a number or a
//! [`TapName`], so that no caller can add a rule of its own. Nothing is executed here.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::{Ipv4Addr, SocketAddrV4};

use crate::cni::Ports;
use crate::guest::GuestNetwork;
use crate::names::{BRIDGE_PREFIX, Mac, POD_BRIDGE_PREFIX, TapName};
use crate::{LAUNCHER_HEALTH_PORT, LAUNCHER_TLS_PORT, POD_INTERFACE, VXLAN_PORT};

/// The table of a node: `inet` family.
pub const NODE_TABLE: &str = "kubernest";
/// Link-local IPv4: clouds serve their metadata and credentials there (RFC 3927).
pub const LINK_LOCAL: &str = "169.254.0.0/16";

/// Rules in the network namespace of a node.
///
/// VXLAN is taken only from nodes, on the interface that leads to the claimed sender; whatever is merely forwarded to its
/// port (pods, guests) is dropped, whoever it says it is. Tenant bridges are wires: nothing of theirs enters the node's own
/// stack or leaves them into it, nor is it tracked, so that no rule of the outer cluster (kube-proxy's, where br_netfilter
/// passes it bridged frames) translates it.
pub fn node(nodes: &BTreeSet<Ipv4Addr>) -> String {
    let elements = elements(nodes);
    format!(
        r#"table inet {NODE_TABLE} {{
}}
delete table inet {NODE_TABLE}
table inet {NODE_TABLE} {{
  set nodes {{
    type ipv4_addr
{elements}  }}
  chain prerouting {{
    type filter hook prerouting priority raw; policy accept;
    iifname "{BRIDGE_PREFIX}*" notrack accept
    udp dport {VXLAN_PORT} ip saddr != @nodes counter drop
    udp dport {VXLAN_PORT} fib saddr . iif oif missing counter drop
    meta nfproto ipv6 udp dport {VXLAN_PORT} counter drop
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname "{BRIDGE_PREFIX}*" counter drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname "{BRIDGE_PREFIX}*" oifname "{BRIDGE_PREFIX}*" accept
    iifname "{BRIDGE_PREFIX}*" counter drop
    oifname "{BRIDGE_PREFIX}*" counter drop
    udp dport {VXLAN_PORT} counter drop
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    oifname "{BRIDGE_PREFIX}*" counter drop
  }}
}}
"#
    )
}

/// Rules of a masquerade attachment, in the pod's network namespace.
///
/// What reaches `eth0` for an address of `eth0`, on the ports asked for, goes to the guest: neither what strays there nor
/// what is meant for the tap's address, which may be another pod's outside. What the guest sends leaves with the pod's
/// address. The guest speaks to the pod itself only for DHCP and ping, and neither it nor the launcher reaches `outer_api` (the API
/// server of the outer cluster) or link-local addresses.
pub fn masquerade(tap: &TapName, network: GuestNetwork, ports: &Ports, outer_api: &BTreeSet<SocketAddrV4>) -> String {
    let (table, guest) = (tap.table(), network.guest());
    let api: BTreeSet<_> = outer_api
        .iter()
        .map(|api| format!("{} . {}", api.ip(), api.port()))
        .collect();
    let api = elements(&api);
    let dnat: String = inbound(ports)
        .iter()
        .map(|ports| {
            format!("    iifname \"{POD_INTERFACE}\" meta nfproto ipv4 fib daddr . iif type local {ports} dnat ip to {guest}\n")
        })
        .collect();
    format!(
        r#"table inet {table} {{
}}
delete table inet {table}
table inet {table} {{
  set outer_api {{
    type ipv4_addr . inet_service
{api}  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
{dnat}  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {network} oifname "{POD_INTERFACE}" masquerade
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname != "{tap}" accept
    udp sport 68 udp dport 67 accept
    ip saddr {guest} icmp type echo-request accept
    counter drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "{POD_BRIDGE_PREFIX}*" oifname "{POD_BRIDGE_PREFIX}*" accept
    jump forbidden
    iifname "{tap}" ip saddr != {guest} counter drop
    tcp flags syn tcp option maxseg size set rt mtu
    iifname "{tap}" oifname "{POD_INTERFACE}" ip saddr {guest} accept
    iifname "{POD_INTERFACE}" oifname "{tap}" ct state established,related accept
    iifname "{POD_INTERFACE}" oifname "{tap}" ct status dnat accept
    counter
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    jump forbidden
  }}
  chain forbidden {{
    ip daddr {LINK_LOCAL} counter drop
    ip daddr . tcp dport @outer_api counter drop
  }}
}}
"#
    )
}

/// Replaces the set of the outer API server's addresses in an attachment made by [`masquerade`].
pub fn outer_api(tap: &TapName, outer_api: &BTreeSet<SocketAddrV4>) -> String {
    let set = format!("inet {} outer_api", tap.table());
    let api: Vec<_> = outer_api
        .iter()
        .map(|api| format!("{} . {}", api.ip(), api.port()))
        .collect();
    let add = if api.is_empty() {
        String::new()
    } else {
        format!("add element {set} {{ {} }}\n", api.join(", "))
    };
    format!("flush set {set}\n{add}")
}

/// Rules of an attachment to a tenant's network, in the pod's network namespace: whatever the guest sends bears its own
/// slot's MAC address, also inside ARP, nobody else uses that address, and the bridge is a wire that the pod itself neither
/// hears nor speaks on.
pub fn l2(tap: &TapName, mac: Mac) -> String {
    let (table, cable, bridge) = (tap.table(), tap.cable(), tap.bridge());
    format!(
        r#"table inet {table} {{
}}
delete table inet {table}
table inet {table} {{
  chain prerouting {{
    type filter hook prerouting priority raw; policy accept;
    iifname "{bridge}" notrack accept
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname "{bridge}" counter drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname "{bridge}" oifname != "{bridge}" counter drop
    iifname != "{bridge}" oifname "{bridge}" counter drop
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    oifname "{bridge}" counter drop
  }}
}}
table bridge {table} {{
}}
delete table bridge {table}
table bridge {table} {{
  chain prerouting {{
    type filter hook prerouting priority filter; policy accept;
    iifname "{tap}" ether saddr != {mac} counter drop
    iifname "{tap}" ether type arp arp saddr ether != {mac} counter drop
    iifname "{cable}" ether saddr {mac} counter drop
  }}
}}
"#
    )
}

/// Takes away what [`masquerade`] and [`l2`] made for a tap, whichever of them it was, also when it is not there.
pub fn without(tap: &TapName) -> String {
    let table = tap.table();
    ["inet", "bridge"]
        .map(|family| format!("table {family} {table} {{\n}}\ndelete table {family} {table}\n"))
        .concat()
}

/// Matches for what is to reach the guest.
fn inbound(ports: &Ports) -> Vec<String> {
    match ports {
        Ports::All => vec![
            format!("tcp dport != {{ {LAUNCHER_HEALTH_PORT}, {LAUNCHER_TLS_PORT} }}"),
            "meta l4proto != tcp".into(),
        ],
        Ports::Listed { tcp, udp } => [("tcp", tcp), ("udp", udp)]
            .into_iter()
            .filter(|(_, ports)| !ports.is_empty())
            .map(|(protocol, ports)| format!("{protocol} dport {{ {} }}", join(ports)))
            .collect(),
    }
}

/// The `elements` line of a set; nft refuses an empty one.
fn elements<T: Display>(items: &BTreeSet<T>) -> String {
    if items.is_empty() {
        String::new()
    } else {
        format!("    elements = {{ {} }}\n", join(items))
    }
}

fn join<T: Display>(items: &BTreeSet<T>) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tap(name: &str) -> TapName {
        name.parse().unwrap()
    }

    fn api() -> BTreeSet<SocketAddrV4> {
        ["10.96.0.1:443", "192.0.2.10:6443"]
            .iter()
            .map(|addr| addr.parse().unwrap())
            .collect()
    }

    #[test]
    fn plan_rules_node() {
        insta::assert_snapshot!(node(
            &[Ipv4Addr::new(192, 0, 2, 10), Ipv4Addr::new(192, 0, 2, 11)].into()
        ));
    }

    #[test]
    fn plan_rules_node_alone_trusts_nobody() {
        assert!(!node(&BTreeSet::new()).contains("elements"));
    }

    #[test]
    fn plan_rules_masquerade_all_ports() {
        insta::assert_snapshot!(masquerade(&tap("tap0"), GuestNetwork::default(), &Ports::All, &api()));
    }

    #[test]
    fn plan_rules_masquerade_listed_ports() {
        let ports = Ports::Listed {
            tcp: [6443, 22].into(),
            udp: [53].into(),
        };
        insta::assert_snapshot!(masquerade(
            &tap("tap0"),
            GuestNetwork::default(),
            &ports,
            &BTreeSet::new()
        ));
    }

    #[test]
    fn plan_rules_masquerade_of_a_chosen_network() {
        let chosen = |network: &str| masquerade(&tap("tap0"), network.parse().unwrap(), &Ports::All, &api());
        let default = chosen("10.0.2.0/24");
        let moved = default.replace("10.0.2.", "192.168.7.").replace("/24", "/29");
        assert_eq!(chosen("192.168.7.0/29"), moved);
    }

    #[test]
    fn plan_rules_outer_api_moves() {
        insta::assert_snapshot!(outer_api(&tap("tap0"), &api()));
        assert_eq!(
            outer_api(&tap("tap0"), &BTreeSet::new()),
            "flush set inet kubernest-tap0 outer_api\n"
        );
    }

    #[test]
    fn plan_rules_l2() {
        insta::assert_snapshot!(l2(&tap("tap1"), "02:00:10:01:00:0a".parse().unwrap()));
    }

    #[test]
    fn plan_rules_without() {
        insta::assert_snapshot!(without(&tap("tap1")));
    }
}
