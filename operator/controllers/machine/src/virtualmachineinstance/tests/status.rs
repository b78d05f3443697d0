//! What status follows from what pod and node.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kubernest_crds::kubevirt::v1::{UNPAUSED, VirtualMachineInstance, VirtualMachineInstanceStatus, phase};
use rstest::rstest;
use serde_json::{Value, json};

use super::super::apply::missing_place;
use super::super::status::{POD_SCHEDULED, Seen, status};
use super::super::validate::Obstacle;
use super::super::{ending, gate, reasons};
use super::{instance, read};
use crate::stores::NodeState;
use crate::{Emulation, conditions};

fn now() -> Timestamp {
    Timestamp::from_second(1_000).unwrap()
}

fn in_phase(phase: &str) -> VirtualMachineInstance {
    let mut instance = instance();
    if !phase.is_empty() {
        instance.status = Some(read(json!({"phase": phase})));
    }
    instance
}

fn pod(extra: Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": "p", "namespace": "org-acme", "uid": "p-1"},
        "spec": {"containers": [{"name": "compute"}], "nodeName": "n1"},
        "status": {"phase": "Running", "podIP": "10.1.0.5", "podIPs": [{"ip": "10.1.0.5"}], "qosClass": "Burstable"},
    });
    for part in ["metadata", "spec", "status"] {
        for (key, value) in extra[part].as_object().into_iter().flatten() {
            pod[part][key] = value.clone();
        }
    }
    read(pod)
}

fn container(state: Value) -> Value {
    json!([{"name": "compute", "image": "i", "imageID": "i", "ready": false, "restartCount": 0, "state": state}])
}

fn started(started: bool) -> Value {
    let mut statuses = container(json!({"running": {}}));
    statuses[0]["started"] = started.into();
    statuses
}

fn ready(status: &str) -> Value {
    json!([{"type": "ContainersReady", "status": status}, {"type": "Ready", "status": status}])
}

#[rstest]
#[case::new("", None, "Pending", reasons::POD_NOT_EXISTS)]
#[case::made_at_once("", Some(json!({"status": {"phase": "Pending"}})), "Scheduling", reasons::GUEST_NOT_RUNNING)]
#[case::made("Pending", Some(json!({"status": {"phase": "Pending"}})), "Scheduling", reasons::GUEST_NOT_RUNNING)]
#[case::says_nothing_any_more("Running", Some(json!({})), "Running", reasons::POD_CONDITION_MISSING)]
#[case::pulls("Scheduling", Some(json!({"status": {"conditions": ready("False"),
    "containerStatuses": container(json!({"waiting": {"reason": "ContainerCreating"}}))}})), "Scheduling", reasons::GUEST_NOT_RUNNING)]
#[case::boots("Scheduling", Some(json!({"status": {"conditions": ready("False"),
    "containerStatuses": container(json!({"running": {}}))}})), "Scheduled", reasons::GUEST_NOT_RUNNING)]
#[case::runs("Scheduled", Some(json!({"status": {"conditions": ready("True")}})), "Running", "")]
#[case::runs_and_is_asked("Scheduled", Some(json!({"spec": {"containers": [{"name": "compute", "startupProbe": {}}]},
    "status": {"conditions": ready("False"), "containerStatuses": started(true)}})), "Running", reasons::GUEST_NOT_RUNNING)]
#[case::is_not_asked_yet("Scheduled", Some(json!({"spec": {"containers": [{"name": "compute", "startupProbe": {}}]},
    "status": {"conditions": ready("False"), "containerStatuses": started(false)}})), "Scheduled", reasons::GUEST_NOT_RUNNING)]
#[case::does_not_answer("Running", Some(json!({"spec": {"containers": [{"name": "compute", "livenessProbe": {}}]},
    "status": {"phase": "Succeeded", "containerStatuses": container(json!({"terminated": {"exitCode": 0, "message":
        "{\"reason\":\"Stopped\",\"message\":\"as asked\"}"}}))}})), "Failed", reasons::PROBE_FAILED)]
