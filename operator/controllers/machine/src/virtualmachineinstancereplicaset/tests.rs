//! Tables of a set's pure decisions: next step, names, what people are shown.

use std::sync::Arc;

use jiff::Timestamp;
use kube::ResourceExt;
use kubernest_crds::kubevirt::v1::{VirtualMachineInstance, VirtualMachineInstanceReplicaSet as ReplicaSet};
use rstest::rstest;
use serde_json::{Value, json};

use super::dereference::Seen;
use super::plan::{BURST, Step, scale, standing, step, wake};
use super::status::{Trouble, status};
use super::validate::{Obstacle, goal};
use super::{Error, build, reasons};
use crate::conditions;

fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn set(replicas: i32) -> ReplicaSet {
    read(json!({
        "metadata": {"name": "rs", "namespace": "n", "uid": "s-1"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "a"}}, "template": {
            "metadata": {"labels": {"app": "a", "more": "b"}, "annotations": {"kept": "yes"}},
            "spec": {"domain": {"memory": {"guest": "1Gi"}, "devices": {}}},
        }},
    }))
}

/// An instance of [`set`], born at `second`, with a status.
fn instance(name: &str, second: i64, status: Value) -> VirtualMachineInstance {
    let mut instance = build::instance(&set(1), name.to_owned());
    instance.metadata.uid = Some(format!("i-{name}"));
    instance.metadata.creation_timestamp = Some(conditions::seconds(at(second)));
    instance.status = Some(read(status));
    instance
}

fn running(name: &str, second: i64) -> VirtualMachineInstance {
    let ready = json!([{"type": "Ready", "status": "True"}]);
    instance(name, second, json!({"phase": "Running", "conditions": ready}))
}

fn starting(name: &str, second: i64) -> VirtualMachineInstance {
    let ready = json!([{"type": "Ready", "status": "False", "reason": "GuestNotRunning"}]);
    instance(name, second, json!({"phase": "Scheduling", "conditions": ready}))
}

fn over(name: &str, phase: &str) -> VirtualMachineInstance {
    instance(name, 0, json!({"phase": phase}))
}

/// Its pod was deleted under it.
fn stopping(name: &str) -> VirtualMachineInstance {
    let ready = json!([{"type": "Ready", "status": "False", "reason": "PodTerminating"}]);
    instance(name, 0, json!({"phase": "Running", "conditions": ready}))
}

fn going(mut instance: VirtualMachineInstance) -> VirtualMachineInstance {
    instance.metadata.deletion_timestamp = Some(conditions::seconds(at(9)));
    instance
}

fn labelled(mut instance: VirtualMachineInstance, app: &str) -> VirtualMachineInstance {
    instance.labels_mut().insert("app".to_owned(), app.to_owned());
    instance
}

fn orphan(mut instance: VirtualMachineInstance) -> VirtualMachineInstance {
    instance.metadata.owner_references = None;
    instance
}

fn foreign(mut instance: VirtualMachineInstance) -> VirtualMachineInstance {
    for owner in instance.owner_references_mut() {
        owner.uid = "s-2".to_owned();
    }
    instance
}

fn seen(set: ReplicaSet, instances: Vec<VirtualMachineInstance>) -> Seen {
    Seen::new(Arc::new(set), instances.into_iter().map(Arc::new).collect())
}

/// A step in few words.
fn words(step: Step) -> String {
    let names = |all: Vec<Arc<VirtualMachineInstance>>| {
        let names: Vec<String> = all.iter().map(|one| one.name_any()).collect();
        names.join("")
    };
    match step {
        Step::Rest => "rest".to_owned(),
        Step::Claim { adopt, release } => format!("adopt {} release {}", names(adopt), names(release)),
        Step::Scale { delete, create } => format!("delete {} create {create}", names(delete)),
    }
}

