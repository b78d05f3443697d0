//! What a person would look at first when a bed or a test fails: nodes, pods, events, the last lines of logs.
//!
//! It deliberately never fails: what cannot be read is said in the report.

use std::fmt::Write;

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Event, Node, Pod},
};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, LogParams},
};

use crate::{bed::Testbed, clean};

/// Lines of each log and numbers of events in the report.
const LINES: usize = 25;
const EVENTS: usize = 40;

/// Whether the kubelet says that it is ready.
pub(crate) fn node_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// Whether all wanted replicas run.
pub(crate) fn available(deployment: &Deployment) -> bool {
    let wanted = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    let status = deployment.status.as_ref();
    status.and_then(|s| s.available_replicas).unwrap_or_default() >= wanted
        && status.and_then(|s| s.observed_generation) >= deployment.metadata.generation
}

/// The whole report.
pub(crate) async fn report(bed: &Testbed) -> String {
    let mut out = format!("== bed {} ==\n", bed.plan.name());
    for line in clean::summary(bed.plan.name()).await {
        writeln!(out, "{line}").ok();
    }
    match bed.client().await {
        Ok(client) => cluster(&mut out, &client).await,
        Err(e) => drop(writeln!(out, "no client: {e}")),
    }
    let logs = std::fs::read_dir(bed.dir.logs())
        .map(|d| d.flatten().collect::<Vec<_>>())
        .unwrap_or_default();
    // Writes are counted in the audit log; nobody reads it.
    for log in logs.into_iter().filter(|log| log.path() != bed.audit_log()) {
        let bytes = std::fs::read(log.path()).unwrap_or_default();
        let tail = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(64 * 1024)..]).into_owned();
        writeln!(out, "== {} ==", log.path().display()).ok();
        last(&mut out, &tail);
    }
    out
}

async fn cluster(out: &mut String, client: &Client) {
    let all = ListParams::default();
    match Api::<Node>::all(client.clone()).list(&all).await {
        Err(e) => drop(writeln!(out, "nodes cannot be listed: {e}")),
        Ok(nodes) => {
            for node in nodes {
                let conditions = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
                let text: Vec<String> = conditions.map(|c| format!("{}={}", c.type_, c.status)).collect();
                writeln!(out, "node {}: {}", node.name_any(), text.join(" ")).ok();
            }
        }
    }
    match Api::<Pod>::all(client.clone()).list(&all).await {
        Err(e) => drop(writeln!(out, "pods cannot be listed: {e}")),
        Ok(pods) => {
            for one in pods.items.iter().filter(|p| !pod_ready(p)) {
                pod(out, client, one).await;
            }
        }
    }
    match Api::<Event>::all(client.clone()).list(&all).await {
        Err(e) => drop(writeln!(out, "events cannot be listed: {e}")),
        Ok(mut events) => {
            events.items.sort_by_key(|e| {
                e.last_timestamp
                    .as_ref()
                    .or(e.metadata.creation_timestamp.as_ref())
                    .map(|t| t.0)
            });
            writeln!(out, "== events ==").ok();
            for e in events.items.iter().rev().take(EVENTS).rev() {
                let object = &e.involved_object;
                let about = [&object.kind, &object.namespace, &object.name]
                    .map(|p| p.as_deref().unwrap_or_default())
                    .join("/");
                let (reason, message) = (
                    e.reason.as_deref().unwrap_or_default(),
                    e.message.as_deref().unwrap_or_default(),
                );
                writeln!(out, "{about}: {reason}: {message}").ok();
            }
        }
    }
}

fn pod_ready(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let ready = status
        .and_then(|s| s.conditions.as_ref())
        .is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"));
    ready || status.and_then(|s| s.phase.as_deref()) == Some("Succeeded")
}

async fn pod(out: &mut String, client: &Client, pod: &Pod) {
    let (name, namespace) = (pod.name_any(), pod.namespace().unwrap_or_default());
    let status = pod.status.clone().unwrap_or_default();
    writeln!(
        out,
        "== pod {namespace}/{name}: {} ==",
        status.phase.unwrap_or_default()
    )
    .ok();
    for c in status.conditions.iter().flatten().filter(|c| c.status != "True") {
        writeln!(
            out,
            "{}={} {}",
            c.type_,
            c.status,
            c.message.as_deref().unwrap_or_default()
        )
        .ok();
    }
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    for container in status
        .init_container_statuses
        .iter()
        .chain(status.container_statuses.iter())
        .flatten()
    {
        writeln!(
            out,
            "container {}: {}",
            container.name,
            serde_json::to_string(&container.state).unwrap_or_default()
        )
        .ok();
        let params = LogParams {
            container: Some(container.name.clone()),
            tail_lines: Some(LINES as i64),
            ..LogParams::default()
        };
        if let Ok(log) = api.logs(&name, &params).await {
            last(out, &log);
        }
    }
}

fn last(out: &mut String, log: &str) {
    let lines: Vec<&str> = log.lines().collect();
    for line in &lines[lines.len().saturating_sub(LINES)..] {
        writeln!(out, "  {line}").ok();
    }
}