#[case::stays("Running", Some(json!({"status": {"conditions": ready("False")}})), "Running", reasons::GUEST_NOT_RUNNING)]
#[case::going("Running", Some(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"},
    "status": {"conditions": ready("True")}})), "Running", reasons::POD_TERMINATING)]
#[case::gone("Running", None, "Failed", reasons::POD_DELETED)]
#[case::gone_early("Scheduling", None, "Failed", reasons::POD_DELETED)]
#[case::stopped_from_outside("Running", Some(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"},
    "status": {"phase": "Succeeded"}})), "Failed", reasons::POD_DELETED)]
#[case::evicted("Running", Some(json!({"status": {"phase": "Failed", "reason": "Evicted", "message": "low memory"}})),
    "Failed", reasons::POD_EVICTED)]
#[case::preempted("Running", Some(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"},
    "status": {"phase": "Succeeded", "conditions": [
        {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "preempted"}]}})),
    "Failed", reasons::POD_EVICTED)]
#[case::evicted_by_the_kubelet("Running", Some(json!({"status": {"phase": "Failed", "conditions": [
    {"type": "DisruptionTarget", "status": "True", "message": "low memory"}]}})), "Failed", reasons::POD_EVICTED)]
#[case::shutdown("Running", Some(json!({"status": {"phase": "Succeeded", "containerStatuses": container(json!(
    {"terminated": {"exitCode": 0, "message": "{\"reason\":\"GuestShutdown\",\"message\":\"powered off\"}"}}))}})),
    "Succeeded", "GuestShutdown")]
#[case::crashed("Running", Some(json!({"status": {"phase": "Failed", "containerStatuses": container(json!(
    {"terminated": {"exitCode": 1, "message": "{\"reason\":\"GuestCrashed\",\"message\":\"died\",\"serial\":[\"panic\"]}"}}))}})),
    "Failed", "GuestCrashed")]
#[case::killed("Running", Some(json!({"status": {"phase": "Failed", "containerStatuses": container(json!(
    {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}))}})), "Failed", "OOMKilled")]
#[case::killed_in_part("Running", Some(json!({"status": {"phase": "Failed", "containerStatuses": container(json!(
    {"terminated": {"exitCode": 1, "reason": "OOMKilled", "message": "{\"reason\":\"GuestCrashed\",\"message\":\"died\"}"}}))}})),
    "Failed", "OOMKilled")]
#[case::ended_well_all_the_same("Running", Some(json!({"status": {"phase": "Succeeded", "containerStatuses": container(json!(
    {"terminated": {"exitCode": 0, "reason": "OOMKilled", "message": "{\"reason\":\"GuestShutdown\",\"message\":\"off\"}"}}))}})),
    "Succeeded", "GuestShutdown")]
#[case::refused_by_the_node("Scheduling", Some(json!({"status": {"phase": "Failed", "reason": "UnexpectedAdmissionError"}})),
    "Failed", "UnexpectedAdmissionError")]
