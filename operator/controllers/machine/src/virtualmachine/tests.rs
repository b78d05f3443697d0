//! Tables of the machine's pure decisions: next step, back-off, what people are shown.

mod requests;

use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt;
use kubernest_crds::kubevirt::v1::{
    StartFailure, VMI_FINALIZER, VirtualMachine, VirtualMachineInstance, VirtualMachineStatus,
};
use rstest::rstest;
use serde_json::{Value, json};

use super::plan::{Step, failing as failing_of, step};
use super::status::{Seen, Trouble, status};
use super::validate::{Obstacle, Strategy, strategy};
use super::{build, failure, reasons};
use crate::conditions;

const NOW: i64 = 10_000;

fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn machine() -> VirtualMachine {
    read(json!({
        "metadata": {"name": "vm", "namespace": "n", "uid": "m-1", "generation": 3},
        "spec": {"runStrategy": "Always", "template": {
            "metadata": {"labels": {"slot": "a"}, "annotations": {"kept": "yes"}, "creationTimestamp": null},
            "spec": {"domain": {"memory": {"guest": "1Gi"}, "devices": {}}},
        }},
    }))
}

/// An instance of [`machine`] in a phase, with the rest of its status.
fn instance(phase: &str, rest: Value) -> VirtualMachineInstance {
    let mut instance = build::instance(&machine(), false).unwrap();
    instance.metadata.uid = Some("i-1".to_owned());
    let mut status = rest;
    if !phase.is_empty() {
        status["phase"] = json!(phase);
    }
    instance.status = Some(read(status));
    instance
}

fn going(mut instance: VirtualMachineInstance) -> VirtualMachineInstance {
    instance.metadata.deletion_timestamp = Some(conditions::seconds(at(NOW)));
    instance
}

fn failing(count: i32, uid: &str, retry: i64) -> StartFailure {
    StartFailure {
        consecutive_fail_count: count,
        last_failed_vmi_uid: Some(uid.to_owned()),
        retry_after_timestamp: Some(conditions::seconds(at(retry))),
    }
}

#[test]
fn build_instance_carries_template_owner_and_finalizer() {
    let built = build::instance(&machine(), false).unwrap();
    assert_eq!(
        (built.name_any(), built.namespace()),
        ("vm".to_owned(), Some("n".to_owned()))
    );
    assert_eq!(built.labels()["slot"], "a");
    assert_eq!(built.annotations()["kept"], "yes");
    assert_eq!(built.annotations()["kubevirt.io/vm-generation"], "3");
    assert_eq!(built.finalizers(), [VMI_FINALIZER]);
    let owner = &built.owner_references()[0];
    assert_eq!((owner.uid.as_str(), owner.controller), ("m-1", Some(true)));
    // The same computer at each start.
    let mut spec = machine().spec.template.spec;
    spec.domain.firmware.get_or_insert_default().uuid = Some("m-1".to_owned());
    assert_eq!(built.spec, spec);
}

#[rstest]
#[case(json!({"runStrategy": "Always"}), Ok(Strategy::Always))]
#[case(json!({"runStrategy": "Halted"}), Ok(Strategy::Halted))]
#[case(json!({"running": true}), Ok(Strategy::Always))]
#[case(json!({"running": false}), Ok(Strategy::Halted))]
#[case(json!({"running": true, "runStrategy": "Always"}), Err(Obstacle::Both))]
#[case(json!({}), Err(Obstacle::Neither))]
#[case(json!({"runStrategy": "Once"}), Ok(Strategy::Once))]
#[case(json!({"runStrategy": "RerunOnFailure"}), Ok(Strategy::RerunOnFailure))]
#[case(json!({"runStrategy": "Manual"}), Ok(Strategy::Manual))]
#[case(json!({"runStrategy": "WaitAsReceiver"}), Err(Obstacle::Strategy("WaitAsReceiver".to_owned())))]
fn validate_strategy(#[case] spec: Value, #[case] expected: Result<Strategy, Obstacle>) {
    let mut spec = spec;
    spec["template"] = json!({"spec": {"domain": {"devices": {}}}});
    assert_eq!(strategy(&read(spec)), expected);
}

