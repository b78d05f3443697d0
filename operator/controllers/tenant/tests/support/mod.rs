//! What the stories share: an outer API server, the controller on it, clients that fail on purpose, and a stand-in for
//! the machine half that says when machines run.

#![allow(dead_code, reason = "each story uses a part")]

pub mod faults;
pub mod tenant;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::StreamExt;
use k8s_openapi::{
    api::core::v1::{Namespace, PersistentVolumeClaim, Secret, Service},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    core::DynamicObject,
    runtime::{WatchStreamExt, watcher},
};
use kubernest_crds::{NetworkAllocation, TenantCluster, kubevirt::v1::VirtualMachine};
use kubernest_integration::{ControlPlane, install_crds, wait_until};
use kubernest_runtime::{Applier, CancellationToken, Metrics, events::Recorder};
use kubernest_tenant::{FIELD_MANAGER, Options, run_with, tenantcluster::Context};
use serde_json::{Value, json};

/// Longest that a story waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Flags of the controller; node addresses are loopback ones, so that a tenant's programs can really use them.
pub fn options() -> Options {
    Options {
        node_images: r#"{"v1.35.4":{"image":"localhost/kubernest-node@sha256:1"},"v1.34.4":{"image":"localhost/kubernest-node@sha256:2"}}"#
            .parse()
            .unwrap(),
        node_cidr_pool: "127.64.0.0/10".parse().unwrap(),
        base_domain: "kubernest.local".to_owned(),
        ingress_port: 6443,
    }
}

/// An outer API server with all CRDs, and a client of its administrator.
pub async fn outer() -> (ControlPlane, Client) {
    let plane = ControlPlane::start().await.unwrap();
    let client = plane.client().await.unwrap();
    install_crds(&client).await.unwrap();
    let crd: CustomResourceDefinition = serde_json::from_value(json!({
        "metadata": {"name": "network-attachment-definitions.k8s.cni.cncf.io"},
        "spec": {
            "group": "k8s.cni.cncf.io", "scope": "Namespaced",
            "names": {"plural": "network-attachment-definitions", "singular": "network-attachment-definition",
                "kind": "NetworkAttachmentDefinition"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object", "properties": {"spec": {"type": "object", "properties": {"config": {"type": "string"}}}},
            }}}],
        },
    }))
    .unwrap();
    Api::all(client.clone())
        .create(&PostParams::default(), &crd)
        .await
        .unwrap();
    let attachments = attachments(&client, "default");
    assert!(
        wait_until(PATIENCE, || async {
            attachments.list(&ListParams::default()).await.is_ok()
        })
        .await
    );
    tokio::spawn(release_claims(client.clone()));
    (plane, client)
}

/// What the controller manager does with claims that are deleted and that no pod uses (pvc-protection).
async fn release_claims(client: Client) {
    let claims = Api::<PersistentVolumeClaim>::all(client.clone());
    let mut events = watcher(claims, watcher::Config::default()).default_backoff().boxed();
    while let Some(event) = events.next().await {
        let Ok(watcher::Event::Apply(claim) | watcher::Event::InitApply(claim)) = event else {
            continue;
        };
        if claim.metadata.deletion_timestamp.is_some() {
            let api = Api::<PersistentVolumeClaim>::namespaced(client.clone(), &claim.namespace().unwrap());
            let none = Patch::Merge(json!({"metadata": {"finalizers": null}}));
            let _ = api.patch(&claim.name_any(), &PatchParams::default(), &none).await;
        }
    }
}

pub fn attachments(client: &Client, namespace: &str) -> Api<DynamicObject> {
    let kind = kubernest_tenant::tenantcluster::build::network::nad_kind();
    Api::namespaced_with(client.clone(), namespace, &kind)
}

/// A context whose tenants are all at `endpoint`.
pub fn context(client: &Client, endpoint: &str) -> (Arc<Context>, Woken) {
    context_with(client, endpoint, options())
}

pub type Woken = futures::channel::mpsc::UnboundedReceiver<kube::runtime::reflector::ObjectRef<TenantCluster>>;

fn context_with(client: &Client, endpoint: &str, options: Options) -> (Arc<Context>, Woken) {
    let (wake, woken) = futures::channel::mpsc::unbounded();
    let applier = Applier::new(client.clone(), FIELD_MANAGER);
    let mut context = Context::new(applier, Recorder::new(client.clone(), FIELD_MANAGER), options, wake);
    let endpoint = endpoint.to_owned();
    context.dial = Box::new(move |_| endpoint.clone());
    (Arc::new(context), woken)
}

/// A controller that runs until it is dropped.
pub struct Operator {
    stop: CancellationToken,
    pub context: Arc<Context>,
}

impl Operator {
    pub fn start(client: &Client, endpoint: &str) -> Self {
        Self::start_with(client, endpoint, options())
    }

    pub fn start_with(client: &Client, endpoint: &str, options: Options) -> Self {
        let (context, woken) = context_with(client, endpoint, options);
        Self::run(client, context, woken)
    }

