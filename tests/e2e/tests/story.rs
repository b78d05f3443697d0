//! The main job, end to end on real parts: two tenants of two versions come up while Kubernest is being killed, work,
//! stay apart, survive the loss of their machines, and go without a trace.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams};
use kubernest_crds::kubevirt::v1::VirtualMachine;
use kubernest_crds::{Slot, SlotRole, TenantCluster, conditions};
use kubernest_e2e::leftovers::{inventory, nodes_are_clean, nothing_since};
use kubernest_e2e::{Outer, Tenant};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn e2e_two_tenants_live_apart_survive_and_leave_nothing() -> Result<()> {
    let outer = Outer::open().await?;
    nodes_are_clean(&outer)?;
    let before = [
        inventory(&outer, "org-acme").await?,
        inventory(&outer, "org-bolt").await?,
    ];

    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/samples/tenantcluster.yaml");
    outer.kubectl(&["apply", "-f", sample])?;
    let a = Tenant::open(&outer, "org-acme", "customera").await?;
    // Its control plane is a node like others; a worker of its own would only make the machine busier.
    let spec = json!({"version": "v1.34.4", "nodePools": [{"name": "default", "replicas": 0}]});
    let b = Tenant::apply(&outer, "org-bolt", "customerb", spec).await?;
    come_up_while_kubernest_is_killed(&outer, &a, &b).await?;
    let (cluster_a, cluster_b) = (a.ready().await?, b.ready().await?);

    nodes_are_ready(&a, &cluster_a, "v1.35.4").await?;
    nodes_are_ready(&b, &cluster_b, "v1.34.4").await?;
    ensure!(slots(&cluster_a).len() == 2, "a control plane and a worker");
    ensure!(
        cluster_a.spec.network.pod_cidr == cluster_b.spec.network.pod_cidr,
        "both tenants have one pod CIDR"
    );
    workload_runs(&a).await?;
    tenants_do_not_reach_each_other(&a, &cluster_a, &cluster_b)?;
    users_of_the_namespace_have_their_rights(&outer)?;
    events_tell_what_happened(&outer)?;
    b.delete().await?;

    worker_survives_its_pod(&outer, &a, &cluster_a).await?;
    control_plane_keeps_its_data(&outer, &a, &cluster_a).await?;

    for slot in slots(&cluster_a) {
        outer.memory_fits_its_request("org-acme", &slot.name).await?;
    }
    a.delete().await?;
    for (namespace, before) in ["org-acme", "org-bolt"].into_iter().zip(&before) {
        nothing_since(&outer, namespace, before).await?;
    }
    nodes_are_clean(&outer)?;
    outer.kubectl(&["delete", "namespace", "org-acme", "org-bolt"])?;
    Ok(())
}

/// Kills operator and api at several points of the way: at once, when the first condition holds, and when machines run.
async fn come_up_while_kubernest_is_killed(outer: &Outer, a: &Tenant<'_>, b: &Tenant<'_>) -> Result<()> {
    outer.kill_component("operator").await?;
    outer.kill_component("api").await?;
    a.wait_for(conditions::PKI_READY).await?;
    outer.kill_component("operator").await?;
    b.wait_for(conditions::PKI_READY).await?;
    outer.kill_component("operator").await?;
    outer.kill_component("api").await?;
    a.wait_for(conditions::CONTROL_PLANE_READY).await?;
    outer.kill_component("operator").await?;
    Ok(())
}

async fn nodes_are_ready(tenant: &Tenant<'_>, cluster: &TenantCluster, version: &str) -> Result<()> {
    let nodes = Api::<Node>::all(tenant.client().await?)
        .list(&Default::default())
        .await?;
    let mut names: Vec<_> = nodes.iter().map(ResourceExt::name_any).collect();
    let mut wanted: Vec<_> = slots(cluster).iter().map(|slot| slot.name.clone()).collect();
    names.sort();
    wanted.sort();
    ensure!(names == wanted, "nodes {names:?}, slots {wanted:?}");
    for node in nodes {
        tenant.node_ready(&node.name_any(), None).await?;
        let kubelet = node
            .status
            .and_then(|status| status.node_info)
            .map(|info| info.kubelet_version);
        ensure!(kubelet.as_deref() == Some(version), "kubelet {kubelet:?}");
    }
    let api = tenant.client().await?.apiserver_version().await?;
    ensure!(api.git_version == version, "API server {}", api.git_version);
    print!("{}", tenant.kubectl(&["get", "nodes", "-o", "wide"])?);
    Ok(())
}