#[rstest]
#[case::starts(Some(Strategy::Always), None, None, Step::Create)]
#[case::rests(Some(Strategy::Always), Some(instance("Running", json!({}))), None, Step::Rest)]
#[case::waits_out_the_back_off(Some(Strategy::Always), None, Some(failing(1, "i-0", NOW + 7)), Step::Wait(Duration::from_secs(7)))]
#[case::back_off_over(Some(Strategy::Always), None, Some(failing(1, "i-0", NOW)), Step::Create)]
#[case::failed(Some(Strategy::Always), Some(instance("Failed", json!({}))), None, Step::Delete)]
#[case::ended(Some(Strategy::Always), Some(instance("Succeeded", json!({}))), None, Step::Delete)]
#[case::is_going(Some(Strategy::Always), Some(going(instance("Failed", json!({})))), None, Step::Rest)]
#[case::halts(Some(Strategy::Halted), Some(instance("Running", json!({}))), None, Step::Delete)]
#[case::halted(Some(Strategy::Halted), None, None, Step::Rest)]
#[case::unsupported(None, Some(instance("Running", json!({}))), None, Step::Rest)]
#[case::settles(Some(Strategy::Always), Some(instance("Running", json!({"phaseTransitionTimestamps": [
    {"phase": "Running", "phaseTransitionTimestamp": at(NOW - 100).to_string()}]}))), Some(failing(1, "i-0", NOW - 110)),
    Step::Wait(Duration::from_secs(200)))]
fn plan_step(
    #[case] strategy: Option<Strategy>,
    #[case] instance: Option<VirtualMachineInstance>,
    #[case] failing: Option<StartFailure>,
    #[case] expected: Step,
) {
    assert_eq!(
        step(&machine(), strategy, instance.as_ref(), failing.as_ref(), at(NOW)),
        expected
    );
}

/// From nothing to the end of the second run: each step follows from the status that the one before left.
#[test]
fn plan_rerun_on_failure_follows_a_failed_run_and_not_one_that_ended_well() {
    let mut machine = machine();
    let strategy = Some(Strategy::RerunOnFailure);
    let mut next = |instance: Option<&VirtualMachineInstance>| {
        let failing = failing_of(&machine, strategy, instance, at(NOW));
        let step = step(&machine, strategy, instance, failing.as_ref(), at(NOW));
        let seen = Seen {
            strategy,
            instance,
            trouble: None,
        };
        machine.status = Some(status(&machine, seen, at(NOW)));
        (step, machine.status.clone().unwrap().printable_status.unwrap())
    };
    let running = instance("Running", json!({}));
    assert_eq!(next(None).0, Step::Create);
    assert_eq!(next(Some(&running)), (Step::Rest, "Running".to_owned()));
    let lost = ran("Failed", "NodeLost", -20, 0);
    assert_eq!(next(Some(&lost)), (Step::Delete, "Starting".to_owned()));
    assert_eq!(next(Some(&going(lost))).0, Step::Rest);
    assert_eq!(next(None).0, Step::Create, "a run that was cut short is repeated");
    assert_eq!(next(Some(&running)).0, Step::Rest);
    let ended = ran("Succeeded", "GuestShutdown", -20, 0);
    assert_eq!(next(Some(&ended)), (Step::Delete, "Stopped".to_owned()));
    assert_eq!(next(None), (Step::Rest, "Stopped".to_owned()), "ended well");
}

