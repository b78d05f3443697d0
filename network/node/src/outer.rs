//! What the agent reads from and writes to the outer cluster's API server: Nodes, the API server's own addresses,
//! NetworkAllocations; and the labels of its own Node. Nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt as _, Stream, TryStreamExt as _};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, ResourceExt as _};
use kubernest_crds::{NetworkAllocation, labels};
use kubernest_plan::Vni;
use serde_json::json;
use tokio::sync::watch;

use crate::accelerator::Accelerator;
use crate::attach::{Owner, Owners};
use crate::overlay::Nodes;

/// After a failure that only time or others can mend.
const AGAIN: Duration = Duration::from_secs(2);
/// Field manager of what the agent writes.
pub const FIELD_MANAGER: &str = "kubernest-node";
/// KubeVirt's label of nodes that machines can run on; launcher pods select it.
pub const SCHEDULABLE: &str = "kubevirt.io/schedulable";
/// What machines on the node run with: `kvm` or `tcg`. A label, so that pods may select it.
pub const ACCELERATOR: &str = "kubernest.io/accelerator";
/// Annotation: what the accelerator probe said.
pub const ACCELERATOR_REASON: &str = "kubernest.io/accelerator-reason";

/// Follows the Nodes of the cluster, until dropped.
pub async fn follow_nodes(client: Client, own: String, to: watch::Sender<Option<Nodes>>) {
    let events = watcher(Api::<Node>::all(client), watcher::Config::default()).default_backoff();
    let mut addresses = Followed::new("Nodes");
    addresses
        .run(events, address, |addresses| {
            let Some(own) = addresses.get(&own).copied().flatten() else {
                tracing::error!(
                    node = own,
                    "this Node has no InternalIP of IPv4: set the kubelet's --node-ip"
                );
                return;
            };
            let all = addresses.values().copied().flatten().collect();
            to.send_if_modified(|known| replace(known, Nodes { own, all }));
        })
        .await;
}

/// Follows the addresses of the outer API server (the Service `kubernetes` and what it leads to), until dropped.
pub async fn follow_api(client: Client, to: watch::Sender<Option<BTreeSet<SocketAddrV4>>>) {
    let services = Api::<Service>::namespaced(client.clone(), "default");
    // Its address never changes: the API server makes the Service at its start and keeps it.
    let service = loop {
        match services.get("kubernetes").await {
            Ok(service) => break service_addresses(&service),
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "read Service kubernetes; trying again"
                );
                tokio::time::sleep(AGAIN).await;
            }
        }
    };
    let slices = Api::<EndpointSlice>::namespaced(client, "default");
    let label = watcher::Config::default().labels("kubernetes.io/service-name=kubernetes");
    let slices = watcher(slices, label).default_backoff();
    let told = |found: &BTreeMap<String, BTreeSet<SocketAddrV4>>| {
        let all = found.values().flatten().chain(&service).copied().collect();
        to.send_if_modified(|known| replace(known, all));
    };
    Followed::new("EndpointSlices of kubernetes")
        .run(slices, slice_addresses, told)
        .await;
}

/// Follows who holds which VNI, until dropped.
pub async fn follow_holders(client: Client, to: watch::Sender<Option<BTreeMap<Vni, Owner>>>) {
    let events = watcher(Api::<NetworkAllocation>::all(client), watcher::Config::default()).default_backoff();
    Followed::new("NetworkAllocations")
        .run(events, holder, |holders| {
            let all = holders.values().flatten().cloned().collect();
            to.send_if_modified(|known| replace(known, all));
        })
        .await;
}

fn replace<T: PartialEq>(known: &mut Option<T>, now: T) -> bool {
    let differs = known.as_ref() != Some(&now);
    *known = Some(now);
    differs
}

/// The little that is kept of watched objects, by name.
struct Followed<V> {
    what: &'static str,
    found: BTreeMap<String, V>,
    renewed: BTreeMap<String, V>,
    complete: bool,
}

impl<V: Clone> Followed<V> {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            found: BTreeMap::new(),
            renewed: BTreeMap::new(),
            complete: false,
        }
    }

    async fn run<K: kube::Resource>(
        &mut self,
        events: impl Stream<Item = watcher::Result<watcher::Event<K>>>,
        read: impl Fn(&K) -> V,
        changed: impl Fn(&BTreeMap<String, V>),
    ) {
        let mut events = std::pin::pin!(events);
        loop {
            match events.try_next().await {
                Ok(None) => return,
                Ok(Some(event)) => {
                    self.take(event, &read);
                    if self.complete {
                        changed(&self.found);
                    }
                }
                // The watcher tries again by itself, more and more rarely.
                Err(error) => {
                    tracing::warn!(
                        what = self.what,
                        error = &error as &dyn std::error::Error,
                        "watch failed; trying again"
                    );
                }
            }
        }
    }

    fn take<K: kube::Resource>(&mut self, event: watcher::Event<K>, read: impl Fn(&K) -> V) {
        match event {
            watcher::Event::Apply(object) => drop(self.found.insert(object.name_any(), read(&object))),
            watcher::Event::Delete(object) => drop(self.found.remove(&object.name_any())),
            watcher::Event::Init => self.renewed.clear(),
            watcher::Event::InitApply(object) => drop(self.renewed.insert(object.name_any(), read(&object))),
            watcher::Event::InitDone => {
                self.found = std::mem::take(&mut self.renewed);
                self.complete = true;
            }
        }
    }
}