/// A pod runs on the worker, finds a Service by name, reaches it; logs and exec work through the ingress.
async fn workload_runs(tenant: &Tenant<'_>) -> Result<()> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/workload.yaml");
    tenant.kubectl(&["apply", "-f", manifest])?;
    tenant.kubectl(&["wait", "--for=condition=Ready", "pod/client", "--timeout=10m"])?;
    tenant.kubectl(&["rollout", "status", "deployment/web", "--timeout=10m"])?;
    tenant.kubectl(&[
        "rollout",
        "status",
        "-n",
        "kube-system",
        "deployment/coredns",
        "--timeout=10m",
    ])?;
    let looked_up = tenant.kubectl(&["exec", "client", "--", "nslookup", "web.default.svc.cluster.local"])?;
    ensure!(looked_up.contains("Address"), "nslookup said {looked_up}");
    // The node's kube-proxy hears of the pod on its own time.
    let fetch = "exec client -- wget -q -O - http://web.default.svc.cluster.local/";
    let fetch: Vec<_> = fetch.split(' ').collect();
    let page = loop {
        match tenant.kubectl(&fetch) {
            Ok(page) => break page,
            Err(error) => println!("-- not yet: {error:#}"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    ensure!(page.contains("hello from the tenant"), "the Service answered {page}");
    let logs = tenant.kubectl(&["logs", "deployment/web"])?;
    ensure!(logs.contains("serving"), "logs: {logs}");
    Ok(())
}

/// From inside tenant A, its own nodes' kubelets answer and those of tenant B don't.
fn tenants_do_not_reach_each_other(tenant: &Tenant<'_>, a: &TenantCluster, b: &TenantCluster) -> Result<()> {
    let knocks = |cluster, expected| slots(cluster).iter().map(move |slot| (slot, expected));
    for (slot, expected) in knocks(a, "reached").chain(knocks(b, "unreachable")) {
        // In words that only a server of TLS answers so: something on the way may take any connection.
        let knock = format!(
            "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 10 nc -w 5 {} 10250 | grep -q 'HTTPS server' && echo reached || echo unreachable",
            slot.ip
        );
        let said = tenant.kubectl(&["exec", "client", "--", "sh", "-c", &knock])?;
        ensure!(
            said.trim() == expected,
            "{} of {:?} from tenant A: {said}",
            slot.ip,
            slot.name
        );
    }
    Ok(())
}

/// Kubernetes' own roles in a namespace cover its TenantClusters.
fn users_of_the_namespace_have_their_rights(outer: &Outer) -> Result<()> {
    for role in ["view", "edit"] {
        let (cluster_role, user) = (format!("--clusterrole={role}"), format!("--user={role}er"));
        outer.kubectl(&["create", "rolebinding", role, "-n", "org-acme", &cluster_role, &user])?;
    }
    let rights = [
        ("viewer", "get", true),
        ("viewer", "create", false),
        ("editer", "create", true),
        ("editer", "delete", true),
    ];
    for (user, verb, may) in rights {
        let user = format!("--as={user}");
        let said = outer.kubectl(&["auth", "can-i", verb, "tenantclusters", "-n", "org-acme", &user]);
        ensure!(said.is_ok() == may, "{user} may {verb}: {said:?}");
    }
    Ok(())
}

/// What `kubectl describe tc` shows. (An operator that is killed after a write may not have told of it any more.)
fn events_tell_what_happened(outer: &Outer) -> Result<()> {
    let of = "involvedObject.kind=TenantCluster,involvedObject.name=customera";
    let reasons = "jsonpath={.items[*].reason}";
    let reasons = outer.kubectl(&["get", "events", "-n", "org-acme", "--field-selector", of, "-o", reasons])?;
    for reason in [conditions::NODES_READY, conditions::READY] {
        ensure!(
            reasons.split(' ').any(|told| told == reason),
            "no event {reason}: {reasons}"
        );
    }
    Ok(())
}

/// The worker's launcher pod is deleted; the slot comes back as itself.
async fn worker_survives_its_pod(outer: &Outer, tenant: &Tenant<'_>, cluster: &TenantCluster) -> Result<()> {
    let slot = slot(cluster, SlotRole::Worker)?;
    let before = tenant.node_ready(&slot.name, None).await?;
    let certificates_before = certificate_names(outer, tenant, &slot.name)?;
    delete_launcher(outer, tenant, &slot.name).await?;
    let after = tenant.node_ready(&slot.name, boot_id(&before)).await?;
    let cluster = tenant.ready().await?;
    let same = slots(&cluster)
        .iter()
        .find(|one| one.name == slot.name)
        .context("the slot")?;
    ensure!(
        (&same.ip, &same.mac) == (&slot.ip, &slot.mac),
        "slot was {slot:?}, is {same:?}"
    );
    ensure!(
        address(&after) == Some(slot.ip.clone()),
        "node address {:?}",
        address(&after)
    );
    ensure!(
        certificates_before == certificate_names(outer, tenant, &slot.name)?,
        "certificates have other names"
    );
    Ok(())
}

/// The control plane's launcher pod is deleted; what was in etcd is still there.
async fn control_plane_keeps_its_data(outer: &Outer, tenant: &Tenant<'_>, cluster: &TenantCluster) -> Result<()> {
    let slot = slot(cluster, SlotRole::ControlPlane)?;
    tenant.kubectl(&["create", "configmap", "precious", "--from-literal=answer=42"])?;
    let before = tenant.node_ready(&slot.name, None).await?;
    delete_launcher(outer, tenant, &slot.name).await?;
    machine_ready(outer, tenant, &slot.name).await?;
    tenant.wait_for(conditions::CONTROL_PLANE_READY).await?;
    tenant.node_ready(&slot.name, boot_id(&before)).await?;
    let answer = tenant.kubectl(&["get", "configmap", "precious", "-o", "jsonpath={.data.answer}"])?;
    ensure!(answer == "42", "etcd lost data: {answer:?}");
    tenant.ready().await?;
    Ok(())
}

async fn delete_launcher(outer: &Outer, tenant: &Tenant<'_>, machine: &str) -> Result<()> {
    let pods = outer.launchers(&tenant.namespace, machine).await?;
    let [pod] = pods.as_slice() else {
        anyhow::bail!("one launcher of {machine}, found {}", pods.len())
    };
    let api = Api::<Pod>::namespaced(outer.client.clone(), &tenant.namespace);
    let uid = pod.uid().context("uid")?;
    api.delete(&pod.name_any(), &DeleteParams::default()).await?;
    let gone = kube::runtime::conditions::is_deleted(&uid);
    kubernest_e2e::wait::until(&api, &pod.name_any(), "launcher pod gone", gone).await?;
    Ok(())
}

async fn machine_ready(outer: &Outer, tenant: &Tenant<'_>, machine: &str) -> Result<()> {
    let api = Api::<VirtualMachine>::namespaced(outer.client.clone(), &tenant.namespace);
    let ready = |object: Option<&VirtualMachine>| {
        object
            .and_then(|vm| vm.status.as_ref())
            .is_some_and(|status| status.ready)
    };
    kubernest_e2e::wait::until(&api, machine, "machine ready", ready).await?;
    Ok(())
}

/// Names in the slot's bootstrap Secret: its certificates and keys are among them.
fn certificate_names(outer: &Outer, tenant: &Tenant<'_>, slot: &str) -> Result<Vec<String>> {
    let secret = format!("{slot}-bootstrap");
    let text = outer.kubectl(&["get", "secret", "-n", &tenant.namespace, &secret, "-o", "json"])?;
    let object: serde_json::Value = serde_json::from_str(&text)?;
    Ok(object["data"].as_object().context("data")?.keys().cloned().collect())
}

fn slots(cluster: &TenantCluster) -> &[Slot] {
    cluster
        .status
        .as_ref()
        .map(|status| status.slots.as_slice())
        .unwrap_or_default()
}

fn slot(cluster: &TenantCluster, role: SlotRole) -> Result<Slot> {
    slots(cluster)
        .iter()
        .find(|slot| slot.role == role)
        .cloned()
        .with_context(|| format!("a slot of role {role:?}"))
}

fn boot_id(node: &Node) -> Option<String> {
    Some(node.status.as_ref()?.node_info.as_ref()?.boot_id.clone())
}

fn address(node: &Node) -> Option<String> {
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    addresses
        .iter()
        .find(|address| address.type_ == "InternalIP")
        .map(|address| address.address.clone())
}