/// Neither a start that failed, nor an earlier instance that is still going, nor a back-off loses the start.
#[rstest]
#[case(Strategy::Once, None)]
#[case(Strategy::Once, Some(going(instance("Running", json!({})))))]
#[case(Strategy::RerunOnFailure, None)]
#[case(Strategy::RerunOnFailure, Some(going(instance("Running", json!({})))))]
fn plan_a_start_is_due_until_it_is_made(#[case] strategy: Strategy, #[case] before: Option<VirtualMachineInstance>) {
    let mut machine = machine();
    machine.status = Some(read(json!({"runStrategy": "Always"})));
    let seen = Seen {
        strategy: Some(strategy),
        instance: before.as_ref(),
        trouble: None,
    };
    machine.status = Some(status(&machine, seen, at(NOW)));
    assert_eq!(step(&machine, Some(strategy), None, None, at(NOW)), Step::Create);
}

#[test]
fn plan_once_starts_one_run_whatever_becomes_of_it() {
    let mut machine = machine();
    let next = |machine: &VirtualMachine, instance: Option<&VirtualMachineInstance>| {
        step(machine, Some(Strategy::Once), instance, None, at(NOW))
    };
    assert_eq!(next(&machine, None), Step::Create);
    for phase in ["Running", "Failed", "Succeeded"] {
        let instance = instance(phase, json!({}));
        assert_eq!(next(&machine, Some(&instance)), Step::Rest);
        let seen = Seen {
            strategy: Some(Strategy::Once),
            instance: Some(&instance),
            trouble: None,
        };
        machine.status = Some(status(&machine, seen, at(NOW)));
        assert_eq!(next(&machine, None), Step::Rest);
    }
}

#[test]
fn plan_deletion_waits_for_the_instance_to_be_gone() {
    let mut machine = machine();
    machine.metadata.deletion_timestamp = Some(conditions::seconds(at(NOW)));
    let running = instance("Running", json!({}));
    let next = |machine: &VirtualMachine, instance: Option<&VirtualMachineInstance>| {
        step(machine, Some(Strategy::Always), instance, None, at(NOW))
    };
    assert_eq!(next(&machine, Some(&running)), Step::Delete);
    assert_eq!(next(&machine, Some(&going(running.clone()))), Step::Rest);
    assert_eq!(next(&machine, None), Step::Release);
    machine.metadata.finalizers = Some(vec!["orphan".to_owned()]);
    assert_eq!(next(&machine, Some(&running)), Step::Release);
}

/// Times in the phases, in seconds relative to now.
fn ran(phase: &str, reason: &str, running: i64, ended: i64) -> VirtualMachineInstance {
    let times = json!([
        {"phase": "Running", "phaseTransitionTimestamp": at(NOW + running).to_string()},
        {"phase": phase, "phaseTransitionTimestamp": at(NOW + ended).to_string()},
    ]);
    instance(phase, json!({"reason": reason, "phaseTransitionTimestamps": times}))
}

#[rstest]
#[case::first(None, ran("Failed", "GuestCrashed", -20, 0), Some((1, 10)))]
#[case::second(Some(failing(1, "i-0", NOW - 60)), ran("Failed", "GuestCrashed", -20, 0), Some((2, 20)))]
#[case::sixth(Some(failing(5, "i-0", NOW - 60)), ran("Failed", "LaunchFailed", -20, 0), Some((6, 300)))]
#[case::counted_once(Some(failing(1, "i-1", NOW + 4)), ran("Failed", "GuestCrashed", -20, 0), Some((1, 4)))]
#[case::after_a_long_run(Some(failing(5, "i-0", NOW - 900)), ran("Failed", "GuestCrashed", -301, 0), Some((1, 10)))]
#[case::stopped_as_asked(None, going(ran("Failed", "OOMKilled", -20, 0)), None)]
#[case::pod_deleted(None, ran("Failed", "PodDeleted", -20, 0), None)]
#[case::node_lost(Some(failing(2, "i-0", NOW - 60)), ran("Failed", "NodeLost", -20, 0), Some((2, -60)))]
#[case::ended_well(Some(failing(2, "i-0", NOW - 60)), ran("Succeeded", "GuestShutdown", -20, 0), None)]
#[case::runs_a_while(Some(failing(2, "i-0", NOW - 60)), ran("Running", "", -20, -20), Some((2, -60)))]
#[case::runs_long(Some(failing(2, "i-0", NOW - 600)), ran("Running", "", -300, -300), None)]
fn plan_failures(
    #[case] before: Option<StartFailure>,
    #[case] instance: VirtualMachineInstance,
    #[case] expected: Option<(i32, i64)>,
) {
    let counted = failure::count(before.as_ref(), Some(&instance), at(NOW));
    let counted = counted.map(|counted| {
        (
            counted.consecutive_fail_count,
            counted.retry_after_timestamp.unwrap().0.as_second() - NOW,
        )
    });
    assert_eq!(counted, expected);
}

