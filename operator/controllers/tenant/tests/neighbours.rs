//! Stories of TenantClusters among others: what belongs to one is not another's, also when one of them is gone.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a story that cannot go on fails")]

mod support;

use kube::Api;
use kube::api::{DeleteParams, PostParams};
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance};
use kubernest_crds::{AllocationOwner, NetworkAllocation, TenantCluster, conditions};
use kubernest_integration::wait_until;
use serde_json::json;
use support::*;

const NS: &str = "org-acme";
const NOWHERE: &str = "https://127.0.0.1:1";

async fn says(client: &kube::Client, name: &str, text: &str) {
    let said = wait_until(PATIENCE, || async {
        condition(&cluster(client, NS, name).await, conditions::READY)
            .1
            .contains(text)
    });
    assert!(said.await, "{:#?}", cluster(client, NS, name).await.status);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_a_host_name_stays_with_the_older_cluster() {
    let (_plane, admin) = outer().await;
    namespace(&admin, NS).await;
    let _operator = Operator::start(&admin, NOWHERE);
    let spec = |host: &str| json!({"version": "v1.35.4", "access": {"hostname": host}});
    create(&admin, NS, "a", spec("api.example.com")).await;
    create(&admin, NS, "b", spec("API.example.com")).await;
    says(
        &admin,
        "b",
        "spec.access.hostname: API.example.com belongs to another TenantCluster",
    )
    .await;
    wait_for_condition(&admin, NS, "a", conditions::PKI_READY).await;
    let taken: TenantCluster = cluster(&admin, NS, "b").await;
    assert_eq!(taken.status.unwrap().ingress, None, "no route");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_a_network_is_given_back_only_when_nobody_is_on_it() {
    let (_plane, admin) = outer().await;
    namespace(&admin, NS).await;
    let allocations = Api::<NetworkAllocation>::all(admin.clone());
    // One whose cluster lost its finalizer to somebody.
    let owner = AllocationOwner {
        namespace: NS.into(),
        name: "lost".into(),
        uid: "gone".into(),
    };
    let orphan = NetworkAllocation::take(5000, "127.64.99.0/24".into(), owner);
    allocations.create(&PostParams::default(), &orphan).await.unwrap();
    let _operator = Operator::start(&admin, NOWHERE);
    create(&admin, NS, "a", json!({"version": "v1.35.4"})).await;
    wait_for_condition(&admin, NS, "a", conditions::PKI_READY).await;
    assert!(allocations.get_opt("vni-5000").await.unwrap().is_none(), "the orphan");

    let stranger: VirtualMachineInstance = serde_json::from_value(json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": "stranger"},
        "spec": {
            "domain": {"devices": {"interfaces": [{"name": "tenant", "bridge": {}}]}},
            "networks": [{"name": "tenant", "multus": {"networkName": "a"}}],
        },
    }))
    .unwrap();
    let instances = Api::<VirtualMachineInstance>::namespaced(admin.clone(), NS);
    instances.create(&PostParams::default(), &stranger).await.unwrap();
    clusters(&admin, NS)
        .delete("a", &DeleteParams::default())
        .await
        .unwrap();
    says(
        &admin,
        "a",
        "that users put on its network (stop or delete them) to be gone: stranger",
    )
    .await;
    let vni = cluster(&admin, NS, "a").await.status.unwrap().vni.unwrap();
    let held = allocations.get_opt(&NetworkAllocation::name_for(vni)).await.unwrap();
    assert!(held.is_some(), "nobody else may have the VNI yet");
    instances.delete("stranger", &DeleteParams::default()).await.unwrap();
    let gone = wait_until(PATIENCE, || async {
        clusters(&admin, NS).get_opt("a").await.unwrap().is_none()
    });
    assert!(gone.await, "{:#?}", cluster(&admin, NS, "a").await.status);
    assert!(allocations.list(&Default::default()).await.unwrap().items.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_a_cluster_keeps_a_version_that_is_offered_no_more() {
    let (_plane, admin) = outer().await;
    namespace(&admin, NS).await;
    let operator = Operator::start(&admin, NOWHERE);
    create(&admin, NS, "a", json!({"version": "v1.34.4", "nodePools": []})).await;
    wait_for_condition(&admin, NS, "a", conditions::PKI_READY).await;
    let machines = Api::<VirtualMachine>::namespaced(admin.clone(), NS);
    let image = |machine: VirtualMachine| json!(machine.spec.template.spec.volumes.unwrap()[0].container_disk);
    let before = image(machines.get("a-cp-0").await.unwrap());
    drop(operator);

    let mut options = options();
    options.node_images.0.remove("v1.34.4");
    let _operator = Operator::start_with(&admin, NOWHERE, options);
    let pools = json!({"spec": {"nodePools": [{"name": "more"}]}});
    let patch = kube::api::Patch::Merge(pools);
    clusters(&admin, NS)
        .patch("a", &Default::default(), &patch)
        .await
        .unwrap();
    let scaled = wait_until(PATIENCE, || async {
        machines.get_opt("a-more-0").await.unwrap().is_some()
    });
    assert!(scaled.await, "{:#?}", cluster(&admin, NS, "a").await.status);
    assert_eq!(image(machines.get("a-more-0").await.unwrap()), before);
    // A new cluster can't have it.
    create(&admin, NS, "b", json!({"version": "v1.34.4"})).await;
    says(&admin, "b", "spec.version: there is no node image for \"v1.34.4\"").await;
}