fn status_phase_and_ready(
    #[case] before: &str,
    #[case] shape: Option<Value>,
    #[case] phase: &str,
    #[case] reason: &str,
) {
    let pod = shape.map(pod);
    let seen = Seen {
        pod: pod.as_ref(),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let instance = in_phase(before);
    let first = status(&instance, seen, now());
    assert_eq!(first.phase.as_deref(), Some(phase));
    let condition = conditions::get(&first.conditions, "Ready").unwrap();
    assert_eq!(condition.reason.as_deref().unwrap_or_default(), reason);
    assert_eq!(condition.status == "True", phase == "Running" && reason.is_empty());
    if phase == "Failed" {
        assert_eq!(first.reason.as_deref(), Some(reason));
    }
    let begun: Vec<_> = first
        .phase_transition_timestamps
        .iter()
        .map(|begun| &*begun.phase)
        .collect();
    let expected: &[&str] = match (before, phase) {
        ("", "Scheduling") => &["Pending", "Scheduling"],
        _ if phase == before => &[],
        _ => &[phase],
    };
    assert_eq!(begun, expected);
    // At rest nothing changes, whatever the clock says.
    let again = VirtualMachineInstance {
        status: Some(first.clone()),
        ..instance
    };
    assert_eq!(status(&again, seen, Timestamp::from_second(9_000).unwrap()), first);
}

#[test]
fn status_keeps_the_guests_last_words() {
    let words = "{\"reason\":\"GuestCrashed\",\"message\":\"died\",\"serial\":[\"a\",\"panic\"]}";
    let pod = pod(json!({"status": {"phase": "Failed", "containerStatuses":
        container(json!({"terminated": {"exitCode": 1, "message": words}}))}}));
    let seen = Seen {
        pod: Some(&pod),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let status = status(&in_phase("Running"), seen, now());
    let ready = conditions::get(&status.conditions, "Ready").unwrap();
    assert_eq!(ready.message.as_deref(), Some("died; the guest said last: panic"));
    assert_eq!(status.console_tail.unwrap().lines, ["a", "panic"]);
}

#[test]
fn status_of_a_running_instance_is_complete() {
    let network_status = json!([
        {"name": "cbr0", "interface": "eth0", "ips": ["10.1.0.5"], "mac": "aa:aa:aa:aa:aa:aa"},
        {"name": "org-acme/customera", "interface": "tap1", "mac": "02:00:10:01:00:0b"},
    ]);
    let pod = pod(json!({
        "metadata": {"annotations": {"k8s.v1.cni.cncf.io/network-status": network_status.to_string()}},
        "status": {"conditions": ready("True")},
    }));
    let seen = Seen {
        pod: Some(&pod),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let status = status(&in_phase("Scheduled"), seen, now());
    assert_eq!(status.node_name.as_deref(), Some("n1"));
    assert_eq!(status.qos_class.as_deref(), Some("Burstable"));
    assert_eq!(
        status.active_pods,
        BTreeMap::from([("p-1".to_owned(), "n1".to_owned())])
    );
    assert_eq!(status.interfaces[0].ip_address.as_deref(), Some("10.1.0.5"));
    assert_eq!(status.interfaces[1].mac.as_deref(), Some("02:00:10:01:00:0b"));
    assert_eq!(status.interfaces[1].ip_address, None);
    let targets: Vec<_> = status
        .volume_status
        .iter()
        .map(|volume| volume.target.as_str())
        .collect();
    assert_eq!(targets, ["vda", "vdb", "", "sda"]);
    for (kind, expected) in [
        ("Synchronized", "True"),
        ("LiveMigratable", "False"),
        ("SoftwareEmulation", "True"),
    ] {
        assert_eq!(
            conditions::get(&status.conditions, kind).unwrap().status,
            expected,
            "{kind}"
        );
    }
}

#[rstest]
#[case::over(Some(json!({"status": {"phase": "Failed"}})), NodeState::Up, false)]
#[case::succeeded(Some(json!({"status": {"phase": "Succeeded"}})), NodeState::Up, false)]
#[case::gone(None, NodeState::Up, false)]
#[case::lost_with_its_node(Some(json!({})), NodeState::Dead, false)]
#[case::on_a_silent_node(Some(json!({})), NodeState::Unreachable, true)]
#[case::going(Some(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})), NodeState::Up, true)]
fn status_names_no_address_that_another_pod_may_have(
    #[case] shape: Option<Value>,
    #[case] node: NodeState,
    #[case] kept: bool,
) {
    let running = pod(json!({"status": {"conditions": ready("True")}}));
    let seen = Seen {
        pod: Some(&running),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let mut instance = in_phase("Scheduled");
    let first = status(&instance, seen, now());
    assert_eq!(first.launcher_address.as_deref(), Some("10.1.0.5"));
    instance.status = Some(first.clone());
    let later = shape.map(pod);
    let seen = Seen {
        pod: later.as_ref(),
        node,
        ..seen
    };
    let then = status(&instance, seen, now());
    let expected = kept.then_some("10.1.0.5");
    assert_eq!(then.launcher_address.as_deref(), expected);
    assert_eq!(then.interfaces[0].ip_address.as_deref(), expected);
    assert_eq!(then.interfaces[0].ip_addresses.len(), usize::from(kept));
    let known = |status: &VirtualMachineInstanceStatus| -> Vec<_> {
        let interfaces = status.interfaces.iter();
        interfaces.map(|nic| (nic.name.clone(), nic.mac.clone())).collect()
    };
    assert_eq!(known(&then), known(&first));
    // However often it is looked at, also when the pod is there after all.
    instance.status = Some(then.clone());
    assert_eq!(status(&instance, seen, now()), then);
    if !kept {
        let again = Seen {
            pod: Some(&running),
            ..seen
        };
        assert_eq!(status(&instance, again, now()).launcher_address, None);
    }
}

#[test]
fn status_tells_what_hinders_the_pod() {
    let unschedulable = pod(
        json!({"spec": {"nodeName": null}, "status": {"phase": "Pending", "conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes are available"}]}}),
    );
    let seen = Seen {
        pod: Some(&unschedulable),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let first = status(&in_phase("Scheduling"), seen, now());
    let condition = conditions::is_false(&first.conditions, POD_SCHEDULED).unwrap();
    assert_eq!(condition.message.as_deref(), Some("0/2 nodes are available"));

    let mut pinned = in_phase("Scheduling");
    pinned.spec.domain.cpu = Some(read(json!({"dedicatedCpuPlacement": true})));
    let told = status(&pinned, seen, now());
    let condition = conditions::is_false(&told.conditions, POD_SCHEDULED).unwrap();
    let message = condition.message.as_deref().unwrap();
    assert!(
        message.starts_with("0/2 nodes are available; dedicated processors need a node"),
        "{message}"
    );

    let pulls = pod(json!({"status": {"phase": "Pending", "containerStatuses":
        container(json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}))}}));
    let next = VirtualMachineInstance {
        status: Some(first),
        ..instance()
    };
    let seen = Seen {
        pod: Some(&pulls),
        ..seen
    };
    let second = status(&next, seen, now());
    assert_eq!(conditions::get(&second.conditions, POD_SCHEDULED), None);
    let condition = conditions::is_false(&second.conditions, "Synchronized").unwrap();
    assert_eq!(condition.reason.as_deref(), Some("ImagePullBackOff"));

    let obstacle = Obstacle::ClaimMissing("data".to_owned());
    let seen = Seen {
        pod: None,
        obstacle: Some(&obstacle),
        ..seen
    };
    let pending = status(&in_phase(""), seen, now());
    assert_eq!(pending.phase.as_deref(), Some(phase::PENDING));
    let condition = conditions::is_false(&pending.conditions, "Synchronized").unwrap();
    assert_eq!(condition.reason.as_deref(), Some(reasons::PVC_NOT_FOUND));
}

#[rstest]
#[case::runs(json!({"containerStatuses": container(json!({"running": {}}))}), NodeState::Up, false)]
#[case::node_silent(json!({"containerStatuses": container(json!({"running": {}}))}), NodeState::Unreachable, false)]
#[case::node_off(json!({"containerStatuses": container(json!({"running": {}}))}), NodeState::Dead, true)]
#[case::declared_failed_only(json!({"phase": "Failed", "containerStatuses": container(json!({"running": {}}))}), NodeState::Up, false)]
#[case::ended(json!({"phase": "Failed", "containerStatuses": container(json!({"terminated": {"exitCode": 0}}))}), NodeState::Up, true)]
#[case::never_admitted(json!({"phase": "Failed"}), NodeState::Up, true)]
fn status_process_is_surely_gone(#[case] shape: Value, #[case] node: NodeState, #[case] gone: bool) {
    assert_eq!(ending::surely_ended(&pod(json!({"status": shape})), node), gone);
}

#[test]
fn status_a_lost_node_fails_the_run_and_a_silent_one_does_not() {
    let pod = pod(json!({"status": {"conditions": ready("False")}}));
    let seen = Seen {
        pod: Some(&pod),
        node: NodeState::Unreachable,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let silent = status(&in_phase("Running"), seen, now());
    assert_eq!(silent.phase.as_deref(), Some("Running"));
    assert_eq!(
        conditions::get(&silent.conditions, "Ready").unwrap().reason.as_deref(),
        Some(reasons::NODE_UNREACHABLE)
    );
    let dead = status(
        &in_phase("Running"),
        Seen {
            node: NodeState::Dead,
            ..seen
        },
        now(),
    );
    assert_eq!(
        (dead.phase.as_deref(), dead.reason.as_deref()),
        (Some("Failed"), Some(reasons::NODE_LOST))
    );
}

#[test]
fn status_a_guest_started_paused_is_told_once() {
    let running = pod(json!({"status": {"conditions": ready("True")}}));
    let seen = Seen {
        pod: Some(&running),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let mut instance = in_phase("Scheduled");
    assert_eq!(
        conditions::get(&status(&instance, seen, now()).conditions, "Paused"),
        None
    );
    instance.spec.start_strategy = Some("Paused".to_owned());
    let first = status(&instance, seen, now());
    assert_eq!(first.phase.as_deref(), Some("Running"));
    assert_eq!(first.launcher_address.as_deref(), Some("10.1.0.5"));
    let paused = conditions::get(&first.conditions, "Paused").unwrap();
    assert_eq!(
        (
            paused.status.as_str(),
            paused.reason.as_deref(),
            paused.message.as_deref()
        ),
        ("True", Some("PausedByUser"), Some("the guest was started paused"))
    );
    instance.status = Some(first.clone());
    assert_eq!(status(&instance, seen, now()), first);
    // Somebody unpaused it.
    conditions::clear(&mut instance.status.as_mut().unwrap().conditions, "Paused");
    assert_eq!(
        conditions::get(&status(&instance, seen, now()).conditions, "Paused"),
        None
    );
    // Nothing is paused that does not run any more.
    instance.status = Some(first);
    let over = pod(json!({"status": {"phase": "Failed"}}));
    let over = status(
        &instance,
        Seen {
            pod: Some(&over),
            ..seen
        },
        now(),
    );
    assert_eq!(conditions::get(&over.conditions, "Paused"), None);
}

fn gated(conditions: Value) -> Pod {
    pod(json!({"spec": {"readinessGates": [{"conditionType": UNPAUSED}]}, "status": {"conditions": conditions}}))
}

fn seen(pod: &Pod) -> Seen<'_> {
    Seen {
        pod: Some(pod),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    }
}

#[test]
fn status_a_guest_that_stands_still_is_not_ready() {
    let open = gated(ready("True"));
    let shut = gated(json!([
        {"type": "ContainersReady", "status": "True"},
        {"type": "Ready", "status": "False", "reason": "ReadinessGatesNotReady"},
        {"type": UNPAUSED, "status": "False"},
    ]));
    let readiness = |instance: &VirtualMachineInstance, pod: &Pod| {
        let status = status(instance, seen(pod), now());
        let ready = conditions::get(&status.conditions, "Ready").unwrap().clone();
        (status, ready.status, ready.reason.unwrap_or_default())
    };
    let mut instance = in_phase("Running");
    instance.status.as_mut().unwrap().conditions = read(json!([{"type": "Paused", "status": "True"}]));
    // Before the pod says so, and no other word of it afterwards.
    let (first, status, reason) = readiness(&instance, &open);
    assert_eq!((&*status, &*reason), ("False", reasons::GATES_NOT_READY));
    instance.status = Some(first.clone());
    assert_eq!(readiness(&instance, &shut).0, first);
    conditions::clear(&mut instance.status.as_mut().unwrap().conditions, "Paused");
    let (after, status, _) = readiness(&instance, &shut);
    assert_eq!(
        (&*status, after.conditions.len()),
        ("False", first.conditions.len() - 1)
    );
    assert_eq!(readiness(&instance, &open).1, "True");
    // One that is started paused has no such pod that is Ready, and is found to run nevertheless.
    let mut instance = in_phase("Scheduled");
    instance.spec.start_strategy = Some("Paused".to_owned());
    let (started, status, reason) = readiness(&instance, &shut);
    assert_eq!(started.phase.as_deref(), Some("Running"));
    assert_eq!((&*status, &*reason), ("False", reasons::GATES_NOT_READY));
}

#[rstest]
#[case::made("Scheduling", json!({}), json!([]), Some("True"))]
#[case::open("Running", json!({}), json!([{"type": UNPAUSED, "status": "True"}]), None)]
#[case::paused("Running", json!({"paused": true}), json!([{"type": UNPAUSED, "status": "True"}]), Some("False"))]
#[case::stays_paused("Running", json!({"paused": true}), json!([{"type": UNPAUSED, "status": "False"}]), None)]
#[case::goes_on("Running", json!({}), json!([{"type": UNPAUSED, "status": "False"}]), Some("True"))]
#[case::starts_paused("Scheduled", json!({"starts_paused": true}), json!([]), None)]
#[case::started_paused("Running", json!({"starts_paused": true, "paused": true}), json!([]), None)]
#[case::started_paused_and_unpaused("Running", json!({"starts_paused": true}), json!([]), Some("True"))]
#[case::over("Succeeded", json!({}), json!([]), None)]
#[case::is_stopped("Scheduling", json!({"deleted": true}), json!([]), None)]
fn plan_readiness_gate_follows_the_guest(
    #[case] phase: &str,
    #[case] which: Value,
    #[case] has: Value,
    #[case] expected: Option<&str>,
) {
    let mut instance = in_phase(phase);
    instance.spec.start_strategy = which["starts_paused"].as_bool().map(|_| "Paused".to_owned());
    instance.metadata.deletion_timestamp = which["deleted"].as_bool().map(|_| conditions::seconds(now()));
    let mut status = instance.status.clone().unwrap();
    if which["paused"].is_boolean() {
        status.conditions = read(json!([{"type": "Paused", "status": "True"}]));
    }
    let change = gate::change(&instance, &status, &gated(has.clone()), now());
    assert_eq!(change.map(|condition| condition.status).as_deref(), expected);
    let older = pod(json!({"status": {"conditions": has}}));
    assert_eq!(gate::change(&instance, &status, &older, now()), None, "it has no gate");
}

#[test]
fn status_keeps_what_the_agent_told() {
    let mut instance = in_phase("Running");
    let told = instance.status.as_mut().unwrap();
    told.guest_os_info = Some(read(json!({"id": "tiny"})));
    told.conditions
        .push(read(json!({"type": "AgentConnected", "status": "True"})));
    let (told, runs) = (told.clone(), pod(json!({"status": {"conditions": ready("True")}})));
    let seen = |pod| Seen {
        pod: Some(pod),
        node: NodeState::Up,
        obstacle: None,
        emulation: Emulation::Auto,
    };
    let agent = |status: &VirtualMachineInstanceStatus| {
        let condition = conditions::get(&status.conditions, "AgentConnected").cloned();
        (condition, status.guest_os_info.clone())
    };
    assert_eq!(agent(&status(&instance, seen(&runs), now())), agent(&told));
    let over = pod(json!({"status": {"phase": "Failed"}}));
    // It is connected no more; what ran there stays said, for an apply could not take it away.
    assert_eq!(
        agent(&status(&instance, seen(&over), now())),
        (None, told.guest_os_info)
    );
}

#[test]
fn status_keeps_what_the_agent_told_of_interfaces() {
    let runs = pod(json!({"status": {"conditions": ready("True")}}));
    let mut instance = in_phase("Running");
    instance.status = Some(status(&instance, seen(&runs), now()));
    let told = instance.status.as_mut().unwrap();
    for (interface, name) in told.interfaces.iter_mut().zip(["eth0", "eth1"]) {
        interface.interface_name = Some(name.to_owned());
        interface.set_told_by_agent(true);
    }
    told.interfaces[1].ip_address = Some("192.168.7.9".to_owned());
    told.interfaces[1].ip_addresses = vec!["192.168.7.9".to_owned()];
    let told = told.clone();
    assert_eq!(told.interfaces[0].info_source.as_deref(), Some("domain, guest-agent"));
    assert_eq!(status(&instance, seen(&runs), now()), told);
    let over = pod(json!({"status": {"phase": "Failed"}}));
    let over = status(&instance, seen(&over), now()).interfaces;
    assert!(
        over.iter()
            .all(|interface| interface.ip_address.is_none() && interface.ip_addresses.is_empty())
    );
}

#[rstest]
#[case::over_and_kept_for_its_log(None, 60, json!({"status": {"phase": "Succeeded"}}), None)]
#[case::over_and_asked(Some(()), 60, json!({"status": {"phase": "Succeeded"}}), Some(75))]
#[case::asked(Some(()), 60, json!({}), Some(75))]
#[case::goes(Some(()), 60, going_in(75), None)]
#[case::goes_faster_already(Some(()), 60, going_in(5), None)]
#[case::shortened(Some(()), 10, going_in(75), Some(10))]
#[case::shortened_before(Some(()), 10, json!({}), Some(10))]
#[case::forced(Some(()), 0, going_in(75), Some(1))]
#[case::forced_already(Some(()), 0, going_in(1), None)]
#[case::lengthened(Some(()), 600, going_in(75), None)]
#[case::goes_by_other_hands(None, 0, going_in(75), None)]
fn plan_pod_is_deleted_with_the_grace_of_the_moment(
    #[case] asked: Option<()>,
    #[case] grace: i64,
    #[case] shape: Value,
    #[case] expected: Option<u32>,
) {
    let mut instance = in_phase("Running");
    instance.spec.termination_grace_period_seconds = Some(grace);
    instance.metadata.deletion_timestamp = asked.map(|()| conditions::seconds(now()));
    let mut pod = pod(shape);
    pod.spec.as_mut().unwrap().termination_grace_period_seconds = Some(75);
    assert_eq!(ending::deletion(&instance, &pod, NodeState::Up), expected);
}

fn going_in(seconds: i64) -> Value {
    json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": seconds}})
}

#[rstest]
#[case::placed(json!({}), json!({"phase": "Running", "nodeName": "n1"}), Some("n1"))]
#[case::placed_already(json!({"labels": {"kubevirt.io/nodeName": "n1"}}), json!({"nodeName": "n1"}), None)]
#[case::nowhere_yet(json!({}), json!({"phase": "Scheduling"}), None)]
#[case::over(json!({}), json!({"phase": "Succeeded", "nodeName": "n1"}), None)]
#[case::going(json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}), json!({"nodeName": "n1"}), None)]
#[case::as_long_as_labels(json!({}), json!({"nodeName": "n".repeat(63)}), Some("nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn"))]
#[case::longer_than_labels(json!({}), json!({"nodeName": "n".repeat(64)}), None)]
fn status_place(#[case] metadata: Value, #[case] status: Value, #[case] label: Option<&str>) {
    let instance = VirtualMachineInstance {
        metadata: read(metadata),
        ..instance()
    };
    let status: VirtualMachineInstanceStatus = read(status);
    assert_eq!(missing_place(&instance, &status).map(String::as_str), label);
}
