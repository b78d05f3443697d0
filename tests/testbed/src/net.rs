//! The bed's wires: a hub (the control plane's network namespace) with a bridge, and a namespace per node joined to it.
//!
//! The machine itself has one link and one address on that bridge and nothing else: no bridge, route or filter rule of
//! its own, so a firewall on the machine does not disturb the bed nor the bed the machine.

use std::path::{Path, PathBuf};

use crate::{
    plan::{self, Group, Plan},
    run::{self, run, run_fed, sh},
};

/// Why the network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A namespace could not be made or removed.
    #[error("cannot make or remove the network namespace {netns}")]
    Namespace {
        /// Its name.
        netns: String,
        /// Why.
        #[source]
        source: run::Error,
    },
    /// Links, addresses or routes could not be set.
    #[error("cannot set links and routes of {netns}")]
    Links {
        /// The namespace.
        netns: String,
        /// Why.
        #[source]
        source: run::Error,
    },
    /// A node's port could not be switched.
    #[error("cannot switch the port of node {node}")]
    Port {
        /// The node.
        node: usize,
        /// Why.
        #[source]
        source: run::Error,
    },
}

/// Where a named network namespace is reached.
pub fn netns_path(netns: &str) -> PathBuf {
    Path::new("/run/netns").join(netns)
}

/// Whether a group's namespace is there.
pub fn has_netns(plan: &Plan, group: Group) -> bool {
    netns_path(&plan.netns(group)).exists()
}

/// Makes the hub: bridge, the API server's address and the machine's link.
pub async fn ensure_hub(plan: &Plan) -> Result<(), Error> {
    let hub = plan.netns(Group::Control);
    if has_netns(plan, Group::Control) && link_exists(&plan.host_link()) {
        return Ok(());
    }
    remove_netns(&hub).await?;
    remove_host_link(plan).await?;
    add_netns(&hub).await?;
    let (ip, link) = (plan.control_ip(), plan.host_link());
    batch(
        &hub,
        &format!(
            "link set lo up\nlink add br0 type bridge\naddr add {ip}/24 dev br0\nlink set br0 up\n\
             route add unreachable default\nlink add host type veth peer name {link} netns 1\nlink set host master br0 up\n"
        ),
    )
    .await?;
    sysctl(&hub, "net/ipv4/ip_forward", "1").await?;
    let alias = plan.host_link_alias();
    run(&["ip", "link", "set", &link, "alias", &alias])
        .await
        .map_err(links(&hub))?;
    run_fed(
        &["ip", "-batch", "-"],
        format!("addr add {}/24 dev {link}\nlink set {link} up\n", plan.host_ip()).as_bytes(),
    )
    .await
    .map_err(links(&hub))?;
    Ok(())
}

/// Makes node `i`'s namespace and joins it to the hub. Its MAC is fixed, so that neighbours need not learn a new one
/// when a power-off makes a new namespace.
pub async fn ensure_node(plan: &Plan, i: usize) -> Result<(), Error> {
    let (hub, netns, port, ip) = (
        plan.netns(Group::Control),
        plan.netns(Group::Node(i)),
        plan.port(i),
        plan.node_ip(i),
    );
    if has_netns(plan, Group::Node(i)) {
        return Ok(());
    }
    add_netns(&netns).await?;
    let mac = format!("02:6b:6e:{:02x}:00:{i:02x}", plan.slot());
    run(&[
        "ip", "-n", &netns, "link", "add", "eth0", "address", &mac, "type", "veth", "peer", "name", &port, "netns",
        &hub,
    ])
    .await
    .map_err(links(&netns))?;
    batch(&hub, &format!("link set {port} master br0 up\n")).await?;
    batch(
        &netns,
        &format!(
            "link set lo up\naddr add {ip}/24 dev eth0\nlink set eth0 up\nroute add default via {}\n",
            plan.control_ip()
        ),
    )
    .await?;
    sysctl(&netns, "net/ipv4/ip_forward", "1").await
}

/// Routes every node's pods from the hub and from every other node that is there.
pub async fn ensure_routes(plan: &Plan) -> Result<(), Error> {
    for group in plan.groups() {
        let routes: String = (0..plan.nodes())
            .filter(|j| group != Group::Node(*j))
            .map(|j| format!("route replace {} via {}\n", plan.pod_cidr(j), plan.node_ip(j)))
            .collect();
        if has_netns(plan, group) {
            batch(&plan.netns(group), &routes).await?;
        }
    }
    Ok(())
}

