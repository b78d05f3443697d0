//! Stories of starts, stops and restarts that somebody asks for through the API.

use std::time::Duration;

use futures::FutureExt;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use kube::api::{ListParams, Patch, PatchParams};
use kube::runtime::wait::await_condition;
use kube::{Api, ResourceExt};
use kubernest_crds::kubevirt::v1::{UNPAUSED, VirtualMachine, VirtualMachineInstance};
use serde_json::{Value, json};

use crate::story;
use crate::support::kubelet::Kubelet;
use crate::support::stage::{PATIENCE, Stage, Theatre, machine, printable, ready};

/// Tells all of them.
pub async fn tell(theatre: &Theatre) {
    let stage = |name: &'static str| Stage::set(theatre, name);
    story("manual", reconcile_manual(&stage("manual").await).boxed()).await;
    story("restart", reconcile_restart(&stage("restart").await).boxed()).await;
    story("a stop lasts", reconcile_stop_lasts(&stage("stop").await).boxed()).await;
    story("pause", reconcile_pause(&stage("pause").await).boxed()).await;
    story("start paused", reconcile_start_paused(&stage("paused").await).boxed()).await;
    story(
        "bad request",
        reconcile_bad_request(&stage("bad-request").await).boxed(),
    )
    .await;
    let hanging = Stage::without_kubelet(theatre, "forced").await;
    story("forced stop", reconcile_forced_stop(&hanging).boxed()).await;
}

fn with(strategy: &str) -> Value {
    let mut machine = machine();
    machine["spec"]["runStrategy"] = json!(strategy);
    machine
}

fn nothing_asked(machine: &VirtualMachine) -> bool {
    let status = machine.status.as_ref();
    status.is_some_and(|status| status.state_change_requests.is_empty())
}

async fn uid(stage: &Stage) -> String {
    stage.instance().await.uid().unwrap()
}

async fn stopped(stage: &Stage) -> VirtualMachine {
    let stopped = stage.machine_when("stopped machine", |machine| {
        printable(machine) == "Stopped" && nothing_asked(machine)
    });
    let stopped = stopped.await;
    assert_eq!(stage.instances().get_opt("vm").await.unwrap(), None);
    let pods = stage.pods().list(&ListParams::default()).await.unwrap();
    assert!(pods.items.is_empty());
    stopped
}

/// Waits for an instance other than `before` to run, and for all that was asked to be done.
pub async fn running_after(stage: &Stage, before: &str) -> VirtualMachineInstance {
    let again = |instance: &VirtualMachineInstance| {
        let status = instance.status.as_ref();
        instance.uid().as_deref() != Some(before)
            && status.and_then(|status| status.phase.as_deref()) == Some("Running")
    };
    let instance = stage.instance_when("next run", again).await;
    stage
        .machine_when("next run", |machine| {
            printable(machine) == "Running" && nothing_asked(machine)
        })
        .await;
    instance
}

/// Waits until the controllers have looked at the machine once more: they drop a request about an instance that is not there.
async fn looked_at_again(stage: &Stage) {
    stage.ask(json!([{"action": "Stop", "uid": "nobody"}])).await;
    stage.machine_when("dropped request", nothing_asked).await;
}

async fn reconcile_manual(stage: &Stage) {
    stage.create(with("Manual")).await;
    stopped(stage).await;
    stage.ask(json!([{"action": "Start"}])).await;
    let first = running_after(stage, "").await.uid().unwrap();
    stage
        .ask(json!([{"action": "Stop", "uid": first}, {"action": "Start"}]))
        .await;
    let second = running_after(stage, &first).await.uid().unwrap();
    let most = stage.kubelet.as_ref().unwrap().most_running.lock().unwrap()["vm"];
    assert_eq!(most, 1, "never two at once");
    // Too late.
    stage.ask(json!([{"action": "Stop", "uid": first}])).await;
    stage.machine_when("dropped request", nothing_asked).await;
    assert_eq!(uid(stage).await, second);
    stage.ask(json!([{"action": "Stop", "uid": second}])).await;
    stopped(stage).await;
    stage.ask(json!([{"action": "Start"}])).await;
    running_after(stage, &second).await;
}

async fn reconcile_restart(stage: &Stage) {
    stage.create(with("Always")).await;
    stage.running().await;
    let first = uid(stage).await;
    stage
        .ask(json!([{"action": "Stop", "uid": first}, {"action": "Start"}]))
        .await;
    running_after(stage, &first).await;
    let status = stage.running().await.status.unwrap();
    assert_eq!(status.start_failure, None, "a restart is no failure");
}

async fn reconcile_stop_lasts(stage: &Stage) {
    stage.create(with("RerunOnFailure")).await;
    stage.running().await;
    let first = uid(stage).await;
    stage.ask(json!([{"action": "Stop", "uid": first}])).await;
    let before = stopped(stage).await;
    looked_at_again(stage).await;
    assert_eq!(before.status, stopped(stage).await.status, "nothing changes");
    stage.ask(json!([{"action": "Start"}])).await;
    running_after(stage, &first).await;
}

