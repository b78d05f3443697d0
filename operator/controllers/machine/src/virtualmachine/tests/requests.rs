//! What becomes of starts and stops that somebody asked for through the API.

use super::super::plan;
use super::super::requests::{faults, pending};
use super::*;

fn start() -> Value {
    json!({"action": "Start"})
}

fn start_paused() -> Value {
    json!({"action": "Start", "data": {"paused": "true"}})
}

fn stop(uid: &str) -> Value {
    json!({"action": "Stop", "uid": uid})
}

fn asked(strategy: Strategy, requests: &Value) -> VirtualMachine {
    let mut machine = machine();
    machine.spec.run_strategy = Some(strategy.as_str().to_owned());
    machine.status = Some(read(
        json!({"runStrategy": strategy.as_str(), "stateChangeRequests": requests}),
    ));
    machine
}

fn left(machine: &VirtualMachine, strategy: Strategy, instance: Option<&VirtualMachineInstance>) -> Value {
    serde_json::to_value(pending(machine, Some(strategy), instance)).unwrap()
}

/// One reconcile: its step, and the status that it leaves.
fn turn(machine: &mut VirtualMachine, strategy: Strategy, instance: Option<&VirtualMachineInstance>) -> (Step, String) {
    let strategy = Some(strategy);
    let failing = failing_of(machine, strategy, instance, at(NOW));
    let step = step(machine, strategy, instance, failing.as_ref(), at(NOW));
    let mut created = super::instance("", json!({}));
    created.metadata.uid = Some("i-2".to_owned());
    let seen = Seen {
        strategy,
        instance: if step == Step::Create { Some(&created) } else { instance },
        trouble: None,
    };
    let status = status(machine, seen, at(NOW));
    let printable = status.printable_status.clone().unwrap();
    machine.status = Some(status);
    (step, printable)
}

fn some(phase: &str) -> Option<VirtualMachineInstance> {
    Some(instance(phase, json!({})))
}

fn ending(phase: &str) -> Option<VirtualMachineInstance> {
    some(phase).map(going)
}

#[rstest]
#[case::manual_rests(Strategy::Manual, json!([]), None, Step::Rest, json!([]), "Stopped")]
#[case::manual_starts(Strategy::Manual, json!([start()]), None, Step::Create, json!([]), "Starting")]
#[case::manual_is_started(Strategy::Manual, json!([start()]), some("Running"), Step::Rest, json!([]), "Running")]
#[case::manual_stops(Strategy::Manual, json!([stop("i-1")]), some("Running"), Step::Delete, json!([stop("i-1")]), "Stopping")]
#[case::manual_is_stopping(Strategy::Manual, json!([stop("i-1")]), ending("Running"), Step::Rest, json!([stop("i-1")]), "Stopping")]
#[case::manual_is_stopped(Strategy::Manual, json!([stop("i-1")]), None, Step::Rest, json!([]), "Stopped")]
#[case::manual_stop_of_an_earlier_one(Strategy::Manual, json!([stop("i-0")]), some("Running"), Step::Rest, json!([]), "Running")]
#[case::manual_stays_over(Strategy::Manual, json!([]), some("Succeeded"), Step::Rest, json!([]), "Stopped")]
#[case::manual_stays_failed(Strategy::Manual, json!([]), some("Failed"), Step::Rest, json!([]), "Stopped")]
#[case::manual_starts_after_one_that_is_over(Strategy::Manual, json!([stop("i-1"), start()]), some("Failed"),
    Step::Delete, json!([stop("i-1"), start()]), "Starting")]
#[case::manual_restarts(Strategy::Manual, json!([stop("i-1"), start()]), some("Running"),
    Step::Delete, json!([stop("i-1"), start()]), "Stopping")]
#[case::manual_waits_for_the_old_one(Strategy::Manual, json!([stop("i-1"), start()]), ending("Running"),
    Step::Rest, json!([stop("i-1"), start()]), "Stopping")]
#[case::manual_starts_anew(Strategy::Manual, json!([stop("i-1"), start()]), None, Step::Create, json!([]), "Starting")]
#[case::always_restarts(Strategy::Always, json!([stop("i-1"), start()]), some("Running"),
    Step::Delete, json!([stop("i-1"), start()]), "Stopping")]
#[case::always_is_stopped_and_started(Strategy::Always, json!([stop("i-1")]), some("Running"),
    Step::Delete, json!([stop("i-1")]), "Stopping")]
