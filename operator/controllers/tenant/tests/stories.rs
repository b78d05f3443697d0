//! Stories of a TenantCluster against a real API server, with the tenant's real control plane where one is needed.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a story that cannot go on fails")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    core::v1::{ConfigMap, Namespace, Node, PersistentVolumeClaim, Secret, ServiceAccount},
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    runtime::reflector::ObjectRef,
};
use kubernest_crds::{NetworkAllocation, Phase, TenantCluster, conditions, kubevirt::v1::VirtualMachine, labels};
use kubernest_integration::wait_until;
use kubernest_tenant::tenantcluster::reconcile;
use serde_json::json;
use support::{
    PATIENCE, clusters, condition,
    faults::{Death, Fault},
    tenant,
    tenant::{Ports, Programs},
    *,
};

const NS: &str = "org-acme";
const NAME: &str = "customera";

async fn secret(client: &Client, name: &str) -> Secret {
    let api = Api::<Secret>::namespaced(client.clone(), NS);
    assert!(
        wait_until(PATIENCE, || async { api.get_opt(name).await.unwrap().is_some() }).await,
        "no Secret {name}"
    );
    api.get(name).await.unwrap()
}

fn value(secret: &Secret, key: &str) -> String {
    String::from_utf8(secret.data.as_ref().unwrap()[key].0.clone()).unwrap()
}

async fn machine_exists(client: &Client, name: &str) {
    let api = Api::<VirtualMachine>::namespaced(client.clone(), NS);
    assert!(
        wait_until(PATIENCE, || async { api.get_opt(name).await.unwrap().is_some() }).await,
        "no machine {name}"
    );
}

/// A slot's kubelet: asks for its certificates with what the bootstrap Secret holds, registers, says Ready.
async fn join(outer: &Client, ports: &Ports, slot: &str, ip: &str) {
    let bootstrap = secret(outer, &format!("{slot}-bootstrap")).await;
    let (ca, endpoint) = (value(&bootstrap, "ca.crt"), ports.endpoint());
    let (crt, key) = (
        value(&bootstrap, "kubelet-bootstrap.crt"),
        value(&bootstrap, "kubelet-bootstrap.key"),
    );
    let first = tenant::client_with(ca.as_bytes(), &crt, &key, &endpoint).await;
    let other = tenant::request_certificate(&first, &format!("{slot}-other"), "customera-cp-0", &[]).await;
    assert!(
        slot == "customera-cp-0" || other.is_none(),
        "{slot} got the control plane's certificate"
    );
    let (crt, key) = tenant::request_certificate(&first, &format!("{slot}-client"), slot, &[])
        .await
        .unwrap();
    let kubelet = tenant::client_with(ca.as_bytes(), &crt, &key, &endpoint).await;
    tenant::register(&kubelet, slot).await;
    let serving = tenant::request_certificate(&kubelet, &format!("{slot}-serving"), slot, &[slot, ip]).await;
    assert!(serving.is_some(), "{slot} got no serving certificate");
    let foreign = tenant::request_certificate(&kubelet, &format!("{slot}-foreign"), slot, &["127.64.0.99"]).await;
    assert!(foreign.is_none(), "{slot} got a certificate for another address");
}