    pub fn run(client: &Client, context: Arc<Context>, woken: Woken) -> Self {
        let stop = CancellationToken::new();
        let run = run_with(client.clone(), context.clone(), woken, Metrics::new(), stop.clone());
        tokio::spawn(run);
        Operator { stop, context }
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub async fn namespace(client: &Client, name: &str) {
    let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
    Api::all(client.clone())
        .create(&PostParams::default(), &namespace)
        .await
        .unwrap();
}

pub async fn create(client: &Client, namespace: &str, name: &str, spec: Value) -> TenantCluster {
    let cluster: TenantCluster = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap();
    clusters(client, namespace)
        .create(&PostParams::default(), &cluster)
        .await
        .unwrap()
}

pub fn clusters(client: &Client, namespace: &str) -> Api<TenantCluster> {
    Api::namespaced(client.clone(), namespace)
}

pub async fn cluster(client: &Client, namespace: &str, name: &str) -> TenantCluster {
    clusters(client, namespace).get(name).await.unwrap()
}

/// What the machine half would say of a machine.
pub async fn machine_runs(client: &Client, namespace: &str, name: &str, ready: bool) {
    let printable = if ready { "Running" } else { "Stopped" };
    let status = json!({"status": {"created": ready, "ready": ready, "printableStatus": printable}});
    let api = Api::<VirtualMachine>::namespaced(client.clone(), namespace);
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(status))
        .await
        .unwrap();
}

/// Status of a condition, and its message.
pub fn condition(cluster: &TenantCluster, type_: &str) -> (String, String) {
    let all = cluster
        .status
        .as_ref()
        .map(|status| status.conditions.as_slice())
        .unwrap_or_default();
    let found = all.iter().find(|condition| condition.type_ == type_);
    found
        .map(|condition| (condition.status.clone(), condition.message.clone()))
        .unwrap_or_default()
}

/// Waits for a condition to be True, and says what stands there when it does not come.
pub async fn wait_for_condition(client: &Client, namespace: &str, name: &str, type_: &str) {
    let reached = wait_until(PATIENCE, || async {
        condition(&cluster(client, namespace, name).await, type_).0 == "True"
    });
    if !reached.await {
        let cluster = cluster(client, namespace, name).await;
        panic!("{type_} is {:?}; {:#?}", condition(&cluster, type_), cluster.status);
    }
}

/// Everything of a namespace that the controller could have made, by kind and name, without what differs at each run.
pub async fn dump(client: &Client, namespace: &str) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    let lp = ListParams::default();
    for object in Api::<VirtualMachine>::namespaced(client.clone(), namespace)
        .list(&lp)
        .await
        .unwrap()
    {
        all.insert(format!("VirtualMachine {}", object.name_any()), mask(json!(object)));
    }
    for object in Api::<Secret>::namespaced(client.clone(), namespace)
        .list(&lp)
        .await
        .unwrap()
    {
        all.insert(format!("Secret {}", object.name_any()), mask(json!(object)));
    }
    for object in Api::<PersistentVolumeClaim>::namespaced(client.clone(), namespace)
        .list(&lp)
        .await
        .unwrap()
    {
        all.insert(format!("Claim {}", object.name_any()), mask(json!(object)));
    }
    for object in Api::<Service>::namespaced(client.clone(), namespace)
        .list(&lp)
        .await
        .unwrap()
    {
        all.insert(format!("Service {}", object.name_any()), mask(json!(object)));
    }
    for object in attachments(client, namespace).list(&lp).await.unwrap() {
        all.insert(format!("Attachment {}", object.name_any()), mask(json!(object)));
    }
    for object in Api::<NetworkAllocation>::all(client.clone()).list(&lp).await.unwrap() {
        if object.spec.owner.namespace == namespace {
            all.insert(format!("Allocation {}", object.name_any()), mask(json!(object)));
        }
    }
    all
}

/// Removes uids, versions, times, addresses given by the server, and keys.
fn mask(mut object: Value) -> Value {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        for field in [
            "uid",
            "resourceVersion",
            "creationTimestamp",
            "managedFields",
            "namespace",
            "generation",
        ] {
            metadata.remove(field);
        }
        for owner in metadata
            .get_mut("ownerReferences")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            owner["uid"] = json!("");
        }
    }
    if let Some(data) = object.get_mut("data").and_then(Value::as_object_mut) {
        data.values_mut().for_each(|value| *value = json!(""));
    }
    for field in ["clusterIP", "clusterIPs", "owner"] {
        if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
            spec.remove(field);
        }
    }
    object
}

/// Deletes the cluster and waits until the controller has let it go.
pub async fn delete_and_wait(client: &Client, namespace: &str, name: &str) {
    clusters(client, namespace)
        .delete(name, &DeleteParams::default())
        .await
        .unwrap();
    let gone = wait_until(PATIENCE, || async {
        clusters(client, namespace).get_opt(name).await.unwrap().is_none()
    });
    assert!(gone.await, "{:#?}", cluster(client, namespace, name).await.status);
}
