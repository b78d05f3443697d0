//! What the agent reads and writes at the outer API server, on a real one (etcd and kube-apiserver, no kubelet: the test
//! makes the Nodes).

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt as _};
use kubernest_crds::{AllocationOwner, NetworkAllocation};
use kubernest_integration::{ControlPlane, install_crds};
use kubernest_node::accelerator::Accelerator;
use kubernest_node::attach::Owners as _;
use kubernest_node::outer::{self, Allocations, Mark};
use serde_json::json;
use tokio::sync::watch;

const PATIENCE: Duration = Duration::from_secs(20);

async fn node(client: &Client, name: &str, ip: &str) {
    let nodes = Api::<Node>::all(client.clone());
    let new = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
    nodes.create(&PostParams::default(), &new).await.unwrap();
    let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": ip}]}});
    nodes
        .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
        .await
        .unwrap();
}

async fn becomes<T>(seen: &mut watch::Receiver<Option<T>>, what: &str, is_so: impl Fn(&T) -> bool) {
    let so = seen.wait_for(|now| now.as_ref().is_some_and(&is_so));
    let so = tokio::time::timeout(PATIENCE, so).await;
    assert!(so.is_ok_and(|so| so.is_ok()), "waited for {what}");
}

#[tokio::test]
async fn net_agent_and_the_outer_api_server() {
    let server = ControlPlane::start().await.unwrap();
    let client = server.client().await.unwrap();
    install_crds(&client).await.unwrap();

    // Nodes come and go.
    node(&client, "n1", "192.0.2.1").await;
    let (to, mut nodes) = watch::channel(None);
    let following = tokio::spawn(outer::follow_nodes(client.clone(), "n1".into(), to));
    becomes(&mut nodes, "its own Node", |now: &kubernest_node::overlay::Nodes| {
        now.all.len() == 1
    })
    .await;
    node(&client, "n2", "192.0.2.2").await;
    becomes(&mut nodes, "a second Node", |now| {
        now.all.len() == 2 && now.own.octets()[3] == 1
    })
    .await;
    Api::<Node>::all(client.clone())
        .delete("n2", &DeleteParams::default())
        .await
        .unwrap();
    becomes(&mut nodes, "the second Node to go", |now| now.all.len() == 1).await;
    following.abort();

    // The API server's addresses. This one listens on the loopback device and so does not announce itself.
    let (to, mut api) = watch::channel(None);
    let following = tokio::spawn(outer::follow_api(client.clone(), to));
    let slices = Api::<EndpointSlice>::namespaced(client.clone(), "default");
    let slice = json!({
        "metadata": {"name": "test", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": "IPv4", "ports": [{"port": 6443}], "endpoints": [{"addresses": ["192.0.2.9"]}],
    });
    slices
        .create(&PostParams::default(), &serde_json::from_value(slice).unwrap())
        .await
        .unwrap();
    let has = |now: &BTreeSet<std::net::SocketAddrV4>, end: &str| now.iter().any(|api| api.to_string().ends_with(end));
    becomes(&mut api, "Service and endpoint", |now| {
        has(now, "192.0.2.9:6443") && has(now, ":443")
    })
    .await;
    slices.delete("test", &DeleteParams::default()).await.unwrap();
    becomes(&mut api, "the endpoint to go", |now| {
        !has(now, "192.0.2.9:6443") && has(now, ":443")
    })
    .await;
    following.abort();

    // Owners of networks.
    let owner = AllocationOwner {
        namespace: "org-acme".into(),
        name: "a".into(),
        uid: "1".into(),
    };
    let allocations = Api::<NetworkAllocation>::all(client.clone());
    let taken = NetworkAllocation::take(4097, "100.64.0.0/24".into(), owner.clone());
    allocations.create(&PostParams::default(), &taken).await.unwrap();
    let owners = Allocations(client.clone());
    let known = owners.owner(4097.try_into().unwrap()).await.unwrap().unwrap();
    assert_eq!((known.namespace.as_str(), known.uid.as_str()), ("org-acme", "1"));
    assert_eq!(owners.owner(4098.try_into().unwrap()).await.unwrap(), None);
    // An object whose name and spec disagree gives nobody anything.
    let mut forged = NetworkAllocation::take(4099, "100.64.2.0/24".into(), owner);
    forged.metadata.name = Some("vni-5000".into());
    if allocations.create(&PostParams::default(), &forged).await.is_ok() {
        assert_eq!(owners.owner(5000.try_into().unwrap()).await.unwrap(), None);
    }
    // They are followed, too.
    let (to, mut holders) = watch::channel(None);
    let following = tokio::spawn(outer::follow_holders(client.clone(), to));
    let vni = 4097.try_into().unwrap();
    becomes(&mut holders, "the holder", |now| {
        now.len() == 1 && now.get(&vni) == Some(&known)
    })
    .await;
    allocations.delete("vni-4097", &DeleteParams::default()).await.unwrap();
    becomes(&mut holders, "the holder to go", BTreeMap::is_empty).await;
    following.abort();

    // Its own Node; a second time nothing is written.
    let mark = Mark {
        accelerator: Accelerator::Tcg,
        reason: "no /dev/kvm".into(),
        processors: true,
    };
    let marked = async || {
        outer::publish(client.clone(), "n1", &mark).await.unwrap();
        Api::<Node>::all(client.clone()).get("n1").await.unwrap()
    };
    let first = marked().await;
    assert_eq!(first.labels()["kubevirt.io/schedulable"], "true");
    assert_eq!(first.labels()["kubernest.io/accelerator"], "tcg");
    for label in ["kubevirt.io/cpumanager", "cpumanager"] {
        assert_eq!(first.labels()[label], "true");
    }
    assert_eq!(first.annotations()["kubernest.io/accelerator-reason"], "no /dev/kvm");
    assert_eq!(marked().await.resource_version(), first.resource_version());
}
