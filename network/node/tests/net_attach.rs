//! Attaching pods for real: two "nodes" and their "pods" are network namespaces of this machine, the rest is what runs in
//! a cluster. Needs root.

#![allow(clippy::unwrap_used, reason = "tests")]

mod stage;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use kubernest_node::attach::AttachError;
use kubernest_plan::Refused;
use serde_json::json;
use stage::Stage;

fn ip(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

const MAC_A: &str = "02:00:10:01:00:0a";
const MAC_B: &str = "02:00:10:01:00:14";

#[tokio::test]
async fn net_tenant_nodes_on_two_nodes_reach_each_other_and_other_tenants_do_not() {
    let mut stage = Stage::new("t", 2).await;
    let a = stage.pod(0, "a");
    let b = stage.pod(1, "b");
    let c = stage.pod(1, "c");
    stage.add_l2(&a, "tap1", 4097, MAC_A, "org-acme").await.unwrap();
    stage.add_l2(&b, "tap1", 4097, MAC_B, "org-acme").await.unwrap();
    // The other tenant uses the same addresses, down to the MAC.
    stage.add_l2(&c, "tap1", 4098, MAC_B, "org-bmce").await.unwrap();
    let guest_a = stage.guest(&a, "tap1", MAC_A, ip("100.64.0.10"));
    let guest_b = stage.guest(&b, "tap1", MAC_B, ip("100.64.0.20"));
    let guest_c = stage.guest(&c, "tap1", MAC_B, ip("100.64.0.30"));

    assert!(stage.ping(&guest_a, ip("100.64.0.20")), "over VXLAN");
    assert!(
        stage.ping_bytes(&guest_a, ip("100.64.0.20"), 1450 - 28),
        "with packets as large as the MTU"
    );
    assert!(!stage.ping(&guest_a, ip("100.64.0.30")), "another VNI");
    assert!(!stage.ping(&guest_c, ip("100.64.0.10")), "another VNI");
    assert!(!stage.ping(&guest_c, ip("100.64.0.20")), "another VNI on the same node");

    // A node that is gone gets no copies any more, one that comes gets them.
    stage.set_nodes(0, &[0]).await;
    let fdb = |stage: &Stage| stage.in_node(0, "bridge fdb show dev kn-x4097").unwrap();
    assert!(!fdb(&stage).contains("00:00:00:00:00:00"), "{}", fdb(&stage));
    stage.set_nodes(0, &[0, 1]).await;
    assert!(
        fdb(&stage).contains("00:00:00:00:00:00 dst 198.51.100.2"),
        "{}",
        fdb(&stage)
    );
    assert!(stage.ping(&guest_b, ip("100.64.0.10")));

    drop((guest_a, guest_b, guest_c));
    for pod in [&a, &b, &c] {
        stage.del(pod, "tap1").await.unwrap();
        stage.del(pod, "tap1").await.unwrap();
        assert_eq!(stage.in_pod(pod, "nft list ruleset").unwrap(), "");
        assert_eq!(stage.devices_of(&pod.netns), ["eth0", "lo"]);
    }
    for node in 0..2 {
        assert_eq!(
            stage.devices_of(&stage.nodes[node].netns),
            ["eth0", "lo"],
            "node {node}"
        );
        assert_eq!(stage.records(node), 0);
    }
}

#[tokio::test]
async fn net_guest_may_use_only_its_own_mac() {
    let mut stage = Stage::new("m", 1).await;
    let (a, b) = (stage.pod(0, "a"), stage.pod(0, "b"));
    stage.add_l2(&a, "tap1", 4097, MAC_A, "org-acme").await.unwrap();
    stage.add_l2(&b, "tap1", 4097, MAC_B, "org-acme").await.unwrap();
    let guest_b = stage.guest(&b, "tap1", MAC_B, ip("100.64.0.20"));
    let honest = stage.guest(&a, "tap1", MAC_A, ip("100.64.0.10"));
    assert!(stage.ping(&honest, ip("100.64.0.20")));
    drop(honest);
    let liar = stage.guest(&a, "tap1", "02:00:10:01:00:63", ip("100.64.0.11"));
    assert!(!stage.ping(&liar, ip("100.64.0.20")));
    drop((liar, guest_b));
    // Neither node nor pod hears or speaks on a tenant's wire.
    let guest = stage.guest(&a, "tap1", MAC_A, ip("100.64.0.10"));
    assert!(!stage.ping(&guest, stage.nodes[0].ip), "the node's own address");
    assert!(
        stage.in_node(0, "ip -6 addr show dev kn-b4097").unwrap().is_empty(),
        "no address of the link on the bridge"
    );
}

#[tokio::test]
async fn net_pods_join_only_networks_of_their_namespace() {
    let mut stage = Stage::new("o", 1).await;
    let pod = stage.pod(0, "a");
    let refused = |result: Result<serde_json::Value, AttachError>| match result {
        Err(AttachError::Refused(refused)) => refused,
        other => panic!("{other:?}"),
    };
    let other = refused(stage.add_l2(&pod, "tap1", 4097, MAC_A, "org-bmce").await);
    assert!(matches!(other, Refused::NotYours { .. }), "{other}");
    let none = refused(stage.add_l2(&pod, "tap1", 5000, MAC_A, "org-acme").await);
    assert!(matches!(none, Refused::NotAllocated(_)), "{none}");
    let large = stage
        .add(&pod, "tap1", stage::l2(4097, MAC_A, 1451), "org-acme")
        .await
        .unwrap_err();
    assert!(large.to_string().contains("at most 1450"), "{large}");
    assert_eq!(stage.devices_of(&pod.netns), ["eth0", "lo"]);
    assert_eq!(stage.devices_of(&stage.nodes[0].netns), ["eth0", "lo"]);
}

#[tokio::test]
async fn net_a_network_that_changes_hands_while_a_pod_joins_it_is_left_again() {
    let mut stage = Stage::new("h", 1).await;
    let pod = stage.pod(0, "a");
    stage.told.gives_once_asked(4097, "org-acme", "next-uid");
    let late = stage.add_l2(&pod, "tap1", 4097, MAC_A, "org-acme").await;
    assert!(matches!(late, Err(AttachError::ChangedHands(_))), "{late:?}");
    assert_eq!(stage.devices_of(&pod.netns), ["eth0", "lo"]);
    assert_eq!(stage.devices_of(&stage.nodes[0].netns), ["eth0", "lo"]);
}

#[tokio::test]
async fn net_a_machine_that_outlives_its_tenant_never_meets_the_next_one() {
    let mut stage = Stage::new("s", 1).await;
    let (own, stays) = (stage.pod(0, "a"), stage.pod(0, "b"));
    let networks_and_cables = async |stage: &Stage| stage.nodes[0].attacher.overlay().census().await.unwrap();
    stage.add_l2(&stays, "tap1", 4097, MAC_B, "org-acme").await.unwrap();
    // As long as its tenant holds the network it stays, also when what is known is behind.
    let holders = stage.told.all();
    for known in [holders, BTreeMap::new()] {
        stage.nodes[0].attacher.unplug_strangers(&known).await.unwrap();
        assert_eq!(stage.ports_of(0, "kn-b4097"), 2, "the cable and the VXLAN device");
    }
    // The tenant goes, and another of the same namespace gets its VNI.
    stage.told.gives(4097, "org-acme", "next-uid");
    stage.add_l2(&own, "tap1", 4097, MAC_A, "org-acme").await.unwrap();
    assert_eq!(networks_and_cables(&stage).await, (1, 2));
    let holders = stage.told.all();
    stage.nodes[0].attacher.unplug_strangers(&holders).await.unwrap();
    assert_eq!(networks_and_cables(&stage).await, (1, 1));
    let guest = stage.guest(&own, "tap1", MAC_A, ip("100.64.0.10"));
    let stranger = stage.guest(&stays, "tap1", MAC_B, ip("100.64.0.20"));
    assert!(!stage.ping(&stranger, ip("100.64.0.10")));
    assert!(!stage.ping(&guest, ip("100.64.0.20")));
    assert_eq!(stage.records(0), 1);
    // Its pod ends as any other.
    stage.del(&stays, "tap1").await.unwrap();
    stage.del(&own, "tap1").await.unwrap();
    assert_eq!(stage.devices_of(&stage.nodes[0].netns), ["eth0", "lo"]);
}

#[tokio::test]
async fn net_masquerade_leads_to_the_guest_and_keeps_it_in() {
    let mut stage = Stage::new("q", 1).await;
    let pod = stage.pod(0, "a");
    stage.api(&["203.0.113.5:6443"]);
    let config = json!({"cniVersion": "1.0.0", "mode": "masquerade"});
    let result = stage.add(&pod, "tap0", config.clone(), "org-acme").await.unwrap();
    assert_eq!(result["interfaces"][0]["name"], "tap0");
    // The same call again, as after an answer that was lost.
    stage.add(&pod, "tap0", config, "org-acme").await.unwrap();
    let guest = stage.guest(&pod, "tap0", "02:00:00:00:00:02", ip("10.0.2.2"));
    let listening = stage.listen(&guest.netns, ip("10.0.2.2"), 6443);
    let health = stage.listen(&pod.netns, Ipv4Addr::UNSPECIFIED, 49080);
    let api = stage.listen(&stage.outside(), ip("203.0.113.5"), 6443);
    let web = stage.listen(&stage.outside(), ip("203.0.113.5"), 80);
    let cloud = stage.listen(&stage.outside(), ip("169.254.169.254"), 80);

    assert_eq!(
        stage.reaches(&stage.outside(), pod.ip, 6443),
        "listener 10.0.2.2:6443",
        "inwards to the guest"
    );
    assert_eq!(
        stage.reaches(&stage.outside(), pod.ip, 49080),
        "listener 0.0.0.0:49080",
        "the launcher's own port"
    );
    assert_eq!(
        stage.reaches(&guest.netns, ip("203.0.113.5"), 80),
        "listener 203.0.113.5:80",
        "outwards"
    );
    assert!(stage.ping(&guest, ip("10.0.2.1")), "its router");
    for (what, address, port) in [
        ("launcher by the router's address", ip("10.0.2.1"), 49080),
        ("launcher by the pod's address", pod.ip, 49080),
        ("outer API server", ip("203.0.113.5"), 6443),
        ("cloud metadata", ip("169.254.169.254"), 80),
    ] {
        assert!(stage.connect(&guest.netns, address, port).is_err(), "guest to {what}");
    }
    assert!(
        stage.connect(&pod.netns, ip("203.0.113.5"), 6443).is_err(),
        "launcher to the outer API server"
    );
    assert!(
        stage.connect(&pod.netns, ip("169.254.169.254"), 80).is_err(),
        "launcher to cloud metadata"
    );

    // The API server moves: the ban follows it.
    let moved = stage.listen(&stage.outside(), ip("203.0.113.5"), 7443);
    stage.reaches(&guest.netns, ip("203.0.113.5"), 7443);
    let in_pod = stage.process_in(&pod.netns);
    stage.api(&["203.0.113.5:7443"]);
    stage.nodes[0]
        .attacher
        .refresh_outer_api(&["203.0.113.5:7443".parse().unwrap()].into())
        .await
        .unwrap();
    assert!(stage.connect(&guest.netns, ip("203.0.113.5"), 7443).is_err());
    stage.reaches(&guest.netns, ip("203.0.113.5"), 6443);

    // A guest that takes another address is not heard.
    drop(guest);
    let liar = stage.guest(&pod, "tap0", "02:00:00:00:00:02", ip("10.0.2.3"));
    assert!(stage.connect(&liar.netns, ip("203.0.113.5"), 80).is_err());

    drop((liar, listening, health, api, web, cloud, moved, in_pod));
    stage.del(&pod, "tap0").await.unwrap();
    assert_eq!(stage.in_pod(&pod, "nft list ruleset").unwrap(), "");
    assert_eq!(stage.devices_of(&pod.netns), ["eth0", "lo"]);
    assert_eq!(stage.records(0), 0);
}

#[tokio::test]
async fn net_masquerade_listed_ports_only() {
    let mut stage = Stage::new("p", 1).await;
    let pod = stage.pod(0, "a");
    let ports = json!([{"port": 6443, "protocol": "TCP"}]);
    let config = json!({"cniVersion": "1.0.0", "mode": "masquerade", "args": {"cni": {"ports": ports}}});
    stage.add(&pod, "tap0", config, "org-acme").await.unwrap();
    let guest = stage.guest(&pod, "tap0", "02:00:00:00:00:02", ip("10.0.2.2"));
    let _listening = [6443, 22].map(|port| stage.listen(&guest.netns, ip("10.0.2.2"), port));
    stage.reaches(&stage.outside(), pod.ip, 6443);
    assert!(stage.connect(&stage.outside(), pod.ip, 22).is_err());
}

#[tokio::test]
async fn net_masquerade_answers_for_the_pods_own_address_only() {
    let mut stage = Stage::new("w", 1).await;
    let pod = stage.pod(0, "a");
    let config = json!({"cniVersion": "1.0.0", "mode": "masquerade"});
    stage.add(&pod, "tap0", config, "org-acme").await.unwrap();
    let guest = stage.guest(&pod, "tap0", "02:00:00:00:00:02", ip("10.0.2.2"));
    let _listening = stage.listen(&guest.netns, Ipv4Addr::UNSPECIFIED, 6443);
    let node = stage.nodes[0].netns.clone();
    let on_the_wire = |address: Ipv4Addr| {
        let found = stage.in_node(0, &format!("ip neigh show {address} dev pod-a"));
        found.unwrap().contains("lladdr")
    };
    stage.reaches(&stage.outside(), pod.ip, 6443);
    assert!(on_the_wire(pod.ip));
    // Addresses of others, as they are looked for where all pods are on one wire.
    let mac = stage.in_pod(&pod, "cat /sys/class/net/eth0/address").unwrap();
    for other in ["10.0.2.1", "10.0.2.2", "10.244.0.99"].map(ip) {
        let route = format!("ip route add {other} dev pod-a src {}", stage.nodes[0].ip);
        stage.in_node(0, &route).unwrap();
        assert!(stage.connect(&node, other, 6443).is_err(), "{other}");
        assert!(!on_the_wire(other), "ARP for {other}");
        let known = format!("ip neigh replace {other} dev pod-a nud permanent lladdr {}", mac.trim());
        stage.in_node(0, &known).unwrap();
        assert!(stage.connect(&node, other, 6443).is_err(), "the guest for {other}");
    }
    stage.reaches(&stage.outside(), pod.ip, 6443);
}

#[tokio::test]
async fn net_masquerade_on_a_network_of_ones_choice() {
    let mut stage = Stage::new("c", 1).await;
    let pod = stage.pod(0, "a");
    let config =
        |network: &str| json!({"cniVersion": "1.0.0", "mode": "masquerade", "args": {"cni": {"network": network}}});
    // Those that the pod needs for itself are refused, and nothing is left of the attempt.
    let own = format!("{}/30", Ipv4Addr::from_bits(pod.ip.to_bits() & !3));
    stage.api(&["10.96.0.1:443"]);
    for network in [own.as_str(), "10.244.0.0/16", "10.0.0.0/8", "10.96.0.0/24"] {
        let refused = stage.add(&pod, "tap0", config(network), "org-acme").await.unwrap_err();
        assert!(
            matches!(refused, AttachError::Refused(Refused::Taken { .. })),
            "{refused}"
        );
        assert!(
            refused.to_string().contains("choose another vmNetworkCIDR"),
            "{refused}"
        );
    }
    assert_eq!(stage.devices_of(&pod.netns), ["eth0", "lo"]);
    assert_eq!(stage.records(0), 0);

    let free = config("192.168.7.0/29");
    stage.add(&pod, "tap0", free.clone(), "org-acme").await.unwrap();
    stage.add(&pod, "tap0", free, "org-acme").await.unwrap();
    let guest = stage.guest(&pod, "tap0", "02:00:00:00:00:02", ip("192.168.7.2"));
    let _listening = stage.listen(&guest.netns, ip("192.168.7.2"), 6443);
    let _web = stage.listen(&stage.outside(), ip("203.0.113.5"), 80);
    assert_eq!(
        stage.reaches(&stage.outside(), pod.ip, 6443),
        "listener 192.168.7.2:6443",
        "inwards to the guest"
    );
    stage.reaches(&guest.netns, ip("203.0.113.5"), 80);
    assert!(stage.ping(&guest, ip("192.168.7.1")), "its router");
    let health = stage.listen(&pod.netns, Ipv4Addr::UNSPECIFIED, 49080);
    assert!(
        stage.connect(&guest.netns, ip("192.168.7.1"), 49080).is_err(),
        "the launcher"
    );
    drop((guest, health));
    let liar = stage.guest(&pod, "tap0", "02:00:00:00:00:02", ip("192.168.7.3"));
    assert!(
        stage.connect(&liar.netns, ip("203.0.113.5"), 80).is_err(),
        "another address"
    );
}

#[tokio::test]
async fn net_both_kinds_in_one_pod() {
    let mut stage = Stage::new("b", 2).await;
    let (a, b) = (stage.pod(0, "a"), stage.pod(1, "b"));
    for (pod, mac) in [(&a, MAC_A), (&b, MAC_B)] {
        stage
            .add(
                pod,
                "tap0",
                json!({"cniVersion": "1.0.0", "mode": "masquerade"}),
                "org-acme",
            )
            .await
            .unwrap();
        stage.add_l2(pod, "tap1", 4097, mac, "org-acme").await.unwrap();
    }
    // br_netfilter shows bridged frames to the rules of routed packets; those of masquerade must not drop them.
    let guest_a = stage.guest(&a, "tap1", MAC_A, ip("100.64.0.10"));
    let _guest_b = stage.guest(&b, "tap1", MAC_B, ip("100.64.0.20"));
    assert!(stage.ping(&guest_a, ip("100.64.0.20")));
}

#[tokio::test]
async fn net_vxlan_is_heard_from_nodes_only() {
    let mut stage = Stage::new("v", 2).await;
    let (a, b) = (stage.pod(0, "a"), stage.pod(1, "b"));
    stage.add_l2(&a, "tap1", 4097, MAC_A, "org-acme").await.unwrap();
    stage.add_l2(&b, "tap1", 4097, MAC_B, "org-acme").await.unwrap();
    let guest_a = stage.guest(&a, "tap1", MAC_A, ip("100.64.0.10"));
    let _guest_b = stage.guest(&b, "tap1", MAC_B, ip("100.64.0.20"));
    // A VXLAN device learns the senders of what it takes; guests say things of their own, so counting would not do.
    let heard = |stage: &Stage| {
        stage
            .in_node(0, "bridge fdb show dev kn-x4097")
            .unwrap()
            .contains(stage::FORGED_SENDER)
    };
    let to = stage.nodes[0].ip;
    // Any host of the nodes' network that is no node.
    stage.forge_vxlan(&stage.outside(), to, 4097);
    // A pod, on its own node and on another one.
    stage.forge_vxlan(&a.netns, to, 4097);
    stage.forge_vxlan(&b.netns, to, 4097);
    // A pod that claims the other node's address.
    stage
        .in_pod(&a, &format!("ip addr add {}/32 dev lo", stage.nodes[1].ip))
        .unwrap();
    stage.forge_vxlan_from(&a.netns, stage.nodes[1].ip, to, 4097);
    assert!(!heard(&stage));
    // The same frames from a node are heard: the forgery itself is right.
    stage.forge_vxlan(&stage.nodes[1].netns, to, 4097);
    stage.until("the forgery to be heard", heard);
    assert!(stage.ping(&guest_a, ip("100.64.0.20")));
}

#[tokio::test]
async fn net_leftovers_are_collected() {
    let mut stage = Stage::new("g", 1).await;
    let (a, b) = (stage.pod(0, "a"), stage.pod(0, "b"));
    stage.add_l2(&a, "tap1", 4097, MAC_A, "org-acme").await.unwrap();
    stage.add_l2(&b, "tap1", 4098, MAC_B, "org-bmce").await.unwrap();
    // The pod's namespace goes without DEL, as when a runtime loses it.
    stage.drop_netns(&a.netns);
    stage.until("the cable to go", |stage| stage.ports_of(0, "kn-b4097") == 1);
    let gone = stage.nodes[0].attacher.overlay().collect().await.unwrap();
    assert_eq!(gone.into_iter().map(u32::from).collect::<Vec<_>>(), [4097]);
    // DEL comes late and without a namespace.
    stage.del_without_netns(&a, "tap1").await.unwrap();
    let left = stage.devices_of(&stage.nodes[0].netns);
    assert!(
        left.contains(&"kn-b4098".to_owned()) && !left.contains(&"kn-b4097".to_owned()),
        "{left:?}"
    );
}