fn hindered(kind: &str, reason: &str) -> Value {
    json!({"conditions": [{"type": kind, "status": "False", "reason": reason, "message": "why"}]})
}

#[rstest]
#[case::stopped(Strategy::Halted, None, None, "Stopped")]
#[case::starting(Strategy::Always, Some(instance("", json!({}))), None, "Starting")]
#[case::scheduled(Strategy::Always, Some(instance("Scheduled", json!({}))), None, "Starting")]
#[case::running(Strategy::Always, Some(instance("Running", json!({}))), None, "Running")]
#[case::paused(Strategy::Always, Some(instance("Running", json!({"conditions": [{"type": "Paused", "status": "True"}]}))), None, "Paused")]
#[case::halting(Strategy::Halted, Some(instance("Running", json!({}))), None, "Stopping")]
#[case::going(Strategy::Always, Some(going(instance("Running", json!({})))), None, "Stopping")]
#[case::over_and_halted(Strategy::Halted, Some(instance("Succeeded", json!({}))), None, "Stopping")]
#[case::no_claim(
    Strategy::Always,
    Some(instance("Pending", hindered("Synchronized", "FailedPvcNotFound"))),
    None,
    "ErrorPvcNotFound"
)]
#[case::no_node(
    Strategy::Always,
    Some(instance("Scheduling", hindered("PodScheduled", "Unschedulable"))),
    None,
    "ErrorUnschedulable"
)]
#[case::no_image(
    Strategy::Always,
    Some(instance("Scheduling", hindered("Synchronized", "ErrImagePull"))),
    None,
    "ErrImagePull"
)]
#[case::no_image_for_long(
    Strategy::Always,
    Some(instance("Scheduling", hindered("Synchronized", "ImagePullBackOff"))),
    None,
    "ImagePullBackOff"
)]
#[case::crash_loop(Strategy::Always, None, Some(failing(1, "i-0", NOW + 7)), "CrashLoopBackOff")]
#[case::failed(Strategy::Always, Some(ran("Failed", "GuestCrashed", -20, 0)), None, "CrashLoopBackOff")]
#[case::disturbed(Strategy::Always, Some(ran("Failed", "PodDeleted", -20, 0)), None, "Starting")]
fn status_printable(
    #[case] strategy: Strategy,
    #[case] instance: Option<VirtualMachineInstance>,
    #[case] before: Option<StartFailure>,
    #[case] expected: &str,
) {
    let mut machine = machine();
    machine.status = Some(read(json!({"startFailure": before})));
    let seen = Seen {
        strategy: Some(strategy),
        instance: instance.as_ref(),
        trouble: None,
    };
    let first = status(&machine, seen, at(NOW));
    assert_eq!(first.printable_status.as_deref(), Some(expected));
    assert_eq!(first.created, instance.is_some());
    // At rest nothing changes.
    machine.status = Some(first.clone());
    assert_eq!(status(&machine, seen, at(NOW)), first);
    machine.metadata.deletion_timestamp = Some(conditions::seconds(at(NOW)));
    assert_eq!(
        status(&machine, seen, at(NOW)).printable_status.as_deref(),
        Some("Terminating")
    );
}