async fn whole_life(version: &str) {
    let (plane, admin) = outer().await;
    namespace(&admin, NS).await;
    let writes = Fault::default();
    let config = Config::from_custom_kubeconfig(
        kube::config::Kubeconfig::read_from(plane.kubeconfig()).unwrap(),
        &kube::config::KubeConfigOptions::default(),
    )
    .await
    .unwrap();
    let ports = Ports::choose();
    let client = writes.client(config);
    let operator = Operator::start(&client, &ports.endpoint());
    let spec = |pools: serde_json::Value| json!({"version": version, "nodePools": pools});
    create(&admin, NS, NAME, spec(json!([{"name": "a", "labels": {"tier": "db"}}]))).await;

    // Machines of both roles at once, not one after the other.
    machine_exists(&admin, "customera-cp-0").await;
    machine_exists(&admin, "customera-a-0").await;
    let bootstrap = secret(&admin, "customera-cp-0-bootstrap").await;
    wait_for_condition(&admin, NS, NAME, conditions::PKI_READY).await;
    let (_, message) = condition(&cluster(&admin, NS, NAME).await, conditions::READY);
    assert!(message.contains("customera-cp-0"), "{message}");

    // The machine half starts them; the guest starts its programs.
    let mut programs = Programs::start(&bootstrap, &ports, version, 2);
    machine_runs(&admin, NS, "customera-cp-0", true).await;
    machine_runs(&admin, NS, "customera-a-0", true).await;
    let up = wait_until(PATIENCE, || async {
        condition(&cluster(&admin, NS, NAME).await, conditions::CONTROL_PLANE_READY).0 == "True"
    });
    let up = up.await;
    programs.assert_running();
    assert!(up, "{:#?}", cluster(&admin, NS, NAME).await.status);

    // Anonymous requests reach health and nothing else.
    let ca = value(&bootstrap, "ca.crt");
    assert!(!ca.is_empty());
    let kubeconfig = value(&secret(&admin, "customera-kubeconfig").await, "value");
    assert!(kubeconfig.contains("https://customera.org-acme.kubernest.local:6443"));
    let user = tenant::client(&kubeconfig, &ports.endpoint()).await;
    for (slot, ip) in [("customera-cp-0", "127.64.0.10"), ("customera-a-0", "127.64.0.20")] {
        join(&admin, &ports, slot, ip).await;
    }
    wait_for_condition(&admin, NS, NAME, conditions::NODES_READY).await;
    // Signing did not break the connection: kubelets wait for it.
    let uid = cluster(&admin, NS, NAME).await.uid().unwrap();
    assert_eq!(operator.context.view(&uid).unwrap().connections, 1);
    let node = Api::<Node>::all(user.clone()).get("customera-a-0").await.unwrap();
    assert_eq!(node.labels()["tier"], "db");
    assert_eq!(node.labels()["node-role.kubernetes.io/worker"], "");
    assert_eq!(node.labels()[labels::POOL], "a");

    // Add-ons are there; what controller manager and kubelets would do for CoreDNS, the test does.
    Api::<DaemonSet>::namespaced(user.clone(), "kube-system")
        .get("flannel")
        .await
        .unwrap();
    let deployments = Api::<Deployment>::namespaced(user.clone(), "kube-system");
    let running = json!({"status": {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1}});
    deployments
        .patch_status("coredns", &PatchParams::default(), &Patch::Merge(running))
        .await
        .unwrap();
    wait_for_condition(&admin, NS, NAME, conditions::READY).await;
    let ready = cluster(&admin, NS, NAME).await.status.unwrap();
    assert_eq!((ready.phase, ready.nodes.as_deref()), (Phase::Ready, Some("2/2")));
    assert_eq!(ready.version.as_deref(), Some(version));
    assert_eq!(
        ready.slots.iter().map(|slot| slot.ip.as_str()).collect::<Vec<_>>(),
        ["127.64.0.10", "127.64.0.20"]
    );

    rests(&admin, &operator, &writes).await;

    // Another operator takes over: what it has not seen yet is not lost, so the status never says so.
    let before = cluster(&admin, NS, NAME).await.resource_version();
    drop(operator);
    let operator = Operator::start(&client, &ports.endpoint());
    let looked = || async { operator.context.view(&uid).is_some_and(|view| view.listed) };
    assert!(wait_until(PATIENCE, looked).await, "{:?}", operator.context.view(&uid));
    rests(&admin, &operator, &writes).await;
    assert_eq!(cluster(&admin, NS, NAME).await.resource_version(), before);
    encrypts_secrets(&user, &programs, &ports).await;

    // Scale up: a new slot with the next address; its machine at once.
    let patch = |pools| Patch::Merge(json!({"spec": {"nodePools": pools}}));
    let two = patch(json!([{"name": "a", "replicas": 2, "labels": {"tier": "db"}}]));
    clusters(&admin, NS)
        .patch(NAME, &PatchParams::default(), &two)
        .await
        .unwrap();
    machine_exists(&admin, "customera-a-1").await;
    machine_runs(&admin, NS, "customera-a-1", true).await;
    join(&admin, &ports, "customera-a-1", "127.64.0.21").await;
    let full = wait_until(PATIENCE, || async {
        cluster(&admin, NS, NAME).await.status.unwrap().nodes.as_deref() == Some("3/3")
    });
    assert!(full.await, "{:#?}", cluster(&admin, NS, NAME).await.status);

    // Scale down: the highest ordinal goes, with node, machine, disk and Secret.
    let one = patch(json!([{"name": "a", "replicas": 1, "labels": {"tier": "db"}}]));
    clusters(&admin, NS)
        .patch(NAME, &PatchParams::default(), &one)
        .await
        .unwrap();
    let gone = wait_until(PATIENCE, || async {
        let left = dump(&admin, NS).await;
        let node = Api::<Node>::all(user.clone()).get_opt("customera-a-1").await.unwrap();
        node.is_none() && !left.keys().any(|name| name.contains("customera-a-1"))
    });
    assert!(gone.await, "{:?}", dump(&admin, NS).await.keys());
    wait_for_condition(&admin, NS, NAME, conditions::READY).await;

    // The other programs take their flags and do their work.
    programs.run("kube-controller-manager", &ports, version);
    programs.run("kube-scheduler", &ports, version);
    works(&user, &mut programs).await;

    // A machine that stops is seen, and seen again when it is back.
    machine_runs(&admin, NS, "customera-cp-0", false).await;
    let down = wait_until(PATIENCE, || async {
        cluster(&admin, NS, NAME).await.status.unwrap().phase == Phase::Degraded
    });
    assert!(down.await, "{:#?}", cluster(&admin, NS, NAME).await.status);
    machine_runs(&admin, NS, "customera-cp-0", true).await;
    wait_for_condition(&admin, NS, NAME, conditions::CONTROL_PLANE_READY).await;

    delete_and_wait(&admin, NS, NAME).await;
    assert_eq!(dump(&admin, NS).await, BTreeMap::new());
    drop(operator);
}

