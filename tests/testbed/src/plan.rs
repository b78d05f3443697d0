//! Names and addresses of a bed: pure functions of its name, its slot and its number of nodes.
//!
//! A bed has one /16 of 10.240.0.0/12, picked by its slot, cut into nodes (`.0.0/24`), Services (`.64.0/20`) and pods
//! (`.128.0/17`, a /24 per node). It deliberately does not look at the machine: who holds which slot is [`crate::state`]'s.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// Slots are the /16 networks of 10.240.0.0/12.
pub const SLOTS: u8 = 16;
/// Nodes have addresses `.0.10` and up, pods networks `.128.0/24` and up: 64 is far above what one machine holds.
pub const MAX_NODES: usize = 64;
/// Names go into namespaces, cgroups and host names of nodes.
const MAX_NAME: usize = 20;

/// Why a bed cannot be planned.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The name is not a short DNS label.
    #[error(
        "the name {0:?} of a bed must be 1 to {MAX_NAME} of a-z, 0-9 and -, beginning with a letter and not ending in -"
    )]
    Name(String),
    /// The number of nodes is out of range.
    #[error("a bed has 1 to {MAX_NODES} nodes, not {0}")]
    Nodes(usize),
    /// There is no such node.
    #[error("there is no node {asked}: this bed has {nodes}, counted from 0")]
    NoSuchNode {
        /// The index that was asked for.
        asked: usize,
        /// How many nodes there are.
        nodes: usize,
    },
}

/// What a bed is; everything else about it follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    name: String,
    slot: u8,
    nodes: usize,
    volumes: usize,
    #[serde(default)]
    static_cpus: Option<usize>,
}

/// A process group of a bed: the unit that is started, watched and killed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// etcd, kube-apiserver, kube-controller-manager, kube-scheduler and the volume recycler.
    Control,
    /// containerd, kubelet, kube-proxy and, below them, the pods of one node.
    Node(usize),
}

impl Plan {
    /// Checks the name and numbers. `volumes` is the number of PersistentVolumes per node.
    pub fn new(name: &str, slot: u8, nodes: usize, volumes: usize) -> Result<Self, Error> {
        check_name(name)?;
        if nodes == 0 || nodes > MAX_NODES {
            return Err(Error::Nodes(nodes));
        }
        Ok(Self {
            name: name.into(),
            slot: slot % SLOTS,
            nodes,
            volumes,
            static_cpus: None,
        })
    }

    /// The same with more nodes, and no fewer volumes.
    pub fn grown(&self, nodes: usize, volumes: usize) -> Result<Self, Error> {
        let volumes = volumes.max(self.volumes);
        Ok(Self::new(&self.name, self.slot, nodes, volumes)?.with_static_cpus(self.static_cpus))
    }

    /// The same with a node whose kubelet gives processors to one container alone (CPU manager policy `static`).
    pub fn with_static_cpus(self, static_cpus: Option<usize>) -> Self {
        Self { static_cpus, ..self }
    }

    /// Which node that is, if the bed has it. Kubelets don't change their policy, so it is the same for a bed's life.
    pub fn static_cpus(&self) -> Option<usize> {
        self.static_cpus.filter(|node| *node < self.nodes)
    }

    /// The bed's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bed's slot, 0 to 15.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// How many nodes the bed has.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// PersistentVolumes per node.
    pub fn volumes(&self) -> usize {
        self.volumes
    }

    /// All groups, the control plane first.
    pub fn groups(&self) -> Vec<Group> {
        std::iter::once(Group::Control)
            .chain((0..self.nodes).map(Group::Node))
            .collect()
    }

    /// Refuses a node that the bed does not have.
    pub fn check_node(&self, asked: usize) -> Result<(), Error> {
        if asked < self.nodes {
            Ok(())
        } else {
            Err(Error::NoSuchNode {
                asked,
                nodes: self.nodes,
            })
        }
    }

    /// The Kubernetes name of node `i`.
    pub fn node_name(&self, i: usize) -> String {
        format!("{}-n{i}", self.name)
    }

    /// The network namespace of a group; the control plane's holds the bridge as well.
    pub fn netns(&self, group: Group) -> String {
        format!("{}{}", netns_prefix(&self.name), group.short())
    }

    /// The link in the machine's own network namespace that reaches the bed.
    pub fn host_link(&self) -> String {
        format!("kntb{}", self.slot)
    }

    /// The alias of [`Self::host_link`], by which leftovers of a bed are told from those of another.
    pub fn host_link_alias(&self) -> String {
        link_alias(&self.name)
    }