#[rstest]
#[case::none(3, vec![], "delete  create 3")]
#[case::some(3, vec![running("a", 1)], "delete  create 2")]
#[case::enough(2, vec![running("a", 1), starting("b", 2)], "rest")]
#[case::negative(-1, vec![running("a", 1)], "delete a create 0")]
#[case::burst(1000, vec![], "delete  create 250")]
#[case::being_deleted(1, vec![going(running("a", 1))], "delete  create 1")]
#[case::failed(2, vec![running("a", 1), over("b", "Failed")], "delete b create 1")]
#[case::succeeded(1, vec![over("b", "Succeeded")], "delete b create 1")]
#[case::over_and_goes(1, vec![running("a", 1), going(over("b", "Failed"))], "rest")]
#[case::pod_goes(1, vec![stopping("a")], "delete a create 1")]
#[case::surplus_not_ready_first(1, vec![running("a", 5), starting("b", 1), starting("c", 2)], "delete cb create 0")]
#[case::surplus_youngest_first(1, vec![running("a", 1), running("b", 3), running("c", 2)], "delete bc create 0")]
#[case::surplus_that_goes_is_none(1, vec![running("a", 1), going(running("b", 3))], "rest")]
#[case::foreign(1, vec![foreign(running("a", 1))], "delete  create 1")]
#[case::orphan(2, vec![running("a", 1), orphan(running("b", 1))], "adopt b release ")]
#[case::orphan_that_goes(1, vec![orphan(going(running("b", 1)))], "delete  create 1")]
#[case::orphan_of_others(1, vec![orphan(labelled(running("b", 1), "x"))], "delete  create 1")]
#[case::relabelled(1, vec![running("a", 1), labelled(running("b", 1), "x")], "adopt  release b")]
#[case::relabelled_and_goes(1, vec![running("a", 1), labelled(going(running("b", 1)), "x")], "rest")]
fn plan_replicas(#[case] replicas: i32, #[case] instances: Vec<VirtualMachineInstance>, #[case] expected: &str) {
    let mut seen = seen(set(replicas), instances);
    assert_eq!(words(step(&seen, at(100))), expected);
    let mut resting = (*seen.set).clone();
    resting.spec.paused = true;
    seen.set = Arc::new(resting.clone());
    assert_eq!(step(&seen, at(100)), Step::Rest, "paused");
    resting.spec.paused = false;
    resting.metadata.deletion_timestamp = Some(conditions::seconds(at(9)));
    seen.set = Arc::new(resting);
    assert_eq!(step(&seen, at(100)), Step::Rest, "being deleted");
}

#[rstest]
#[case::adopt(vec![running("a", 1), orphan(running("b", 1))], "adopt b release ", "delete  create 1")]
#[case::release(vec![running("a", 1), labelled(running("b", 1), "x")], "adopt  release b", "delete  create 1")]
#[case::release_over(vec![running("a", 1), labelled(over("b", "Failed"), "x")], "adopt  release b", "delete  create 1")]
#[case::surplus(
    vec![running("a", 1), running("c", 2), running("d", 3), orphan(running("b", 4))],
    "adopt b release ",
    "delete d create 0"
)]
fn plan_replicas_goes_on_where_a_claim_is_refused(
    #[case] instances: Vec<VirtualMachineInstance>,
    #[case] first: &str,
    #[case] then: &str,
) {
    let seen = seen(set(2), instances);
    assert_eq!(
        (
            words(step(&seen, at(100))).as_str(),
            words(scale(&seen, at(100))).as_str()
        ),
        (first, then)
    );
}

#[test]
fn plan_replicas_counts_a_claim_that_was_granted() {
    let mut seen = seen(
        set(2),
        vec![running("a", 1), orphan(running("b", 1)), orphan(running("c", 1))],
    );
    seen.replace(running("b", 1));
    assert_eq!(words(scale(&seen, at(100))), "rest", "c is not had, and not missed");
    assert_eq!(status(&seen, None, at(1)).replicas, 2);
}

