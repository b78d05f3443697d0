//! The machine controllers against a real API server: stories of a machine's life, told through its objects.
//!
//! One process for all of machines and one for all of replica sets, since starting an API server costs more than any story. Each story has a namespace, on which Pod
//! Security `restricted` is enforced, and controllers of its own.

// Helpers of tests are tests as well; clippy sees only functions marked so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod asked;
mod credentials;
mod replicas;
mod requests;
mod support;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::FutureExt;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, ResourceExt};
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use support::gate::Gate;
use support::kubelet::{self, Kubelet, NODE};
use support::stage::{Controllers, PATIENCE, Stage, Theatre, gated, machine, printable};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_stories_against_a_real_api_server() {
    // Each story on the heap: together they do not fit a test thread's stack.
    let theatre = Theatre::open().await;
    story(
        "create",
        reconcile_create(&Stage::set(&theatre, "create").await).boxed(),
    )
    .await;
    story(
        "pod deleted",
        reconcile_pod_deleted(&Stage::set(&theatre, "pod-deleted").await).boxed(),
    )
    .await;
    story(
        "halt and start",
        reconcile_halt(&Stage::set(&theatre, "halt").await).boxed(),
    )
    .await;
    story(
        "delete",
        reconcile_delete(&Stage::set(&theatre, "delete").await).boxed(),
    )
    .await;
    story("crash", reconcile_crash(&Stage::set(&theatre, "crash").await).boxed()).await;
    story(
        "missing claim",
        reconcile_missing_claim(&Stage::set(&theatre, "claim").await).boxed(),
    )
    .await;
    story(
        "refused pod",
        reconcile_refused(&Stage::set(&theatre, "refused").await).boxed(),
    )
    .await;
    story(
        "template changed",
        reconcile_restart_required(&Stage::set(&theatre, "template").await).boxed(),
    )
    .await;
    story(
        "instance alone",
        reconcile_instance_alone(&Stage::set(&theatre, "alone").await).boxed(),
    )
    .await;
    story(
        "name taken",
        reconcile_name_taken(&Stage::set(&theatre, "taken").await).boxed(),
    )
    .await;
    story(
        "lost node",
        reconcile_lost_node(&Stage::without_kubelet(&theatre, "lost-node").await).boxed(),
    )
    .await;
    story(
        "refused label",
        reconcile_refused_label(&Stage::without_kubelet(&theatre, "refused-label").await).boxed(),
    )
    .await;
    requests::tell(&theatre).await;
    asked::tell(&theatre).await;
    story(
        "credentials",
        credentials::reconcile_credentials(&Stage::set(&theatre, "credentials").await, &theatre).boxed(),
    )
    .await;
    story(
        "at rest",
        reconcile_rest(&Stage::set(&theatre, "rest").await, &theatre).boxed(),
    )
    .await;
    story("killed at every write", reconcile_killed(&theatre).boxed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_stories_of_replica_sets() {
    replicas::tell(&Theatre::open().await).await;
}

async fn story(name: &str, told: impl Future<Output = ()>) {
    let since = Instant::now();
    told.await;
    println!("{name}: {} ms", since.elapsed().as_millis());
}

async fn reconcile_create(stage: &Stage) {
    stage.controllers_listen().await;
    let since = Instant::now();
    stage.create(machine()).await;
    let pods = stage.pods();
    let made = async {
        loop {
            if let Some(pod) = pods.list(&ListParams::default()).await.unwrap().items.pop() {
                break pod;
            }
        }
    };
    let pod = tokio::time::timeout(PATIENCE, made).await.expect("a pod");
    println!("  apply to pod: {} ms", since.elapsed().as_millis());
    assert_eq!(pod.labels()["kubernest.io/slot"], "vm");
    let running = stage.running().await;
    let status = running.status.clone().unwrap();
    assert!(status.created);
    assert_eq!(
        (status.observed_generation, status.desired_generation),
        (Some(1), Some(1))
    );
    let instance = stage.instance().await;
    assert_eq!(instance.labels()["kubevirt.io/nodeName"], NODE);
    let seen = instance.status.unwrap();
    assert_eq!(seen.phase.as_deref(), Some("Running"));
    assert_eq!(seen.node_name.as_deref(), Some(NODE));
    assert_eq!(seen.launcher_address.as_deref(), Some("10.1.0.5"));
    assert_eq!(seen.interfaces[0].ip_address.as_deref(), Some("10.1.0.5"));
    let phases: Vec<_> = seen
        .phase_transition_timestamps
        .iter()
        .map(|at| at.phase.as_str())
        .collect();
    assert_eq!(phases[..2], ["Pending", "Scheduling"]);
    assert_eq!(phases.last(), Some(&"Running"));
}

async fn reconcile_pod_deleted(stage: &Stage) {
    stage.create(machine()).await;
    stage.running().await;
    let (first, pod) = (stage.instance().await, stage.pod().await);
    stage
        .pods()
        .delete(&pod.name_any(), &DeleteParams::default())
        .await
        .unwrap();
    let since = Instant::now();
    let uid = first.uid();
    let again = |instance: Option<&VirtualMachineInstance>| {
        instance.is_some_and(|instance| {
            instance.uid() != uid
                && instance.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running")
        })
    };
    tokio::time::timeout(PATIENCE, await_condition(stage.instances(), "vm", again))
        .await
        .expect("a new run")
        .unwrap();
    println!("  pod deleted to running again: {} ms", since.elapsed().as_millis());
    let machine = stage.running().await;
    assert_eq!(
        machine.status.unwrap().start_failure,
        None,
        "a deleted pod is no failure of the machine"
    );
    assert_ne!(stage.pod().await.uid(), pod.uid());
    let most = stage.kubelet.as_ref().unwrap().most_running.lock().unwrap()["vm"];
    assert_eq!(most, 1, "never two at once");
}

async fn reconcile_halt(stage: &Stage) {
    stage.create(machine()).await;
    stage.running().await;
    stage.change(json!({"spec": {"runStrategy": "Halted"}})).await;
    let stopped = stage
        .machine_when("stopped machine", |machine| printable(machine) == "Stopped")
        .await;
    let status = stopped.status.unwrap();
    assert!(!status.created && !status.ready);
    assert_eq!(stage.instances().get_opt("vm").await.unwrap(), None);
    assert!(
        stage
            .pods()
            .list(&ListParams::default())
            .await
            .unwrap()
            .items
            .is_empty()
    );
    stage
        .change(json!({"spec": {"runStrategy": null, "running": true}}))
        .await;
    stage.running().await;
}

async fn reconcile_delete(stage: &Stage) {
    stage.create(machine()).await;
    stage.running().await;
    stage.machines().delete("vm", &DeleteParams::default()).await.unwrap();
    stage.machine_gone().await;
    stage.assert_nothing_left().await;
    // Before anything came of it.
    stage.create(machine()).await;
    stage.machines().delete("vm", &DeleteParams::default()).await.unwrap();
    stage.machine_gone().await;
}

async fn reconcile_crash(stage: &Stage) {
    stage.create(machine()).await;
    stage.running().await;
    let pod = stage.pod().await.name_any();
    let words = r#"{"reason":"GuestCrashed","message":"the guest died","serial":["Kernel panic"]}"#;
    kubelet::patch(&stage.pods(), &pod, kubelet::ended("Failed", 1, words)).await;
    let machine = stage
        .machine_when("back-off", |machine| printable(machine) == "CrashLoopBackOff")
        .await;
    let status = machine.status.unwrap();
    assert_eq!(status.start_failure.as_ref().unwrap().consecutive_fail_count, 1);
    let failure = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == "Failure")
        .unwrap();
    assert_eq!(failure.reason.as_deref(), Some("GuestCrashed"));
    assert_eq!(
        failure.message.as_deref(),
        Some("the guest died; the guest said last: Kernel panic")
    );
    let retry = status.start_failure.unwrap().retry_after_timestamp.unwrap().0;
    stage.running().await;
    let again = stage.instance().await.metadata.creation_timestamp.unwrap().0;
    // To the second, as creation is.
    assert!(again.as_second() >= retry.as_second(), "{again} before {retry}");
}

async fn reconcile_missing_claim(stage: &Stage) {
    let mut machine = machine();
    let spec = &mut machine["spec"]["template"]["spec"];
    spec["volumes"][0] = json!({"name": "os", "persistentVolumeClaim": {"claimName": "data"}});
    stage.create(machine).await;
    stage
        .machine_when("claim asked for", |machine| printable(machine) == "ErrorPvcNotFound")
        .await;
    let claim = json!({
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    });
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(stage.client.clone(), &stage.namespace);
    claims
        .create(&PostParams::default(), &serde_json::from_value(claim).unwrap())
        .await
        .unwrap();
    stage.running().await;
}

async fn reconcile_refused(stage: &Stage) {
    let mut machine = machine();
    machine["spec"]["template"]["spec"]["priorityClassName"] = json!("no-such-class");
    stage.create(machine).await;
    let refused = stage.machine_when("refusal", |machine| {
        let conditions = machine.status.iter().flat_map(|status| &status.conditions);
        conditions
            .into_iter()
            .any(|condition| condition.reason.as_deref() == Some("FailedCreate"))
    });
    let refused = refused.await.status.unwrap();
    let message = refused.conditions[0].message.clone().unwrap();
    assert!(message.contains("no-such-class"), "{message}");
    let secrets = stage.secrets(&stage.namespace).list(&ListParams::default()).await;
    assert!(secrets.unwrap().items.is_empty(), "none for a pod that is refused");
    stage.machines().delete("vm", &DeleteParams::default()).await.unwrap();
    stage.machine_gone().await;
}

async fn reconcile_restart_required(stage: &Stage) {
    stage.create(machine()).await;
    stage.running().await;
    let required = |machine: &VirtualMachine| {
        let mut conditions = machine.status.iter().flat_map(|status| &status.conditions);
        conditions.any(|condition| condition.type_ == "RestartRequired" && condition.status == "True")
    };
    let guest = |size: &str| json!({"spec": {"template": {"spec": {"domain": {"memory": {"guest": size}}}}}});
    stage.change(guest("1Gi")).await;
    stage.machine_when("restart required", required).await;
    stage.change(guest("512Mi")).await;
    stage
        .machine_when("restart not required", |machine| !required(machine))
        .await;
}

async fn reconcile_instance_alone(stage: &Stage) {
    let mut object =
        json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": "vm"}});
    object["spec"] = machine()["spec"]["template"]["spec"].clone();
    let instances = stage.instances();
    instances
        .create(&PostParams::default(), &serde_json::from_value(object).unwrap())
        .await
        .unwrap();
    let phase = |phase: &'static str| {
        move |instance: Option<&VirtualMachineInstance>| {
            instance.and_then(|instance| instance.status.as_ref()?.phase.as_deref()) == Some(phase)
        }
    };
    let wait = await_condition(instances.clone(), "vm", phase("Running"));
    tokio::time::timeout(PATIENCE, wait).await.expect("a run").unwrap();
    let pod = stage.pod().await.name_any();
    let words = r#"{"reason":"GuestShutdown","message":"the guest powered off"}"#;
    kubelet::patch(&stage.pods(), &pod, kubelet::ended("Succeeded", 0, words)).await;
    let wait = await_condition(instances.clone(), "vm", phase("Succeeded"));
    tokio::time::timeout(PATIENCE, wait).await.expect("its end").unwrap();
    assert_eq!(stage.pod().await.name_any(), pod, "kept for its log");
    let over = stage.instance().await.status.unwrap();
    assert_eq!((over.launcher_address, &over.interfaces[0].ip_address), (None, &None));
    assert!(over.interfaces[0].ip_addresses.is_empty());
    instances.delete("vm", &DeleteParams::default()).await.unwrap();
    let gone = |instance: Option<&VirtualMachineInstance>| instance.is_none();
    tokio::time::timeout(PATIENCE, await_condition(instances, "vm", gone))
        .await
        .expect("gone")
        .unwrap();
}