    /// The bridge port of node `i`, in the control plane's namespace.
    pub fn port(&self, i: usize) -> String {
        format!("n{i}")
    }

    /// The API server's address on the bridge.
    pub fn control_ip(&self) -> Ipv4Addr {
        self.ip(0, 1)
    }

    /// The machine's own address on the bridge.
    pub fn host_ip(&self) -> Ipv4Addr {
        self.ip(0, 254)
    }

    /// The address of node `i`.
    pub fn node_ip(&self, i: usize) -> Ipv4Addr {
        self.ip(0, 10 + u8::try_from(i).unwrap_or(u8::MAX))
    }

    /// The network of node `i`'s pods.
    pub fn pod_cidr(&self, i: usize) -> String {
        format!("{}/24", self.ip(128 + u8::try_from(i).unwrap_or(u8::MAX), 0))
    }

    /// The network of all pods.
    pub fn cluster_cidr(&self) -> String {
        format!("{}/17", self.ip(128, 0))
    }

    /// The network of Services.
    pub fn service_cidr(&self) -> String {
        format!("{}/20", self.ip(64, 0))
    }

    /// The address of the Service `kubernetes`.
    pub fn api_service_ip(&self) -> Ipv4Addr {
        self.ip(64, 1)
    }

    /// The address of the cluster's DNS Service.
    pub fn dns_ip(&self) -> Ipv4Addr {
        self.ip(64, 10)
    }

    /// Where the API server is reached from the machine, the nodes and the pods.
    pub fn api_url(&self) -> String {
        format!("https://{}:6443", self.control_ip())
    }

    fn ip(&self, third: u8, fourth: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 240 + self.slot, third, fourth)
    }
}

impl Group {
    /// `hub` or `n<i>`: the last part of names of namespaces.
    pub fn short(self) -> String {
        match self {
            Group::Control => "hub".into(),
            Group::Node(i) => format!("n{i}"),
        }
    }

    /// `control` or `node-<i>`: the name of the group's directory and cgroup.
    pub fn dir(self) -> String {
        match self {
            Group::Control => "control".into(),
            Group::Node(i) => format!("node-{i}"),
        }
    }
}

/// Refuses names that do not fit namespaces, cgroups and host names.
pub fn check_name(name: &str) -> Result<(), Error> {
    let label = name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if label && name.len() <= MAX_NAME && name.starts_with(|c: char| c.is_ascii_lowercase()) && !name.ends_with('-') {
        Ok(())
    } else {
        Err(Error::Name(name.into()))
    }
}

/// All network namespaces of a bed begin like this. The dot is in no bed's name, so no bed's prefix is another's.
pub fn netns_prefix(name: &str) -> String {
    format!("kntb.{name}.")
}

/// The cgroup, below the root of each hierarchy, that holds all of a bed's processes.
pub fn cgroup(name: &str) -> String {
    format!("kntb.{name}")
}

/// See [`Plan::host_link_alias`].
pub fn link_alias(name: &str) -> String {
    format!("kubernest-testbed {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_names_and_addresses_follow_from_name_and_slot() {
        let plan = Plan::new("dev", 3, 2, 12).unwrap();
        assert_eq!(plan.api_url(), "https://10.243.0.1:6443");
        assert_eq!(plan.node_ip(1).to_string(), "10.243.0.11");
        assert_eq!(plan.pod_cidr(1), "10.243.129.0/24");
        assert_eq!(plan.netns(Group::Node(1)), "kntb.dev.n1");
        assert_eq!(plan.groups().len(), 3);
    }

    #[test]
    fn plan_refuses_names_that_do_not_fit() {
        for name in ["", "Dev", "a.b", "1a", "a-", "a/b", "a-name-that-is-far-too-long"] {
            assert_eq!(check_name(name), Err(Error::Name(name.into())));
        }
    }

    #[test]
    fn plan_refuses_nodes_that_are_not_there() {
        assert_eq!(Plan::new("dev", 0, 0, 1), Err(Error::Nodes(0)));
        let plan = Plan::new("dev", 0, 2, 1).unwrap();
        assert_eq!(plan.clone().with_static_cpus(Some(1)).static_cpus(), Some(1));
        assert_eq!(plan.clone().with_static_cpus(Some(2)).static_cpus(), None);
        assert_eq!(plan.check_node(2), Err(Error::NoSuchNode { asked: 2, nodes: 2 }));
    }
}
