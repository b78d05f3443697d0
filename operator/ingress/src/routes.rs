//! Which host name leads to which address: a pure function of all TenantClusters.
//!
//! It deliberately knows nothing of HAProxy but the form of a map's value.

use std::collections::{BTreeMap, BTreeSet};

use kubernest_crds::{SlotRole, TenantCluster, TenantClusterStatus};

/// Host name (lower case) → `address:port`, the value that HAProxy's map holds.
pub type Routes = BTreeMap<String, String>;

/// A host name that a younger cluster asks for although an older one has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The host name.
    pub host: String,
    /// `namespace/name` of the cluster that doesn't get it.
    pub loser: String,
}

/// The routes of all clusters that have one and a control plane to lead to. Of two that ask for one host name the older
/// wins, running or not, so that nobody can take over a name that is served; the name decides between clusters of the same
/// second.
pub fn routes<'a>(clusters: impl IntoIterator<Item = &'a TenantCluster>) -> (Routes, Vec<Conflict>) {
    let mut clusters: Vec<_> = clusters.into_iter().collect();
    clusters.sort_by(|a, b| b.is_senior_to(a).cmp(&a.is_senior_to(b)));
    let (mut taken, mut routes, mut conflicts) = (BTreeSet::new(), Routes::new(), Vec::new());
    for cluster in clusters {
        let Some(status) = &cluster.status else { continue };
        let Some(route) = &status.ingress else { continue };
        let host = route.host.to_ascii_lowercase();
        let valid = !host.is_empty()
            && host
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
        let Ok(address) = route.address.parse::<std::net::Ipv4Addr>() else {
            continue;
        };
        if !valid {
            continue;
        }
        if !taken.insert(host.clone()) {
            let meta = &cluster.metadata;
            let (namespace, name) = (meta.namespace.as_deref(), meta.name.as_deref());
            conflicts.push(Conflict {
                host,
                loser: format!("{}/{}", namespace.unwrap_or_default(), name.unwrap_or_default()),
            });
            continue;
        }
        if runs(status) {
            routes.insert(host, format!("{address}:{}", route.port));
        }
    }
    (routes, conflicts)
}

/// Whether the Service has a machine behind it. Without one kube-proxy answers the connection's first packet with an ICMP
/// error, on which HAProxy 2.6 spins until the packet is sent again, a second of a whole processor at each attempt: the
/// socket is polled as failed (its error queue holds the ICMP message since Linux 5.9) while connect(2) says EALREADY.
fn runs(status: &TenantClusterStatus) -> bool {
    let mut slots = status.slots.iter();
    slots.any(|slot| slot.role == SlotRole::ControlPlane && slot.machine_ready)
}

/// A change of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A host name that was not there.
    Add(String, String),
    /// A host name that leads elsewhere now.
    Set(String, String),
    /// A host name that leads nowhere now.
    Delete(String),
}

/// What makes `actual` equal to `desired`.
pub fn changes(desired: &Routes, actual: &Routes) -> Vec<Change> {
    let gone = actual
        .keys()
        .filter(|host| !desired.contains_key(*host))
        .map(|host| Change::Delete(host.clone()));
    let wanted = desired.iter().filter_map(|(host, to)| match actual.get(host) {
        Some(now) if now == to => None,
        Some(_) => Some(Change::Set(host.clone(), to.clone())),
        None => Some(Change::Add(host.clone(), to.clone())),
    });
    gone.chain(wanted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use kubernest_crds::{IngressRoute, Slot, TenantClusterSpec};

    fn cluster(name: &str, second: i64, host: &str, address: &str) -> TenantCluster {
        let spec: TenantClusterSpec = serde_json_spec();
        let mut cluster = TenantCluster::new(name, spec);
        cluster.metadata.namespace = Some("org".into());
        cluster.metadata.creation_timestamp = Some(Time(k8s_openapi::jiff::Timestamp::from_second(second).unwrap()));
        cluster.status = Some(TenantClusterStatus {
            ingress: Some(IngressRoute {
                host: host.into(),
                address: address.into(),
                port: 6443,
            }),
            slots: vec![slot(SlotRole::ControlPlane, true), slot(SlotRole::Worker, true)],
            ..TenantClusterStatus::default()
        });
        cluster
    }

    fn slot(role: SlotRole, machine_ready: bool) -> Slot {
        Slot {
            name: "a-0".into(),
            role,
            pool: "default".into(),
            ip: "100.64.0.10".into(),
            mac: "02:00:00:00:00:01".into(),
            machine_ready,
            node_ready: false,
        }
    }

    fn serde_json_spec() -> TenantClusterSpec {
        TenantClusterSpec {
            version: "v1.35.4".into(),
            control_plane: Default::default(),
            node_pools: Vec::new(),
            network: Default::default(),
            pki: Default::default(),
            access: Default::default(),
        }
    }

    #[test]
    fn ingress_the_older_cluster_keeps_its_host() {
        let old = cluster("b", 1, "X.example", "10.0.0.1");
        let young = cluster("a", 2, "x.example", "10.0.0.2");
        let (routes, conflicts) = routes([&young, &old]);
        assert_eq!(routes, Routes::from([("x.example".into(), "10.0.0.1:6443".into())]));
        assert_eq!(
            conflicts,
            [Conflict {
                host: "x.example".into(),
                loser: "org/a".into()
            }]
        );
    }

    #[test]
    fn ingress_a_cluster_without_a_running_control_plane_has_its_name_and_no_route() {
        let mut old = cluster("a", 1, "x.example", "10.0.0.1");
        let control_plane = |ready| vec![slot(SlotRole::ControlPlane, ready), slot(SlotRole::Worker, true)];
        old.status.as_mut().unwrap().slots = control_plane(false);
        let young = cluster("b", 2, "x.example", "10.0.0.2");
        let (none, conflicts) = routes([&old, &young]);
        assert_eq!((none, conflicts.len()), (Routes::new(), 1));
        old.status.as_mut().unwrap().slots = control_plane(true);
        let (some, _) = routes([&old, &young]);
        assert_eq!(some, Routes::from([("x.example".into(), "10.0.0.1:6443".into())]));
    }

    #[test]
    fn ingress_a_host_or_address_that_would_break_the_map_is_left_out() {
        let space = cluster("a", 1, "x y", "10.0.0.1");
        let name = cluster("b", 1, "x.example", "evil.example");
        assert_eq!(routes([&space, &name]).0, Routes::new());
    }

    #[test]
    fn ingress_changes_are_the_difference() {
        let map = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(a, b)| ((*a).into(), (*b).into()))
                .collect::<Routes>()
        };
        let desired = map(&[("a", "1"), ("b", "2"), ("c", "3")]);
        let actual = map(&[("b", "2"), ("c", "9"), ("d", "4")]);
        assert_eq!(
            changes(&desired, &actual),
            [
                Change::Delete("d".into()),
                Change::Add("a".into(), "1".into()),
                Change::Set("c".into(), "3".into())
            ]
        );
        assert!(changes(&desired, &desired).is_empty());
    }
}