#[test]
fn status_tells_that_a_restart_is_required_and_takes_it_back() {
    let mut machine = machine();
    let running = instance("Running", json!({"conditions": [{"type": "Ready", "status": "True"}]}));
    let seen = Seen {
        strategy: Some(Strategy::Always),
        instance: Some(&running),
        trouble: None,
    };
    let required =
        |machine: &VirtualMachine| conditions::is_true(&status(machine, seen, at(NOW)).conditions, "RestartRequired");
    let same = status(&machine, seen, at(NOW));
    assert!(same.ready && conditions::is_true(&same.conditions, "Ready"));
    assert_eq!((same.observed_generation, same.desired_generation), (Some(3), Some(3)));
    assert!(!required(&machine));
    machine.spec.template.spec.domain.memory = read(json!({"guest": "2Gi"}));
    assert!(required(&machine));
    machine.status = Some(status(&machine, seen, at(NOW)));
    machine.spec.template.spec.domain.memory = read(json!({"guest": "1Gi"}));
    assert!(!required(&machine));
}

#[test]
fn status_repeats_what_the_instance_says() {
    let mut machine = machine();
    let told = json!({"conditions": [
        {"type": "Ready", "status": "False", "reason": "GuestNotRunning"}, {"type": "Failure", "status": "True"},
        {"type": "AgentConnected", "status": "True", "lastTransitionTime": at(NOW - 9).to_string()},
        {"type": "LiveMigratable", "status": "False", "reason": "NotSupported"},
    ]});
    let running = instance("Running", told);
    let seen = |instance| Seen {
        strategy: Some(Strategy::Manual),
        instance,
        trouble: None,
    };
    let first = status(&machine, seen(Some(&running)), at(NOW));
    let types: Vec<_> = first.conditions.iter().map(|condition| &*condition.type_).collect();
    assert_eq!(types, ["Ready", "AgentConnected", "LiveMigratable"]);
    assert_eq!(first.conditions[1..], running.status.as_ref().unwrap().conditions[2..]);
    machine.status = Some(first.clone());
    assert_eq!(status(&machine, seen(Some(&running)), at(NOW + 1)), first);
    let silent = instance("Running", json!({}));
    let agent = |status: &VirtualMachineStatus| conditions::get(&status.conditions, "AgentConnected").cloned();
    assert_eq!(agent(&status(&machine, seen(Some(&silent)), at(NOW))), None);
    let stopped = status(&machine, seen(None), at(NOW));
    assert_eq!((agent(&stopped), stopped.conditions.len()), (None, 1));
}

#[test]
fn status_remembers_a_failure_until_the_machine_runs() {
    let mut machine = machine();
    let shown = |machine: &VirtualMachine, instance: Option<&VirtualMachineInstance>, trouble: Option<&Trouble>| {
        status(
            machine,
            Seen {
                strategy: Some(Strategy::Always),
                instance,
                trouble,
            },
            at(NOW),
        )
    };
    let failure = |machine: &VirtualMachine| {
        let status = machine.status.as_ref().unwrap();
        conditions::get(&status.conditions, "Failure").map(|condition| condition.reason.clone().unwrap())
    };
    let crashed = ran("Failed", "GuestCrashed", -20, 0);
    machine.status = Some(shown(&machine, Some(&crashed), None));
    assert_eq!(failure(&machine).as_deref(), Some("GuestCrashed"));
    machine.status = Some(shown(&machine, None, None));
    assert_eq!(failure(&machine).as_deref(), Some("GuestCrashed"));
    machine.status = Some(shown(&machine, Some(&instance("Running", json!({}))), None));
    assert_eq!(failure(&machine), None);

    let trouble = Trouble {
        reason: reasons::FAILED_CREATE,
        message: "quota".to_owned(),
    };
    machine.status = Some(shown(&machine, None, Some(&trouble)));
    assert_eq!(failure(&machine).as_deref(), Some(reasons::FAILED_CREATE));
    machine.status = Some(shown(&machine, Some(&instance("", json!({}))), None));
    assert_eq!(failure(&machine), None);
}