#[case::always_starts_anew(Strategy::Always, json!([stop("i-1"), start()]), None, Step::Create, json!([]), "Starting")]
#[case::always_after_a_failure(Strategy::Always, json!([stop("i-1"), start()]), some("Failed"),
    Step::Delete, json!([stop("i-1"), start()]), "Starting")]
#[case::rerun_stops(Strategy::RerunOnFailure, json!([stop("i-1")]), some("Running"), Step::Delete, json!([stop("i-1")]), "Stopping")]
#[case::rerun_stops_one_that_failed(Strategy::RerunOnFailure, json!([stop("i-1")]), some("Failed"),
    Step::Delete, json!([stop("i-1")]), "Stopping")]
#[case::rerun_is_stopping(Strategy::RerunOnFailure, json!([stop("i-1")]), ending("Failed"), Step::Rest, json!([stop("i-1")]), "Stopping")]
#[case::rerun_is_stopped(Strategy::RerunOnFailure, json!([stop("i-1")]), None, Step::Rest, json!([]), "Stopped")]
#[case::rerun_starts(Strategy::RerunOnFailure, json!([start()]), None, Step::Create, json!([]), "Starting")]
#[case::rerun_repeats(Strategy::RerunOnFailure, json!([]), some("Failed"), Step::Delete, json!([start()]), "CrashLoopBackOff")]
#[case::rerun_starts_after_one_that_ended_well(Strategy::RerunOnFailure, json!([stop("i-1"), start()]), some("Succeeded"),
    Step::Delete, json!([stop("i-1"), start()]), "Starting")]
#[case::halted_is_stopped_faster(Strategy::Halted, json!([stop("i-1")]), ending("Running"), Step::Rest, json!([stop("i-1")]), "Stopping")]
#[case::halted_is_turned_on(Strategy::Halted, json!([start_paused()]), None, Step::TurnOn, json!([start_paused()]), "Stopped")]
#[case::halted_stays(Strategy::Halted, json!([start()]), None, Step::Rest, json!([]), "Stopped")]
#[case::once_knows_no_requests(Strategy::Once, json!([stop("i-1"), start()]), some("Running"), Step::Rest, json!([]), "Running")]
#[case::bad(Strategy::Manual, json!([{"action": "Rename"}, {"action": "Stop"}]), some("Running"), Step::Rest, json!([]), "Running")]
fn plan_requests(
    #[case] strategy: Strategy,
    #[case] requests: Value,
    #[case] instance: Option<VirtualMachineInstance>,
    #[case] expected: Step,
    #[case] pending: Value,
    #[case] printable: &str,
) {
    let mut machine = asked(strategy, &requests);
    assert_eq!(
        turn(&mut machine, strategy, instance.as_ref()),
        (expected, printable.to_owned())
    );
    let status = machine.status.clone().unwrap();
    assert_eq!(serde_json::to_value(&status.state_change_requests).unwrap(), pending);
    // At rest nothing changes.
    if expected == Step::Rest {
        turn(&mut machine, strategy, instance.as_ref());
        assert_eq!(machine.status, Some(status));
    }
}

/// However the run ends, and whatever is seen of its end.
#[rstest]
#[case("Failed")]
#[case("Succeeded")]
fn plan_a_stop_of_rerun_on_failure_lasts(#[case] phase: &str) {
    let strategy = Strategy::RerunOnFailure;
    let mut machine = asked(strategy, &json!([stop("i-1")]));
    let running = instance("Running", json!({}));
    assert_eq!(turn(&mut machine, strategy, Some(&running)).0, Step::Delete);
    let over = ran(phase, "Error", -20, 0);
    assert_eq!(turn(&mut machine, strategy, Some(&going(over))).0, Step::Rest);
    for _ in 0..2 {
        assert_eq!(
            turn(&mut machine, strategy, None),
            (Step::Rest, "Stopped".to_owned()),
            "it stays stopped"
        );
    }
    assert_eq!(machine.status.unwrap().start_failure, None, "it was asked for");
}