/// Cuts (or joins) node `i`'s port of the bridge. The node's own link stays up, as when a switch further away fails.
pub async fn set_port(plan: &Plan, i: usize, joined: bool) -> Result<(), Error> {
    let state = if joined { "3" } else { "0" };
    run(&[
        "bridge",
        "-n",
        &plan.netns(Group::Control),
        "link",
        "set",
        "dev",
        &plan.port(i),
        "state",
        state,
    ])
    .await
    .map(drop)
    .map_err(|source| Error::Port { node: i, source })
}

/// Whether node `i`'s port forwards.
pub async fn port_joined(plan: &Plan, i: usize) -> bool {
    let hub = plan.netns(Group::Control);
    run(&["bridge", "-n", &hub, "link", "show", "dev", &plan.port(i)])
        .await
        .is_ok_and(|s| s.contains("state forwarding"))
}

/// Removes a network namespace with all its links; nothing to do is success.
pub async fn remove_netns(netns: &str) -> Result<(), Error> {
    if netns_path(netns).exists() {
        sh(&format!("ip netns del {netns}"))
            .await
            .map_err(|source| Error::Namespace {
                netns: netns.into(),
                source,
            })?;
    }
    Ok(())
}

/// Removes the machine's link to the bed, if the bed's it is.
pub async fn remove_host_link(plan: &Plan) -> Result<(), Error> {
    let link = plan.host_link();
    if host_links(plan.name()).contains(&link) {
        sh(&format!("ip link del {link}")).await.map_err(links("the machine"))?;
    }
    Ok(())
}

/// The machine's links that carry a bed's name.
pub fn host_links(name: &str) -> Vec<String> {
    let alias = plan::link_alias(name);
    let entries = std::fs::read_dir("/sys/class/net")
        .map(|d| d.flatten().collect::<Vec<_>>())
        .unwrap_or_default();
    entries
        .iter()
        .filter(|e| std::fs::read_to_string(e.path().join("ifalias")).is_ok_and(|a| a.trim() == alias))
        .filter_map(|e| e.file_name().into_string().ok())
        .collect()
}

/// A bed's namespaces that are there, by name.
pub fn namespaces(name: &str) -> Vec<String> {
    let prefix = plan::netns_prefix(name);
    let entries = std::fs::read_dir("/run/netns")
        .map(|d| d.flatten().collect::<Vec<_>>())
        .unwrap_or_default();
    entries
        .iter()
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|n| n.starts_with(&prefix))
        .collect()
}

/// The slots whose network the machine already uses for something.
pub async fn busy_slots() -> Vec<u8> {
    let routes = sh("ip -4 route show table all").await.unwrap_or_default();
    (0..plan::SLOTS)
        .filter(|slot| {
            let prefix = format!("10.{}.", 240 + slot);
            link_exists(&format!("kntb{slot}")) || routes.split_whitespace().any(|word| word.starts_with(&prefix))
        })
        .collect()
}

fn link_exists(link: &str) -> bool {
    Path::new("/sys/class/net").join(link).exists()
}

async fn add_netns(netns: &str) -> Result<(), Error> {
    sh(&format!("ip netns add {netns}"))
        .await
        .map(drop)
        .map_err(|source| Error::Namespace {
            netns: netns.into(),
            source,
        })
}

async fn batch(netns: &str, lines: &str) -> Result<(), Error> {
    if lines.is_empty() {
        return Ok(());
    }
    run_fed(&["ip", "-n", netns, "-batch", "-"], lines.as_bytes())
        .await
        .map(drop)
        .map_err(links(netns))
}

/// /proc/sys/net shows the network namespace of who opens it.
async fn sysctl(netns: &str, name: &str, value: &str) -> Result<(), Error> {
    let enter = format!("--net={}", netns_path(netns).display());
    let write = format!("echo {value} > /proc/sys/{name}");
    run(&["nsenter", &enter, "sh", "-c", &write])
        .await
        .map(drop)
        .map_err(links(netns))
}

fn links(netns: &str) -> impl FnOnce(run::Error) -> Error {
    let netns = netns.to_owned();
    move |source| Error::Links { netns, source }
}