async fn reconcile_name_taken(stage: &Stage) {
    let mut object =
        json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": "vm"}});
    object["spec"] = machine()["spec"]["template"]["spec"].clone();
    let instances = stage.instances();
    let other = serde_json::from_value(object).unwrap();
    instances.create(&PostParams::default(), &other).await.unwrap();
    stage.create(machine()).await;
    let taken = |machine: &VirtualMachine| {
        let mut conditions = machine.status.iter().flat_map(|status| &status.conditions);
        conditions.any(|condition| condition.reason.as_deref() == Some("InstanceNotOwned"))
    };
    stage.machine_when("a name that is taken", taken).await;
    instances.delete("vm", &DeleteParams::default()).await.unwrap();
    stage.running().await;
}

/// The pod stays on a node that does not answer, and the machine stays with it until the node is declared to be off.
async fn reconcile_lost_node(stage: &Stage) {
    let mut kubelet = Some(Kubelet::start(&stage.client, &stage.namespace).await);
    stage.create(machine()).await;
    stage.running().await;
    let first = stage.instance().await.uid();
    kubelet.take();
    let taint = |key: Value| async move {
        let nodes: Api<Node> = Api::all(stage.client.clone());
        nodes
            .patch(
                NODE,
                &PatchParams::default(),
                &Patch::Merge(json!({"spec": {"taints": key}})),
            )
            .await
            .unwrap();
    };
    taint(json!([{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}])).await;
    let pod = stage.pod().await;
    stage
        .pods()
        .delete(&pod.name_any(), &DeleteParams::default())
        .await
        .unwrap();
    let reason = |machine: &VirtualMachine| {
        let conditions = machine.status.iter().flat_map(|status| &status.conditions);
        conditions
            .into_iter()
            .any(|condition| condition.reason.as_deref() == Some("NodeUnreachable"))
    };
    stage.machine_when("a silent node", reason).await;
    assert_eq!(stage.instance().await.uid(), first, "not started elsewhere");
    let out = json!([{"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}]);
    taint(out).await;
    let again = |instance: Option<&VirtualMachineInstance>| instance.is_some_and(|instance| instance.uid() != first);
    tokio::time::timeout(PATIENCE, await_condition(stage.instances(), "vm", again))
        .await
        .expect("a new run")
        .unwrap();
    taint(Value::Null).await;
}

/// The webhooks do not answer when the launcher gets its node: the label waits for them, the status does not.
async fn reconcile_refused_label(stage: &Stage) {
    stage.create(machine()).await;
    stage
        .instance_when("launcher", |instance| phase(instance) == Some("Scheduling"))
        .await;
    let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(stage.client.clone());
    let nobody = json!({"metadata": {"name": "nobody"}, "webhooks": [{
        "name": "nobody.kubernest.io", "clientConfig": {"url": "https://127.0.0.1:1/"}, "failurePolicy": "Fail",
        "rules": [{"apiGroups": ["kubevirt.io"], "apiVersions": ["*"], "operations": ["UPDATE"],
            "resources": ["virtualmachineinstances"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": stage.namespace}},
        "sideEffects": "None", "admissionReviewVersions": ["v1"], "timeoutSeconds": 1,
    }]});
    let nobody = serde_json::from_value(nobody).unwrap();
    webhooks.create(&PostParams::default(), &nobody).await.unwrap();
    let (dry, change) = (
        PatchParams {
            dry_run: true,
            ..PatchParams::default()
        },
        json!({"metadata": {"labels": {"a": "b"}}}),
    );
    let asked = async {
        while stage
            .instances()
            .patch("vm", &dry, &Patch::Merge(&change))
            .await
            .is_ok()
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asked)
        .await
        .expect("a webhook that is asked");
    let _kubelet = Kubelet::start(&stage.client, &stage.namespace).await;
    stage.running().await;
    let instance = stage.instance().await;
    assert_eq!(instance.status.as_ref().unwrap().node_name.as_deref(), Some(NODE));
    assert_eq!(instance.labels().get("kubevirt.io/nodeName"), None);
    webhooks.delete("nobody", &DeleteParams::default()).await.unwrap();
    let labelled = |instance: &VirtualMachineInstance| instance.labels().contains_key("kubevirt.io/nodeName");
    stage.instance_when("label", labelled).await;
}

fn phase(instance: &VirtualMachineInstance) -> Option<&str> {
    instance.status.as_ref()?.phase.as_deref()
}

async fn reconcile_rest(stage: &Stage, theatre: &Theatre) {
    stage.create(machine()).await;
    stage.running().await;
    stage.controllers.kill();
    let gate = Gate::new(None);
    let restarted = Controllers::start(gated(&theatre.controllers_config().await, &gate));
    // A heartbeat of the node must not matter either.
    let nodes: Api<Node> = Api::all(stage.client.clone());
    for beat in 0..10 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let change = json!({"metadata": {"annotations": {"beat": beat.to_string()}}});
        nodes
            .patch(NODE, &PatchParams::default(), &Patch::Merge(change))
            .await
            .unwrap();
    }
    assert_eq!(gate.writes(), 0, "writes at rest");
    // It was awake all the time.
    stage.change(json!({"spec": {"runStrategy": "Halted"}})).await;
    stage
        .machine_when("stopped machine", |machine| printable(machine) == "Stopped")
        .await;
    assert!(gate.writes() > 0);
    drop(restarted);
}

/// Create, lose the pod, restart, delete: by operators that each die after so many writes, before they see the last one's answer.
///
/// With one write each, every write is followed by a death (of a launcher's Secrets, every other). To die before a write
/// leaves what dying after the previous one does.
async fn reconcile_killed(theatre: &Theatre) {
    for writes in [1, 2, 5] {
        let config = theatre.controllers_config().await;
        let nobody = Controllers::start(gated(&config, &Gate::new(Some(0))));
        nobody.kill();
        let mut stage = Stage::with_controllers(theatre, &format!("killed-after-{writes}"), nobody).await;
        stage.kubelet = Some(Kubelet::start(&stage.client, &stage.namespace).await);
        credentials::forget(&stage).await;
        let deaths = Arc::new(AtomicUsize::new(0));
        let (count, config) = (deaths.clone(), config.clone());
        let mut operators = JoinSet::new();
        operators.spawn(async move {
            let mut gate = Gate::new(Some(writes - 1));
            loop {
                let _alive = Controllers::start(gated(&config, &gate));
                gate.reached().await;
                count.fetch_add(1, Ordering::SeqCst);
                gate = gate.next();
            }
        });
        life(&stage).await;
        let deaths = deaths.load(Ordering::SeqCst);
        println!("  {writes} writes each: {deaths} operators died");
        assert!(deaths >= 3);
    }
}

async fn life(stage: &Stage) {
    stage.create(machine()).await;
    stage.running().await;
    let pod = stage.pod().await;
    stage
        .pods()
        .delete(&pod.name_any(), &DeleteParams::default())
        .await
        .unwrap();
    let uid = pod.uid();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let pods = stage.pods().list(&ListParams::default()).await.unwrap().items;
        if pods.len() == 1 && pods[0].uid() != uid {
            break;
        }
        assert!(Instant::now() < deadline, "{}: no new pod", stage.namespace);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let first = stage.instance().await.uid().unwrap();
    stage
        .ask(json!([{"action": "Stop", "uid": first}, {"action": "Start"}]))
        .await;
    requests::running_after(stage, &first).await;
    let machine = stage.running().await;
    assert_eq!(machine.status.unwrap().start_failure, None);
    credentials::assert_client_is_right(stage).await;
    credentials::assert_launcher_is_right(stage).await;
    assert_eq!(
        stage.kubelet.as_ref().unwrap().most_running.lock().unwrap()["vm"],
        1,
        "never two at once"
    );
    stage.machines().delete("vm", &DeleteParams::default()).await.unwrap();
    stage.machine_gone().await;
    stage.assert_nothing_left().await;
}