#[rstest]
#[case::at_once(1, 0, "rest", Some(10))]
#[case::soon(1, 9, "rest", Some(1))]
#[case::then(1, 10, "delete b create 1", None)]
#[case::beside_others(3, 9, "delete  create 1", Some(1))]
#[case::too_many(0, 0, "delete b create 0", Some(10))]
#[case::made_in_the_future(1, -9, "rest", Some(1))]
#[case::clocks_differ(1, -10, "delete b create 1", None)]
fn plan_replicas_spaces_runs_that_end_at_once(
    #[case] replicas: i32,
    #[case] second: i64,
    #[case] expected: &str,
    #[case] left: Option<u64>,
) {
    let mut all = vec![over("b", "Failed")];
    if replicas == 3 {
        all.push(running("a", 0));
    }
    let seen = seen(set(replicas), all);
    assert_eq!(words(step(&seen, at(second))), expected);
    assert_eq!(wake(&seen, at(second)), left.map(std::time::Duration::from_secs));
}

#[test]
fn plan_replicas_deletes_no_more_than_a_burst() {
    let all = (0..2 * BURST).map(|at| running(&format!("{at:04}"), 1)).collect();
    let Step::Scale { delete, create } = step(&seen(set(0), all), at(100)) else {
        panic!("no step")
    };
    assert_eq!((delete.len(), create), (BURST, 0));
}

#[test]
fn plan_replicas_wakes_for_what_it_looks_at_only() {
    let before = starting("a", 1);
    let mut after = before.clone();
    after.metadata.resource_version = Some("9".to_owned());
    after.status.as_mut().unwrap().phase = Some("Scheduled".to_owned());
    assert!(standing(&before) == standing(&after));
    let labelled = labelled(before.clone(), "x");
    let others = [
        running("a", 1),
        over("a", "Failed"),
        going(before.clone()),
        orphan(before.clone()),
        labelled,
    ];
    for other in others {
        assert!(standing(&before) != standing(&other));
    }
}

#[test]
fn build_replica_follows_the_template() {
    let one = build::instance(&set(1), "rsabcde".to_owned());
    assert_eq!(
        (one.name_any().as_str(), one.namespace().as_deref()),
        ("rsabcde", Some("n"))
    );
    assert_eq!(
        (one.labels()["more"].as_str(), one.annotations()["kept"].as_str()),
        ("b", "yes")
    );
    assert_eq!(one.finalizers(), [kubernest_crds::kubevirt::v1::VMI_FINALIZER]);
    assert_eq!(one.spec, set(1).spec.template.spec);
    let owner = serde_json::to_value(one.owner_references()).unwrap();
    assert_eq!(
        owner,
        json!([{
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceReplicaSet", "name": "rs", "uid": "s-1",
            "controller": true, "blockOwnerDeletion": true,
        }])
    );
}

#[test]
fn build_replica_names_are_always_the_same() {
    let names = |set: &ReplicaSet| build::names(set).take(50).collect::<Vec<_>>();
    let first = names(&set(1));
    assert_eq!(first, names(&set(7)), "whatever else is changed");
    assert!(
        first.iter().all(|name| name.len() == 7 && name.starts_with("rs")),
        "{first:?}"
    );
    let mut other = set(1);
    other.metadata.uid = Some("s-2".to_owned());
    assert!(names(&other).iter().all(|name| !first.contains(name)));
    other.metadata.name = Some("r".repeat(250));
    assert!(names(&other).iter().all(|name| name.len() == 63));
    other.spec.template.metadata.as_mut().unwrap().generate_name = Some("web-".to_owned());
    assert!(names(&other)[0].starts_with("web-"));
    other.spec.template.metadata.as_mut().unwrap().name = Some("app".to_owned());
    assert!(names(&other)[0].starts_with("app"));
}