#[test]
fn plan_a_start_is_kept_until_an_instance_is_made() {
    for strategy in [Strategy::Manual, Strategy::Always, Strategy::RerunOnFailure] {
        let machine = asked(strategy, &json!([start_paused()]));
        assert_eq!(left(&machine, strategy, None), json!([start_paused()]));
        assert_eq!(
            left(&machine, strategy, ending("Running").as_ref()),
            json!([start_paused()])
        );
        assert_eq!(left(&machine, strategy, some("Running").as_ref()), json!([]));
    }
    let machine = asked(Strategy::RerunOnFailure, &json!([start()]));
    assert_eq!(
        left(&machine, Strategy::RerunOnFailure, some("Failed").as_ref()),
        json!([start()])
    );
    assert_eq!(pending(&machine, None, None).len(), 1, "a strategy that cannot be told");
}

/// Neither of what the operator wrote for a machine that failed, nor of what came too late.
#[test]
fn plan_a_halted_machine_is_not_turned_on_by_what_was_left_over() {
    for request in [start(), start_paused()] {
        let mut machine = asked(Strategy::RerunOnFailure, &json!([request]));
        machine.spec.run_strategy = Some("Halted".to_owned());
        assert_eq!(
            turn(&mut machine, Strategy::Halted, None),
            (Step::Rest, "Stopped".to_owned())
        );
        assert_eq!(turn(&mut machine, Strategy::Halted, None).0, Step::Rest);
    }
}

#[test]
fn plan_a_restart_does_not_wait_out_the_back_off() {
    let crashed = ran("Failed", "GuestCrashed", -20, 0);
    for strategy in [Strategy::Always, Strategy::RerunOnFailure] {
        // The API takes away the count as it asks.
        let mut machine = asked(strategy, &json!([stop("i-1"), start()]));
        assert_eq!(
            turn(&mut machine, strategy, Some(&crashed)),
            (Step::Delete, "Starting".to_owned())
        );
        assert_eq!(
            turn(&mut machine, strategy, Some(&going(crashed.clone()))).0,
            Step::Rest
        );
        assert_eq!(turn(&mut machine, strategy, None).0, Step::Create);
    }
    // Nor does a start by hand, whatever an earlier strategy counted.
    let mut machine = asked(Strategy::Manual, &json!([start()]));
    machine.status.as_mut().unwrap().start_failure = Some(failing(3, "i-0", NOW + 90));
    assert_eq!(turn(&mut machine, Strategy::Manual, None).0, Step::Create);
    assert_eq!(machine.status.unwrap().start_failure, None);
}

#[test]
fn plan_bad_requests_are_told() {
    let requests =
        json!([{"action": "Rename"}, {"action": "Stop"}, {"action": "Stop", "uid": ""}, start(), stop("i-0")]);
    let machine = asked(Strategy::Manual, &requests);
    assert_eq!(
        faults(&machine),
        [
            "there is no request \"Rename\": it must be Start or Stop",
            "a Stop request has no uid: it must name the instance to stop",
            "a Stop request has no uid: it must name the instance to stop",
        ]
    );
}

#[test]
fn plan_a_guest_that_is_probed_is_not_started_paused() {
    let mut machine = asked(Strategy::Halted, &json!([start_paused()]));
    machine.spec.template.spec.liveness_probe = read(json!({"tcpSocket": {"port": 22}}));
    assert_eq!(faults(&machine).len(), 1);
    assert_eq!(turn(&mut machine, Strategy::Halted, None).0, Step::Rest);
    assert!(machine.status.unwrap().state_change_requests.is_empty());
}

#[test]
fn build_a_paused_start_is_no_change_of_the_template() {
    let mut machine = asked(Strategy::Manual, &json!([start_paused()]));
    assert!(plan::starts_paused(&machine, Strategy::Manual));
    let mut built = build::instance(&machine, true).unwrap();
    assert_eq!(built.spec.start_strategy.as_deref(), Some("Paused"));
    assert_eq!(
        built.annotations(),
        build::instance(&machine, false).unwrap().annotations()
    );
    built.metadata.uid = Some("i-1".to_owned());
    built.status = Some(read(json!({"phase": "Running", "conditions": [
        {"type": "Paused", "status": "True", "reason": "PausedByUser"}]})));
    assert_eq!(
        turn(&mut machine, Strategy::Manual, Some(&built)),
        (Step::Rest, "Paused".to_owned())
    );
    let conditions = machine.status.clone().unwrap().conditions;
    assert!(conditions::is_true(&conditions, "Paused"));
    assert_eq!(conditions::get(&conditions, "RestartRequired"), None);
    assert!(!plan::starts_paused(&machine, Strategy::Manual), "the next one runs");
}