async fn reconcile_start_paused(stage: &Stage) {
    let mut machine = machine();
    machine["spec"].as_object_mut().unwrap().remove("runStrategy");
    machine["spec"]["running"] = json!(false);
    stage.create(machine).await;
    stopped(stage).await;
    let paused = json!([{"action": "Start", "data": {"paused": "true"}}]);
    stage.ask(paused.clone()).await;
    let shown = |machine: &VirtualMachine| printable(machine) == "Paused" && nothing_asked(machine);
    let machine = stage.machine_when("paused machine", shown).await;
    assert_eq!((machine.spec.running, machine.spec.run_strategy), (Some(true), None));
    let conditions = machine.status.unwrap().conditions;
    assert!(conditions.iter().all(|condition| condition.type_ != "RestartRequired"));
    let instance = stage.instance().await;
    assert_eq!(instance.spec.start_strategy.as_deref(), Some("Paused"));
    assert!(gate_of(stage).await.is_none(), "no Service has it before it goes on");
    unpause(stage, &instance).await;
    let running = stage.running().await;
    looked_at_again(stage).await;
    let now = stage.machines().get("vm").await.unwrap();
    assert_eq!(printable(&now), "Running", "it is not paused again");
    assert_eq!(running.status, now.status, "nothing changes");
    // A strategy is set to the same word.
    let change = json!({"spec": {"running": null, "runStrategy": "Halted"}});
    stage.change(change).await;
    stopped(stage).await;
    stage.ask(paused).await;
    let machine = stage.machine_when("paused machine", shown).await;
    assert_eq!(machine.spec.run_strategy.as_deref(), Some("Always"));
}

/// The condition of its pod's readiness gate.
async fn gate_of(stage: &Stage) -> Option<String> {
    let conditions = stage.pod().await.status.unwrap().conditions.unwrap_or_default();
    let mut conditions = conditions.into_iter();
    let gate = conditions.find(|condition| condition.type_ == UNPAUSED)?;
    Some(gate.status)
}

/// A machine that is paused is not ready, and in no Service, until it goes on.
async fn reconcile_pause(stage: &Stage) {
    stage.create(with("Always")).await;
    stage.running().await;
    assert_eq!(gate_of(stage).await.as_deref(), Some("True"));
    let paused = json!([{"op": "add", "path": "/status/conditions/-", "value": {"type": "Paused", "status": "True"}}]);
    let paused = Patch::<()>::Json(serde_json::from_value(paused).unwrap());
    let params = PatchParams::default();
    stage.instances().patch_status("vm", &params, &paused).await.unwrap();
    let shown = stage.machine_when("paused machine", |machine| {
        printable(machine) == "Paused" && !ready(machine)
    });
    let conditions = shown.await.status.unwrap().conditions;
    let told = conditions.iter().find(|condition| condition.type_ == "Ready").unwrap();
    assert_eq!(told.reason.as_deref(), Some("ReadinessGatesNotReady"));
    let unready = |pod: Option<&Pod>| {
        let conditions = pod.and_then(|pod| pod.status.as_ref()?.conditions.as_ref());
        let mut conditions = conditions.into_iter().flatten();
        conditions.any(|condition| condition.type_ == "Ready" && condition.status == "False")
    };
    let pod = stage.pod().await.name_any();
    let wait = await_condition(stage.pods(), &pod, unready);
    tokio::time::timeout(PATIENCE, wait)
        .await
        .expect("an unready pod")
        .unwrap();
    assert_eq!(gate_of(stage).await.as_deref(), Some("False"));
    unpause(stage, &stage.instance().await).await;
    stage.running().await;
}

/// As `kubernest-api` does once the launcher unpaused the guest.
async fn unpause(stage: &Stage, instance: &VirtualMachineInstance) {
    let mut conditions = instance.status.clone().unwrap().conditions;
    conditions.retain(|condition| condition.type_ != "Paused");
    let patch = json!([{"op": "replace", "path": "/status/conditions", "value": conditions}]);
    let patch = Patch::<()>::Json(serde_json::from_value(patch).unwrap());
    let params = PatchParams::default();
    stage.instances().patch_status("vm", &params, &patch).await.unwrap();
}

async fn reconcile_bad_request(stage: &Stage) {
    stage.create(with("Manual")).await;
    stopped(stage).await;
    stage.ask(json!([{"action": "Rename"}, {"action": "Stop"}])).await;
    stage.machine_when("dropped requests", nothing_asked).await;
    let events: Api<Event> = Api::namespaced(stage.client.clone(), &stage.namespace);
    let told = async {
        loop {
            let mut events = events.list(&ListParams::default()).await.unwrap().items.into_iter();
            let told = events.find(|event| event.reason.as_deref() == Some("InvalidStateChangeRequest"));
            if let Some(told) = told {
                break told.note.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let told = tokio::time::timeout(PATIENCE, told).await.expect("a warning");
    assert!(told.contains("\"Rename\"") && told.contains("has no uid"), "{told}");
}

/// A guest hangs in its shutdown, and somebody loses patience.
async fn reconcile_forced_stop(stage: &Stage) {
    let mut kubelet = Some(Kubelet::start(&stage.client, &stage.namespace).await);
    let mut machine = machine();
    machine["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = json!(600);
    stage.create(machine).await;
    stage.running().await;
    kubelet.take();
    stage.change(json!({"spec": {"runStrategy": "Halted"}})).await;
    let pod = stage.pod().await.name_any();
    let given = |seconds: i64| {
        let wait = await_condition(stage.pods(), &pod, move |pod: Option<&Pod>| {
            pod.and_then(|pod| pod.metadata.deletion_grace_period_seconds) == Some(seconds)
        });
        async move {
            let waited = tokio::time::timeout(PATIENCE, wait).await;
            waited.unwrap_or_else(|_| panic!("no {seconds} s")).unwrap();
        }
    };
    given(615).await;
    let grace = |seconds: i64| {
        let change = Patch::Merge(json!({"spec": {"terminationGracePeriodSeconds": seconds}}));
        async move {
            let params = PatchParams::default();
            stage.instances().patch("vm", &params, &change).await.unwrap();
        }
    };
    grace(30).await;
    given(30).await;
    grace(0).await;
    given(1).await;
    let _kubelet = Kubelet::start(&stage.client, &stage.namespace).await;
    stopped(stage).await;
}