#[rstest]
#[case::labels(json!({"metadata": {"labels": {"app": "b"}}}), json!({"matchLabels": {"app": "a"}}), Obstacle::Mismatch)]
#[case::everything(json!({"metadata": {"labels": {"app": "a"}}}), json!({}), Obstacle::Everything)]
#[case::no_labels(json!({}), json!({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}), Obstacle::NoLabels)]
#[case::claim(
    json!({"metadata": {"labels": {"app": "a"}}, "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]}),
    json!({"matchLabels": {"app": "a"}}),
    Obstacle::Claim("v".to_owned())
)]
fn validate_replicas_refuses_what_contradicts_itself(
    #[case] template: Value,
    #[case] selector: Value,
    #[case] expected: Obstacle,
) {
    let mut set = set(2);
    let spec = json!({"domain": {"devices": {}}, "volumes": template.get("volumes")});
    let template = json!({"metadata": template.get("metadata"), "spec": spec});
    set.spec.template = read(template);
    set.spec.selector = read(selector);
    assert_eq!(goal(&set.spec), Err(expected.clone()));
    // Its instances are counted, and left alone.
    let seen = seen(set, vec![running("a", 1), over("b", "Failed")]);
    assert_eq!(step(&seen, at(100)), Step::Rest);
    let trouble = Trouble::new(reasons::INVALID, expected.to_string());
    let shown = status(&seen, Some(&trouble), at(1));
    assert_eq!((shown.replicas, shown.ready_replicas), (1, 1));
}

#[test]
fn status_replicas_counts_and_says_the_same_twice() {
    let mut selecting = set(3);
    selecting.spec.selector = read(json!({"matchLabels": {"more": "b", "app": "a"}}));
    let instances = vec![
        running("a", 1),
        starting("b", 1),
        over("c", "Failed"),
        going(running("d", 1)),
        stopping("e"),
    ];
    let mut seen = seen(selecting.clone(), instances);
    let first = status(&seen, None, at(1));
    assert_eq!((first.replicas, first.ready_replicas), (2, 1));
    assert_eq!(first.label_selector.as_deref(), Some("app=a,more=b"));
    assert_eq!(first.conditions, []);
    selecting.spec.paused = true;
    selecting.status = Some(first);
    seen.set = Arc::new(selecting.clone());
    let paused = status(&seen, None, at(2));
    let condition = conditions::get(&paused.conditions, "ReplicaPaused").unwrap();
    assert_eq!(
        (condition.status.as_str(), condition.reason.as_deref()),
        ("True", Some("Paused"))
    );
    selecting.status = Some(paused.clone());
    seen.set = Arc::new(selecting.clone());
    assert_eq!(status(&seen, None, at(3)), paused, "the same at another time");
    selecting.spec.paused = false;
    seen.set = Arc::new(selecting);
    assert_eq!(status(&seen, None, at(4)).conditions, []);
}

#[test]
fn status_replicas_tells_a_failure_until_it_is_over() {
    let refused: kube::core::Status =
        read(json!({"status": "Failure", "message": "quota", "reason": "Forbidden", "code": 403}));
    let api = || kube::Error::Api(Box::new(refused.clone()));
    let delete = kubernest_runtime::ApplyError::Api {
        verb: "delete",
        object: "o".to_owned(),
        source: Box::new(api()),
    };
    let mut set = set(3);
    for (error, reason) in [
        (Error::Create(api()), "FailedCreate"),
        (Error::Delete(delete), "FailedDelete"),
    ] {
        let trouble = error.trouble().unwrap();
        let failed = status(&seen(set.clone(), vec![]), Some(&trouble), at(1));
        let condition = conditions::get(&failed.conditions, "ReplicaFailure").unwrap();
        assert_eq!(
            (condition.reason.as_deref(), condition.message.as_deref()),
            (Some(reason), Some("quota"))
        );
        set.status = Some(failed);
    }
    let claim = Error::Claim {
        instance: "i".to_owned(),
        source: api(),
    };
    let expected = Trouble::new(
        "FailedClaim",
        "cannot change the owner of the instance i: quota".to_owned(),
    );
    assert_eq!(claim.trouble(), Some(expected));
    assert!(Error::Status(api()).trouble().is_none());
    assert_eq!(status(&seen(set, vec![]), None, at(2)).conditions, []);
}
