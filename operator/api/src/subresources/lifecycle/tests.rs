use super::*;

fn machine(strategy: &str) -> VirtualMachine {
    serde_json::from_value(json!({
        "metadata": {"name": "vm", "resourceVersion": "7"},
        "spec": {"runStrategy": strategy, "template": {"spec": {"domain": {"devices": {}}}}},
        "status": {"printableStatus": "Stopped"},
    }))
    .unwrap()
}

fn instance(phase: &str) -> VirtualMachineInstance {
    serde_json::from_value(json!({
        "metadata": {"name": "vm", "uid": "u1", "resourceVersion": "9"},
        "spec": {"domain": {"devices": {}}, "terminationGracePeriodSeconds": 30},
        "status": {"phase": phase},
    }))
    .unwrap()
}

type Verdict = Result<Change, Failure>;

fn started(strategy: &str, phase: Option<&str>, paused: bool) -> Verdict {
    let (machine, instance) = (machine(strategy), phase.map(instance));
    let found = Found {
        machine: &machine,
        instance: instance.as_ref(),
    };
    start(
        found,
        &StartOptions {
            paused,
            ..StartOptions::default()
        },
    )
}

fn stopped(strategy: &str, phase: Option<&str>, grace_period: Option<i64>) -> Verdict {
    let (machine, instance) = (machine(strategy), phase.map(instance));
    let found = Found {
        machine: &machine,
        instance: instance.as_ref(),
    };
    stop(
        found,
        &StopOptions {
            grace_period,
            ..StopOptions::default()
        },
    )
}

fn restarted(strategy: &str, phase: Option<&str>, grace_period_seconds: Option<i64>) -> Verdict {
    let (machine, instance) = (machine(strategy), phase.map(instance));
    let found = Found {
        machine: &machine,
        instance: instance.as_ref(),
    };
    restart(
        found,
        &RestartOptions {
            grace_period_seconds,
            ..RestartOptions::default()
        },
    )
}

fn refusal(verdict: Verdict) -> String {
    let failure = verdict.unwrap_err();
    format!(
        "{} {}",
        failure.code.as_u16(),
        failure.message.rsplit(": ").next().unwrap()
    )
}

/// The value of the patch's last operation; the first holds it to the version that was read.
fn written(patch: Option<Value>) -> Value {
    let operations = patch.unwrap();
    let operations = operations.as_array().unwrap();
    assert_eq!(operations[0]["op"], "test");
    operations.last().unwrap()["value"].clone()
}

#[test]
fn lifecycle_start_follows_the_strategy() {
    assert_eq!(written(started("Halted", None, false).unwrap().machine), "Always");
    assert_eq!(
        written(started("Halted", None, true).unwrap().status),
        json!([{"action": "Start", "data": {"paused": "true"}}])
    );
    assert_eq!(
        written(started("Manual", None, false).unwrap().status),
        json!([{"action": "Start"}])
    );
    assert_eq!(
        written(started("Manual", Some("Succeeded"), false).unwrap().status),
        json!([{"action": "Stop", "uid": "u1"}, {"action": "Start"}])
    );
    assert_eq!(
        refusal(started("RerunOnFailure", Some("Failed"), false)),
        "409 RerunOnFailure does not support starting VM from failed state"
    );
    assert_eq!(
        refusal(started("Always", None, false)),
        "409 Always does not support manual start requests"
    );
    assert_eq!(
        refusal(started("Once", None, false)),
        "409 Once does not support manual start requests"
    );
    assert_eq!(
        refusal(started("Manual", Some("Running"), false)),
        "409 VM is already running"
    );
}

#[test]
fn lifecycle_stop_follows_the_strategy() {
    assert_eq!(
        written(stopped("Always", Some("Running"), None).unwrap().machine),
        "Halted"
    );
    assert_eq!(written(stopped("Once", None, None).unwrap().machine), "Halted");
    assert_eq!(
        written(stopped("Manual", Some("Running"), None).unwrap().status),
        json!([{"action": "Stop", "uid": "u1"}])
    );
    assert_eq!(refusal(stopped("Manual", None, None)), "409 VM is not running");
    assert_eq!(
        refusal(stopped("RerunOnFailure", Some("Succeeded"), None)),
        "409 VM is not running"
    );
    let forced = stopped("Halted", Some("Running"), Some(0)).unwrap();
    assert_eq!(written(forced.instance), 0);
    assert_eq!(written(forced.status), json!([{"action": "Stop", "uid": "u1"}]));
    assert_eq!(
        refusal(stopped("Halted", Some("Running"), Some(30))),
        "409 Halted only supports manual stop requests with a shorter graceperiod"
    );
    assert!(refusal(stopped("Manual", Some("Running"), Some(-1))).starts_with("400"));
}

#[test]
fn lifecycle_restart_follows_the_strategy() {
    let plain = restarted("Always", Some("Running"), None).unwrap();
    assert_eq!(plain.instance, None);
    assert_eq!(
        written(plain.status),
        json!([{"action": "Stop", "uid": "u1"}, {"action": "Start"}])
    );
    assert_eq!(
        written(restarted("Manual", Some("Running"), Some(0)).unwrap().instance),
        0
    );
    assert_eq!(refusal(restarted("Always", None, None)), "409 Halted");
    assert_eq!(
        refusal(restarted("Once", Some("Running"), None)),
        "409 RunStategy Once does not support manual restart requests"
    );
    assert!(refusal(restarted("Always", Some("Running"), Some(5))).starts_with("400 For force restart"));
}

#[test]
fn lifecycle_one_request_goes_after_the_other() {
    let mut machine = machine("Manual");
    machine.status = serde_json::from_value(json!({"stateChangeRequests": [{"action": "Start"}]})).unwrap();
    let running = instance("Running");
    let found = Found {
        machine: &machine,
        instance: Some(&running),
    };
    assert_eq!(
        refusal(restart(found, &RestartOptions::default())),
        "409 stop/start already underway"
    );
    assert!(
        stop(found, &StopOptions::default()).is_ok(),
        "a stop takes the place of a start"
    );
}

#[test]
fn lifecycle_a_start_ends_the_back_off() {
    let mut machine = machine("Manual");
    machine.status = serde_json::from_value(json!({"startFailure": {"consecutiveFailCount": 3}})).unwrap();
    let found = Found {
        machine: &machine,
        instance: None,
    };
    let patch = start(found, &StartOptions::default()).unwrap().status.unwrap();
    assert_eq!(patch[2], json!({"op": "remove", "path": "/status/startFailure"}));
}

#[test]
fn lifecycle_dry_runs_are_asked_for_in_one_word() {
    assert_eq!(is_dry_run(Some(&["All".to_owned()])), Ok(true));
    assert_eq!(is_dry_run(None), Ok(false));
    assert!(is_dry_run(Some(&["Some".to_owned()])).is_err());
}

#[test]
fn stop_of_a_tenants_node_is_refused() {
    let mut machine = machine("Always");
    let owner = json!({"apiVersion": "kubernest.io/v1alpha1", "kind": "TenantCluster", "name": "customera", "uid": "u", "controller": true});
    machine.metadata.owner_references = Some(vec![serde_json::from_value(owner).unwrap()]);
    let instance = instance("Running");
    let found = Found {
        machine: &machine,
        instance: Some(&instance),
    };
    let refused = stop(found, &StopOptions::default()).unwrap_err();
    assert!(
        refused.message.contains("a node of TenantCluster customera"),
        "{}",
        refused.message
    );
    assert!(restart(found, &RestartOptions::default()).is_ok());
}