/// At rest nothing is written, not even when the controller is woken.
async fn rests(admin: &Client, operator: &Operator, writes: &Fault) {
    let version = || async { cluster(admin, NS, NAME).await.resource_version() };
    let settled = wait_until(PATIENCE, || async {
        let before = (writes.writes(), version().await);
        tokio::time::sleep(Duration::from_secs(1)).await;
        before == (writes.writes(), version().await)
    });
    assert!(settled.await, "it never comes to rest");
    let before = writes.writes();
    for _ in 0..3 {
        let cluster = ObjectRef::from_obj(&cluster(admin, NS, NAME).await);
        operator.context.wake.unbounded_send(cluster).unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(writes.writes(), before, "woken at rest, it wrote");
}

/// A tenant's Secret does not lie in its etcd as it was written.
async fn encrypts_secrets(user: &Client, programs: &Programs, ports: &Ports) {
    let secret: Secret = serde_json::from_value(json!({
        "metadata": {"name": "s"}, "stringData": {"password": "plain-text-to-be-searched"},
    }))
    .unwrap();
    Api::namespaced(user.clone(), "default")
        .create(&PostParams::default(), &secret)
        .await
        .unwrap();
    let plain: ConfigMap = serde_json::from_value(json!({
        "metadata": {"name": "c"}, "data": {"word": "other-text-to-be-searched"},
    }))
    .unwrap();
    Api::namespaced(user.clone(), "default")
        .create(&PostParams::default(), &plain)
        .await
        .unwrap();
    let _ = ports;
    let wal = programs.directory.path().join("data/etcd/member/wal");
    let mut bytes = Vec::new();
    for entry in std::fs::read_dir(wal).unwrap() {
        bytes.extend(std::fs::read(entry.unwrap().path()).unwrap());
    }
    let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(holds("other-text-to-be-searched"), "the search does not work");
    assert!(
        !holds("plain-text-to-be-searched"),
        "a Secret lies in etcd in plain text"
    );
}

/// The controller manager makes default service accounts and gives nodes their pod CIDR; the scheduler stays up.
async fn works(user: &Client, programs: &mut Programs) {
    let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": "fresh"}})).unwrap();
    Api::all(user.clone())
        .create(&PostParams::default(), &namespace)
        .await
        .unwrap();
    let accounts = Api::<ServiceAccount>::namespaced(user.clone(), "fresh");
    let made = wait_until(PATIENCE, || async {
        accounts.get_opt("default").await.unwrap().is_some()
    })
    .await;
    programs.assert_running();
    assert!(made, "{}", programs.running["kube-controller-manager"].tail(30));
    let nodes = Api::<Node>::all(user.clone());
    let addressed = wait_until(PATIENCE, || async {
        let node = nodes.get("customera-a-0").await.unwrap();
        node.spec
            .and_then(|spec| spec.pod_cidr)
            .is_some_and(|cidr| cidr.starts_with("10.10."))
    });
    assert!(
        addressed.await,
        "{}",
        programs.running["kube-controller-manager"].tail(30)
    );
    tokio::time::sleep(tenant::SETTLE).await;
    programs.assert_running();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_whole_life_of_a_cluster() {
    whole_life("v1.35.4").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_whole_life_of_a_cluster_of_the_other_version() {
    whole_life("v1.34.4").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_two_operators_never_allocate_twice() {
    let (_plane, admin) = outer().await;
    namespace(&admin, NS).await;
    let operators = [
        Operator::start(&admin, "https://127.0.0.1:1"),
        Operator::start(&admin, "https://127.0.0.1:1"),
    ];
    let names: Vec<String> = (0..8).map(|i| format!("t{i}")).collect();
    futures::future::join_all(
        names
            .iter()
            .map(|name| create(&admin, NS, name, json!({"version": "v1.35.4"}))),
    )
    .await;
    for name in &names {
        wait_for_condition(&admin, NS, name, conditions::PKI_READY).await;
    }
    let all = Api::<NetworkAllocation>::all(admin.clone())
        .list(&ListParams::default())
        .await
        .unwrap();
    let owners: BTreeSet<_> = all
        .iter()
        .map(|allocation| allocation.spec.owner.name.clone())
        .collect();
    let cidrs: BTreeSet<_> = all.iter().map(|allocation| allocation.spec.node_cidr.clone()).collect();
    assert_eq!((all.items.len(), owners.len(), cidrs.len()), (8, 8, 8), "{all:#?}");
    let machines = Api::<VirtualMachine>::namespaced(admin.clone(), NS)
        .list(&ListParams::default())
        .await
        .unwrap();
    let macs: BTreeSet<_> = machines
        .iter()
        .flat_map(|machine| {
            machine
                .spec
                .template
                .spec
                .domain
                .devices
                .interfaces
                .clone()
                .unwrap_or_default()
        })
        .filter_map(|interface| interface.mac_address)
        .collect();
    assert_eq!((machines.items.len(), macs.len()), (16, 16));
    for name in &names {
        delete_and_wait(&admin, NS, name).await;
    }
    assert_eq!(dump(&admin, NS).await, BTreeMap::new());
    drop(operators);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_refuses_what_is_not_its_own() {
    let (_plane, admin) = outer().await;
    namespace(&admin, NS).await;
    let foreign: Secret = serde_json::from_value(json!({
        "metadata": {"name": "customera-ca", "labels": {labels::CLUSTER: NAME}}, "stringData": {"tls.crt": "x"},
    }))
    .unwrap();
    Api::namespaced(admin.clone(), NS)
        .create(&PostParams::default(), &foreign)
        .await
        .unwrap();
    let _operator = Operator::start(&admin, "https://127.0.0.1:1");
    create(&admin, NS, NAME, json!({"version": "v1.35.4"})).await;
    let said = wait_until(PATIENCE, || async {
        condition(&cluster(&admin, NS, NAME).await, conditions::READY)
            .1
            .contains("customera-ca exists and does not belong")
    });
    assert!(said.await, "{:#?}", cluster(&admin, NS, NAME).await.status);
    delete_and_wait(&admin, NS, NAME).await;
    assert_eq!(
        dump(&admin, NS).await.into_keys().collect::<Vec<_>>(),
        ["Secret customera-ca"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_says_what_is_wrong_and_recovers_when_it_is_mended() {
    let (_plane, admin) = outer().await;
    namespace(&admin, NS).await;
    let _operator = Operator::start(&admin, "https://127.0.0.1:1");
    create(&admin, NS, NAME, json!({"version": "v1.2.3"})).await;
    let failed = wait_until(PATIENCE, || async {
        cluster(&admin, NS, NAME)
            .await
            .status
            .is_some_and(|status| status.phase == Phase::Failed)
    });
    assert!(failed.await);
    let (_, message) = condition(&cluster(&admin, NS, NAME).await, conditions::READY);
    assert!(
        message.contains("spec.version") && message.contains("v1.34.4, v1.35.4"),
        "{message}"
    );
    let mended = Patch::Merge(json!({"spec": {"version": "v1.35.4"}}));
    clusters(&admin, NS)
        .patch(NAME, &PatchParams::default(), &mended)
        .await
        .unwrap();
    wait_for_condition(&admin, NS, NAME, conditions::PKI_READY).await;
}

/// Somebody deletes the claim that has a tenant's etcd.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_data_that_is_gone_is_not_made_anew() {
    let (_plane, admin) = outer().await;
    namespace(&admin, NS).await;
    let _operator = Operator::start(&admin, "https://127.0.0.1:1");
    create(&admin, NS, NAME, json!({"version": "v1.35.4"})).await;
    for machine in ["customera-cp-0", "customera-default-0"] {
        machine_exists(&admin, machine).await;
    }
    let claims = Api::<PersistentVolumeClaim>::namespaced(admin.clone(), NS);
    let (data, scratch) = ("customera-cp-0-data", "customera-default-0-data");
    let says = async |what: &str| {
        let said = wait_until(PATIENCE, || async {
            condition(&cluster(&admin, NS, NAME).await, conditions::READY)
                .1
                .contains(what)
        });
        assert!(said.await, "{what}: {:#?}", cluster(&admin, NS, NAME).await.status);
    };
    claims.delete(data, &DeleteParams::default()).await.unwrap();
    says("no empty one is made in its place").await;
    assert!(claims.get_opt(data).await.unwrap().is_none());

    // Of a cluster that has answered, not even where its machine was deleted as well.
    let answered = Patch::Merge(json!({"status": {"version": "v1.35.4"}}));
    clusters(&admin, NS)
        .patch_status(NAME, &PatchParams::default(), &answered)
        .await
        .unwrap();
    // A generation that was looked at shows that the slots were gone through once more.
    let scale = async |replicas: u32| {
        let spec = Patch::Merge(json!({"spec": {"nodePools": [{"name": "default", "replicas": replicas}]}}));
        let scaled = clusters(&admin, NS).patch(NAME, &PatchParams::default(), &spec).await;
        let generation = scaled.unwrap().metadata.generation;
        let seen = wait_until(PATIENCE, || async {
            let status = cluster(&admin, NS, NAME).await.status.unwrap();
            status.observed_generation == generation
        });
        assert!(seen.await, "{replicas}");
    };
    scale(2).await;
    let machines = Api::<VirtualMachine>::namespaced(admin.clone(), NS);
    machines
        .delete("customera-cp-0", &DeleteParams::default())
        .await
        .unwrap();
    scale(3).await;
    assert!(claims.get_opt(data).await.unwrap().is_none());
    assert!(machines.get_opt("customera-cp-0").await.unwrap().is_none());

    let restored: PersistentVolumeClaim = serde_json::from_value(json!({"metadata": {"name": data}, "spec": {
        "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}},
    }}))
    .unwrap();
    claims.create(&PostParams::default(), &restored).await.unwrap();
    says("customera-cp-0: the virtual machine is").await;

    // A worker keeps nothing that is not made anew.
    let before = claims.get(scratch).await.unwrap().uid();
    claims.delete(scratch, &DeleteParams::default()).await.unwrap();
    let anew = wait_until(PATIENCE, || async {
        let claim = claims.get_opt(scratch).await.unwrap();
        claim.is_some_and(|claim| claim.uid() != before)
    });
    assert!(anew.await);
}

/// Takes the finalizer off and deletes, before anybody can put it back.
async fn vanish(client: &Client, name: &str) {
    let none = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    clusters(client, NS)
        .patch(name, &PatchParams::default(), &none)
        .await
        .unwrap();
    clusters(client, NS)
        .delete(name, &DeleteParams::default())
        .await
        .unwrap();
    assert!(clusters(client, NS).get_opt(name).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_a_cluster_that_vanishes_leaves_no_connection() {
    let (_plane, admin) = outer().await;
    namespace(&admin, NS).await;
    let (context, woken) = support::context(&admin, "https://127.0.0.1:1");
    let mut uids = Vec::new();
    for name in ["stays", "vanishes"] {
        create(&admin, NS, name, json!({"version": "v1.35.4"})).await;
        let cluster = cluster(&admin, NS, name).await;
        uids.push(cluster.uid().unwrap());
        reconcile(Arc::new(cluster), context.clone()).await.unwrap();
    }
    let connected = || uids.iter().map(|uid| context.view(uid).is_some()).collect::<Vec<_>>();
    assert_eq!(connected(), [true, true]);
    vanish(&admin, "vanishes").await;
    let _operator = Operator::run(&admin, context.clone(), woken);
    let ended = wait_until(PATIENCE, || async { connected() == [true, false] });
    assert!(ended.await, "{:?}", connected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_a_full_pool_has_room_where_a_cluster_vanished() {
    let (_plane, admin) = outer().await;
    namespace(&admin, NS).await;
    let mut small = options();
    small.node_cidr_pool = "127.64.0.0/24".parse().unwrap();
    let operator = Operator::start_with(&admin, "https://127.0.0.1:1", small.clone());
    create(&admin, NS, "vanishes", json!({"version": "v1.35.4"})).await;
    wait_for_condition(&admin, NS, "vanishes", conditions::NETWORK_READY).await;
    drop(operator);
    vanish(&admin, "vanishes").await;
    let _operator = Operator::start_with(&admin, "https://127.0.0.1:1", small);
    create(&admin, NS, NAME, json!({"version": "v1.35.4"})).await;
    wait_for_condition(&admin, NS, NAME, conditions::NETWORK_READY).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_looks_for_a_host_name_among_all_clusters_until_it_has_a_route() {
    let (_plane, admin) = outer().await;
    let (far, spec) = (
        "z-far",
        json!({"version": "v1.35.4", "access": {"hostname": "api.example.com"}}),
    );
    for ns in [NS, far] {
        namespace(&admin, ns).await;
    }
    create(&admin, far, "old", spec.clone()).await;
    // More than are read at a time lie before it.
    for n in 0..120 {
        create(&admin, NS, &format!("other-{n}"), json!({"version": "v1.35.4"})).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    create(&admin, NS, NAME, spec).await;
    let (context, _woken) = support::context(&admin, "https://127.0.0.1:1");
    let ready = || async {
        let cluster = cluster(&admin, NS, NAME).await;
        reconcile(Arc::new(cluster), context.clone()).await.unwrap();
        condition(&support::cluster(&admin, NS, NAME).await, conditions::READY).1
    };
    let refused = ready().await;
    assert!(refused.contains("belongs to another TenantCluster"), "{refused}");
    // One that got its route when nobody looked keeps its machines and certificates.
    let route = json!({"status": {"ingress": {"host": "api.example.com", "address": "10.0.0.1", "port": 6443}}});
    clusters(&admin, NS)
        .patch_status(NAME, &PatchParams::default(), &Patch::Merge(route))
        .await
        .unwrap();
    let goes_on = ready().await;
    assert!(goes_on.contains("customera-cp-0"), "{goes_on}");
}

/// Reconciles as a fresh process would, a few times; whether none failed.
async fn reconcile_until_settled(client: &Client, namespace: &str) -> bool {
    let (context, _woken) = support::context(client, "https://127.0.0.1:1");
    for _ in 0..6 {
        let Ok(Some(cluster)) = clusters(client, namespace).get_opt(NAME).await else {
            return true;
        };
        if reconcile(Arc::new(cluster), context.clone()).await.is_err() {
            return false;
        }
    }
    true
}

async fn status_without_times(client: &Client, namespace: &str) -> serde_json::Value {
    let cluster: TenantCluster = cluster(client, namespace, NAME).await;
    let mut status = json!(cluster.status);
    for certificate in status["certificates"].as_array_mut().into_iter().flatten() {
        certificate["notAfter"] = json!("");
    }
    for condition in status["conditions"].as_array_mut().into_iter().flatten() {
        condition["lastTransitionTime"] = json!("");
        condition["message"] = json!("");
    }
    for field in ["ingress", "endpoint"] {
        status[field] = json!("");
    }
    status
}

/// The process dies at each write in turn, of create and of delete, before it and after it; the next one ends where an
/// undisturbed one does, and leaves nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_a_crash_at_any_write_changes_nothing() {
    let (plane, admin) = outer().await;
    let file = kube::config::Kubeconfig::read_from(plane.kubeconfig()).unwrap();
    let config = Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default())
        .await
        .unwrap();
    let mut expected = None;
    for death in [Death::Before, Death::After] {
        for n in 0.. {
            let ns = format!("{death:?}-{n}").to_lowercase();
            namespace(&admin, &ns).await;
            create(&admin, &ns, NAME, json!({"version": "v1.35.4"})).await;
            // 0 counts no write: the undisturbed run.
            let fault = if n == 0 { Fault::default() } else { Fault::at(n, death) };
            reconcile_until_settled(&fault.client(config.clone()), &ns).await;
            assert!(
                reconcile_until_settled(&admin, &ns).await,
                "{ns}: {:#?}",
                cluster(&admin, &ns, NAME).await.status
            );
            let state = (dump(&admin, &ns).await, status_without_times(&admin, &ns).await);
            assert_eq!(expected.get_or_insert_with(|| state.clone()), &state, "{ns}");

            kube::Api::<TenantCluster>::namespaced(admin.clone(), &ns)
                .delete(NAME, &kube::api::DeleteParams::default())
                .await
                .unwrap();
            let deletion = if n == 0 { Fault::default() } else { Fault::at(n, death) };
            reconcile_until_settled(&deletion.client(config.clone()), &ns).await;
            let gone = wait_until(PATIENCE, || async {
                reconcile_until_settled(&admin, &ns).await
                    && clusters(&admin, &ns).get_opt(NAME).await.unwrap().is_none()
            });
            assert!(gone.await, "{ns}: {:#?}", cluster(&admin, &ns, NAME).await.status);
            assert_eq!(dump(&admin, &ns).await, BTreeMap::new(), "{ns}");
            if n > 0 && !fault.died() && !deletion.died() {
                assert!(n > 10, "only {n} writes: the fault does not work");
                break;
            }
        }
    }
}