/// The first InternalIP of IPv4.
fn address(node: &Node) -> Option<Ipv4Addr> {
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    addresses
        .iter()
        .filter(|address| address.type_ == "InternalIP")
        .find_map(|address| address.address.parse().ok())
}

fn service_addresses(service: &Service) -> BTreeSet<SocketAddrV4> {
    let Some(spec) = &service.spec else {
        return BTreeSet::new();
    };
    let ips = spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse().ok());
    let ports: Vec<_> = spec
        .ports
        .iter()
        .flatten()
        .filter_map(|port| u16::try_from(port.port).ok())
        .collect();
    pairs(ips, &ports)
}

fn slice_addresses(slice: &EndpointSlice) -> BTreeSet<SocketAddrV4> {
    // Also those that are not ready: they may be in a moment.
    let ips = slice
        .endpoints
        .iter()
        .flat_map(|endpoint| &endpoint.addresses)
        .filter_map(|ip| ip.parse().ok());
    let ports: Vec<_> = slice
        .ports
        .iter()
        .flatten()
        .filter_map(|port| u16::try_from(port.port?).ok())
        .collect();
    pairs(ips, &ports)
}

fn pairs(ips: impl Iterator<Item = Ipv4Addr>, ports: &[u16]) -> BTreeSet<SocketAddrV4> {
    ips.flat_map(|ip| ports.iter().map(move |port| SocketAddrV4::new(ip, *port)))
        .collect()
}

/// What the agent says of its own Node: that machines can run there, and with what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// What they run with.
    pub accelerator: Accelerator,
    /// What the accelerator probe said.
    pub reason: String,
    /// They can have processors of their own.
    pub processors: bool,
}

/// Says it.
///
/// # Errors
/// When the API server refuses or is away.
pub async fn publish(client: Client, node: &str, mark: &Mark) -> kube::Result<()> {
    let accelerator = mark.accelerator.as_str();
    let processors = mark.processors.to_string();
    let patch = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node,
            "labels": {
                SCHEDULABLE: "true", ACCELERATOR: accelerator,
                labels::CPU_MANAGER: processors, labels::CPU_MANAGER_BEFORE: processors,
            },
            "annotations": {ACCELERATOR: accelerator, ACCELERATOR_REASON: mark.reason},
        },
    });
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    Api::<Node>::all(client)
        .patch(node, &parameters, &Patch::Apply(patch))
        .await
        .map(drop)
}

/// Who holds which VNI by an allocation. The name is what makes it unique; a spec of another VNI would be somebody's forgery.
fn holder(allocation: &NetworkAllocation) -> Option<(Vni, Owner)> {
    let vni = Vni::try_from(allocation.spec.vni).ok()?;
    let owner = &allocation.spec.owner;
    (allocation.name_any() == vni.allocation()).then(|| {
        let owner = Owner {
            namespace: owner.namespace.clone(),
            uid: owner.uid.clone(),
        };
        (vni, owner)
    })
}

/// Owners of tenant networks, from NetworkAllocations. Asked for at each attachment, so that nothing is allowed by an
/// allocation of the past.
pub struct Allocations(pub Client);

impl Owners for Allocations {
    fn owner(&self, vni: Vni) -> BoxFuture<'_, Result<Option<Owner>, Box<dyn std::error::Error + Send + Sync>>> {
        async move {
            let api = Api::<NetworkAllocation>::all(self.0.clone());
            let found = api.get_opt(&vni.allocation()).await?;
            Ok(found.as_ref().and_then(holder).map(|(_, owner)| owner))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn outer_reads_addresses_of_ipv4_only() {
        let node: Node = from(json!({"status": {"addresses": [
            {"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "fd00::1"},
            {"type": "InternalIP", "address": "192.0.2.1"}]}}));
        assert_eq!(address(&node), Some(Ipv4Addr::new(192, 0, 2, 1)));
        assert_eq!(address(&Node::default()), None);
        let service: Service =
            from(json!({"spec": {"clusterIPs": ["10.96.0.1", "fd00::2"], "ports": [{"port": 443}]}}));
        assert_eq!(service_addresses(&service), ["10.96.0.1:443".parse().unwrap()].into());
        let slice: EndpointSlice = from(json!({"metadata": {}, "addressType": "IPv4", "ports": [{"port": 6443}],
            "endpoints": [{"addresses": ["192.0.2.1"]}, {"addresses": ["192.0.2.2"], "conditions": {"ready": false}}]}));
        assert_eq!(slice_addresses(&slice).len(), 2);
    }

    #[test]
    fn outer_forgets_nothing_while_a_watch_begins_anew() {
        let node = |name: &str| from::<Node>(json!({"metadata": {"name": name}}));
        let mut followed = Followed::new("Nodes");
        let read = |node: &Node| node.name_any();
        let take = |followed: &mut Followed<String>, event| followed.take(event, read);
        take(&mut followed, watcher::Event::Init);
        take(&mut followed, watcher::Event::InitApply(node("a")));
        assert!(!followed.complete);
        take(&mut followed, watcher::Event::InitDone);
        take(&mut followed, watcher::Event::Apply(node("b")));
        take(&mut followed, watcher::Event::Init);
        assert_eq!(
            followed.found.len(),
            2,
            "the old state holds until the new one is whole"
        );
        take(&mut followed, watcher::Event::InitApply(node("b")));
        take(&mut followed, watcher::Event::InitDone);
        assert_eq!(followed.found.keys().collect::<Vec<_>>(), ["b"]);
        take(&mut followed, watcher::Event::Delete(node("b")));
        assert!(followed.complete && followed.found.is_empty());
    }
}
