//! The pods' world in the stories: binds launcher pods to a node, reports them running and ready, ends deleted ones.
//!
//! It does what scheduler and kubelet do to a pod's object, with their API calls, and runs nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// The node that takes all pods.
pub const NODE: &str = "n1";

/// Plays scheduler and kubelet until dropped.
pub struct Kubelet {
    /// Most pods with a running container at once, by VirtualMachine name.
    pub most_running: Arc<Mutex<BTreeMap<String, usize>>>,
    _task: JoinSet<()>,
}

impl Kubelet {
    /// Makes the node, unless it is there, and starts.
    pub async fn start(client: &Client, namespace: &str) -> Self {
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": NODE, "labels": {"kubevirt.io/schedulable": "true"}}
        }))
        .unwrap();
        // Left by an earlier story.
        let _ = Api::<Node>::all(client.clone())
            .create(&PostParams::default(), &node)
            .await;
        let most_running: Arc<Mutex<BTreeMap<String, usize>>> = Arc::default();
        let mut task = JoinSet::new();
        let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
        task.spawn(play(api, most_running.clone()));
        Self {
            most_running,
            _task: task,
        }
    }
}

async fn play(api: Api<Pod>, most_running: Arc<Mutex<BTreeMap<String, usize>>>) {
    let mut running: BTreeMap<String, String> = BTreeMap::new();
    let mut pods = watcher::watcher(api.clone(), watcher::Config::default())
        .default_backoff()
        .boxed();
    while let Some(event) = pods.next().await {
        match event {
            Ok(watcher::Event::Apply(pod) | watcher::Event::InitApply(pod)) => {
                let name = pod.labels().get("vm.kubevirt.io/name").cloned().unwrap_or_default();
                if is_running(&pod) {
                    running.insert(pod.uid().unwrap(), name.clone());
                } else {
                    running.remove(&pod.uid().unwrap());
                }
                let now = running.values().filter(|running| **running == name).count();
                {
                    let mut most = most_running.lock().unwrap();
                    let most = most.entry(name).or_default();
                    *most = now.max(*most);
                }
                step(&api, &pod).await;
            }
            Ok(watcher::Event::Delete(pod)) => {
                running.remove(&pod.uid().unwrap());
            }
            _ => {}
        }
    }
}

fn is_running(pod: &Pod) -> bool {
    let containers = pod
        .status
        .iter()
        .flat_map(|status| status.container_statuses.iter().flatten());
    containers
        .filter_map(|container| container.state.as_ref())
        .any(|state| state.running.is_some())
}

/// One thing at a time, as its own write brings the next event. Losing a race is no matter.
async fn step(api: &Api<Pod>, pod: &Pod) {
    let name = pod.name_any();
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.clone())
        .unwrap_or_default();
    let over = phase == "Succeeded" || phase == "Failed";
    let bound = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
    if pod.metadata.deletion_timestamp.is_some() {
        if !over {
            patch(
                api,
                &name,
                ended("Succeeded", 0, r#"{"reason":"Stopped","message":"asked to stop"}"#),
            )
            .await;
        }
        let _ = api.delete(&name, &DeleteParams::default().grace_period(0)).await;
    } else if !bound {
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": NODE},
        });
        let _ = api
            .create_subresource::<_, Value>("binding", &name, &PostParams::default(), &binding)
            .await;
    } else if phase == "Pending" {
        patch(api, &name, running("False")).await;
        patch(api, &name, running("True")).await;
    } else if !over && (holds(pod, "Ready") != is_ready(pod)) {
        let conditions = json!([{"type": "Ready", "status": if is_ready(pod) { "True" } else { "False" }}]);
        patch(api, &name, json!({"conditions": conditions})).await;
    }
}

fn holds(pod: &Pod, condition: &str) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions
        .into_iter()
        .any(|one| one.type_ == condition && one.status == "True")
}

/// Containers and gates, as the kubelet has it.
fn is_ready(pod: &Pod) -> bool {
    let gates = pod.spec.iter().flat_map(|spec| spec.readiness_gates.iter().flatten());
    let mut gates = gates.into_iter();
    holds(pod, "ContainersReady") && gates.all(|gate| holds(pod, &gate.condition_type))
}

/// Merges into the pod's status, its conditions by their type.
pub async fn patch(api: &Api<Pod>, name: &str, status: Value) {
    let patch = Patch::Strategic(json!({"status": status}));
    let _ = api.patch_status(name, &PatchParams::default(), &patch).await;
}

/// The status of a pod whose container runs; that the pod is ready follows.
pub fn running(ready: &str) -> Value {
    json!({
        "phase": "Running", "podIP": "10.1.0.5", "podIPs": [{"ip": "10.1.0.5"}],
        "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "ContainersReady", "status": ready}],
        "containerStatuses": [container(json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}), ready == "True")],
    })
}

/// The status of a pod that is over.
pub fn ended(phase: &str, code: i32, message: &str) -> Value {
    json!({
        "phase": phase,
        "conditions": [{"type": "ContainersReady", "status": "False"}, {"type": "Ready", "status": "False"}],
        "containerStatuses": [container(json!({"terminated": {"exitCode": code, "message": message}}), false)],
    })
}

fn container(state: Value, ready: bool) -> Value {
    json!({"name": "compute", "image": "i", "imageID": "i", "ready": ready, "restartCount": 0, "state": state})
}
