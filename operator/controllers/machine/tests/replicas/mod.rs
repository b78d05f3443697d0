//! Stories of replica sets: as many instances as are asked for.

mod never_too_many;

use std::collections::BTreeSet;
use std::time::Duration;

use futures::FutureExt;
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, ResourceExt};
use kubernest_crds::kubevirt::v1::{
    VirtualMachineInstance, VirtualMachineInstanceReplicaSet as ReplicaSet, VirtualMachineInstanceReplicaSetStatus,
};
use serde_json::{Value, json};

use crate::story;
use crate::support::gate::Gate;
use crate::support::kubelet;
use crate::support::stage::{Controllers, PATIENCE, Stage, Theatre, gated, machine};

/// Tells all of them.
pub async fn tell(theatre: &Theatre) {
    let stage = |name: &'static str| Stage::set(theatre, name);
    story("replicas", reconcile_replicas(&stage("replicas").await).boxed()).await;
    story(
        "replicas paused",
        reconcile_paused(&stage("replicas-paused").await).boxed(),
    )
    .await;
    story(
        "replicas claimed",
        reconcile_claims(&stage("replicas-claimed").await).boxed(),
    )
    .await;
    story(
        "replicas that cannot be claimed",
        reconcile_claim_refused(&stage("replicas-claim-refused").await).boxed(),
    )
    .await;
    story(
        "replicas refused",
        reconcile_refused(&stage("replicas-refused").await).boxed(),
    )
    .await;
    story("replicas go", reconcile_goes(&stage("replicas-go").await).boxed()).await;
    story(
        "replicas at rest",
        reconcile_rest(&stage("replicas-rest").await, theatre).boxed(),
    )
    .await;
    story(
        "replicas by an old cache",
        never_too_many::reconcile_old_cache(&stage("replicas-old-cache").await, theatre).boxed(),
    )
    .await;
    story(
        "replicas never too many",
        never_too_many::reconcile_never_too_many(theatre).boxed(),
    )
    .await;
}

fn set(replicas: i32) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceReplicaSet", "metadata": {"name": "rs"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "a"}}, "template": {
            "metadata": {"labels": {"app": "a"}}, "spec": machine()["spec"]["template"]["spec"],
        }},
    })
}

fn sets(stage: &Stage) -> Api<ReplicaSet> {
    Api::namespaced(stage.client.clone(), &stage.namespace)
}

async fn create(stage: &Stage, set: Value) -> ReplicaSet {
    let set = serde_json::from_value(set).unwrap();
    sets(stage).create(&PostParams::default(), &set).await.unwrap()
}

async fn change(stage: &Stage, change: Value) {
    let change = Patch::Merge(change);
    sets(stage).patch("rs", &PatchParams::default(), &change).await.unwrap();
}

/// As `kubectl scale` and autoscalers do.
async fn scale(stage: &Stage, replicas: i32) {
    let change = Patch::Merge(json!({"spec": {"replicas": replicas}}));
    let scaled = sets(stage)
        .patch_scale("rs", &PatchParams::default(), &change)
        .await
        .unwrap();
    assert_eq!(scaled.spec.unwrap().replicas.unwrap_or_default(), replicas);
}

async fn set_when(
    stage: &Stage,
    what: &str,
    holds: impl Fn(&VirtualMachineInstanceReplicaSetStatus) -> bool,
) -> ReplicaSet {
    let wait = await_condition(sets(stage), "rs", |set: Option<&ReplicaSet>| {
        set.and_then(|set| set.status.as_ref()).is_some_and(&holds)
    });
    match tokio::time::timeout(PATIENCE, wait).await {
        Ok(found) => found.unwrap().unwrap(),
        Err(_) => panic!(
            "{}: no {what}: {:#?}",
            stage.namespace,
            sets(stage).get_opt("rs").await.unwrap()
        ),
    }
}

/// Waits until so many instances are there, are Ready, and no other of the set is.
async fn settled(stage: &Stage, replicas: usize) -> BTreeSet<String> {
    let count = i32::try_from(replicas).unwrap();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let shown = set_when(stage, "ready instances", |status| {
            (status.replicas, status.ready_replicas) == (count, count)
        });
        shown.await;
        let all = own(stage).await;
        if all.len() == replicas && all.iter().all(is_active) {
            return all.iter().map(ResourceExt::name_any).collect();
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "{}: {} instances",
            stage.namespace,
            all.len()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The instances that are the set's.
async fn own(stage: &Stage) -> Vec<VirtualMachineInstance> {
    let all = stage.instances().list(&ListParams::default()).await.unwrap().items;
    all.into_iter()
        .filter(|one| !one.owner_references().is_empty())
        .collect()
}

fn is_active(one: &VirtualMachineInstance) -> bool {
    let phase = one.status.as_ref().and_then(|status| status.phase.as_deref());
    one.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Failed" | "Succeeded"))
}

/// Ends the guest of an instance, as the kubelet reports it.
async fn end(stage: &Stage, instance: &str, phase: &str) {
    let words = r#"{"reason":"GuestCrashed","message":"the guest died"}"#;
    report(stage, instance, kubelet::ended(phase, 1, words)).await;
}

/// Reports this of an instance's pod.
async fn report(stage: &Stage, instance: &str, status: Value) {
    let launchers = ListParams::default().labels(&format!("vm.kubevirt.io/name={instance}"));
    let pod = stage.pods().list(&launchers).await.unwrap().items.remove(0).name_any();
    kubelet::patch(&stage.pods(), &pod, status).await;
}

/// Waits until the controllers have looked at the set twice more: at this instance, the only one that is Ready, when it is
/// not any more, and when it is again. They say what they see after they have made or deleted what is due.
async fn looked_at_again(stage: &Stage, instance: &str) {
    for (ready, count) in [("False", 0), ("True", 1)] {
        report(stage, instance, kubelet::running(ready)).await;
        set_when(stage, "a set looked at again", |status| status.ready_replicas == count).await;
    }
}

/// Waits until an object that is made now is younger than all of these, as ages count in whole seconds.
async fn a_second_later(stage: &Stage, than: &BTreeSet<String>) {
    let mut youngest = None;
    for one in own(stage).await {
        if than.contains(&one.name_any()) {
            youngest = youngest.max(one.metadata.creation_timestamp);
        }
    }
    let params = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let mut probe: ReplicaSet = serde_json::from_value(set(0)).unwrap();
    probe.metadata.name = Some("probe".to_owned());
    while sets(stage)
        .create(&params, &probe)
        .await
        .unwrap()
        .metadata
        .creation_timestamp
        <= youngest
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn gone(stage: &Stage, instance: &str) {
    let gone = |one: Option<&VirtualMachineInstance>| one.is_none();
    let wait = await_condition(stage.instances(), instance, gone);
    tokio::time::timeout(PATIENCE, wait)
        .await
        .expect("the instance goes")
        .unwrap();
}

fn condition<'a>(status: &'a VirtualMachineInstanceReplicaSetStatus, type_: &str) -> Option<(&'a str, &'a str)> {
    let found = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == type_ && condition.status == "True");
    found.map(|found| (found.reason.as_deref().unwrap(), found.message.as_deref().unwrap()))
}

async fn has_event(stage: &Stage, reason: &str) -> bool {
    let events: Api<Event> = Api::namespaced(stage.client.clone(), &stage.namespace);
    let all = events.list(&ListParams::default()).await.unwrap().items;
    let about_the_set = |event: &Event| {
        event
            .regarding
            .as_ref()
            .is_some_and(|on| on.name.as_deref() == Some("rs"))
    };
    all.iter()
        .any(|event| about_the_set(event) && event.reason.as_deref() == Some(reason))
}

async fn reconcile_replicas(stage: &Stage) {
    let made = create(stage, set(3)).await;
    let first = settled(stage, 3).await;
    for one in own(stage).await {
        let owner = &one.owner_references()[0];
        assert_eq!(Some(&owner.uid), made.metadata.uid.as_ref());
        assert_eq!((owner.controller, owner.block_owner_deletion), (Some(true), Some(true)));
        assert!(
            one.name_any().len() == "rs".len() + 5 && one.name_any().starts_with("rs"),
            "{}",
            one.name_any()
        );
    }
    assert!(has_event(stage, "SuccessfulCreate").await);
    let shown = sets(stage).get_scale("rs").await.unwrap().status.unwrap();
    assert_eq!((shown.replicas, shown.selector.as_deref()), (3, Some("app=a")));

    scale(stage, 5).await;
    let five = settled(stage, 5).await;
    assert!(five.is_superset(&first), "those that are there stay");
    a_second_later(stage, &five).await;
    scale(stage, 6).await;
    let youngest = &settled(stage, 6).await - &five;
    scale(stage, 5).await;
    assert_eq!(settled(stage, 5).await, five, "{youngest:?} goes");
    assert!(has_event(stage, "SuccessfulDelete").await);

    // One that is over, for better or worse, makes place for another.
    let mut last = five;
    for phase in ["Failed", "Succeeded"] {
        let victim = last.first().unwrap().clone();
        end(stage, &victim, phase).await;
        gone(stage, &victim).await;
        let now = settled(stage, 5).await;
        assert!(!now.contains(&victim), "{victim} is replaced");
        last = now;
    }
    // So does one whose pod is deleted, or which is deleted itself.
    let victim = last.first().unwrap().clone();
    stage
        .instances()
        .delete(&victim, &DeleteParams::default())
        .await
        .unwrap();
    gone(stage, &victim).await;
    settled(stage, 5).await;

    scale(stage, 0).await;
    settled(stage, 0).await;
}

async fn reconcile_paused(stage: &Stage) {
    create(stage, set(2)).await;
    let two = settled(stage, 2).await;
    change(stage, json!({"spec": {"paused": true, "replicas": 3}})).await;
    let paused = |status: &VirtualMachineInstanceReplicaSetStatus| condition(status, "ReplicaPaused").is_some();
    let shown = set_when(stage, "a paused set", paused).await.status.unwrap();
    assert_eq!(condition(&shown, "ReplicaPaused").unwrap().0, "Paused");
    let victim = two.first().unwrap();
    end(stage, victim, "Failed").await;
    set_when(stage, "one instance", |status| {
        (status.replicas, status.ready_replicas) == (1, 1)
    })
    .await;
    looked_at_again(stage, two.last().unwrap()).await;
    let there: BTreeSet<_> = own(stage).await.iter().map(ResourceExt::name_any).collect();
    assert_eq!(there, two, "nothing is made or deleted");
    change(stage, json!({"spec": {"paused": null}})).await;
    settled(stage, 3).await;
    gone(stage, victim).await;
    set_when(stage, "a set at work", |status| !paused(status)).await;
    assert!(has_event(stage, "SuccessfulPaused").await && has_event(stage, "SuccessfulResumed").await);
}

/// What matches and is nobody's is taken, what matches no more is let go.
async fn reconcile_claims(stage: &Stage) {
    let alone = |name: &str, app: &str| {
        let metadata = json!({"name": name, "labels": {"app": app}});
        json!({"metadata": metadata, "spec": machine()["spec"]["template"]["spec"]})
    };
    for (name, app) in [("matching", "a"), ("other", "b")] {
        let instance = serde_json::from_value(alone(name, app)).unwrap();
        stage
            .instances()
            .create(&PostParams::default(), &instance)
            .await
            .unwrap();
    }
    create(stage, set(2)).await;
    let two = settled(stage, 2).await;
    assert!(two.contains("matching") && !two.contains("other"), "{two:?}");
    let label = |app: &str| Patch::Merge(json!({"metadata": {"labels": {"app": app}}}));
    let params = PatchParams::default();
    stage.instances().patch("matching", &params, &label("b")).await.unwrap();
    let owners = |wanted: usize| {
        move |one: Option<&VirtualMachineInstance>| one.is_some_and(|one| one.owner_references().len() == wanted)
    };
    let wait = await_condition(stage.instances(), "matching", owners(0));
    tokio::time::timeout(PATIENCE, wait)
        .await
        .expect("it is let go")
        .unwrap();
    let two = settled(stage, 2).await;
    assert!(!two.contains("matching"), "{two:?}");
    // One too many comes back: the youngest goes, and that one is the oldest.
    stage.instances().patch("matching", &params, &label("a")).await.unwrap();
    let wait = await_condition(stage.instances(), "matching", owners(1));
    tokio::time::timeout(PATIENCE, wait)
        .await
        .expect("it is taken")
        .unwrap();
    settled(stage, 2).await;
    let other = stage.instances().get("other").await.unwrap();
    assert!(
        is_active(&other) && other.owner_references().is_empty(),
        "not the set's affair"
    );
}

/// One that cannot be taken keeps no other waiting, and is told of.
async fn reconcile_claim_refused(stage: &Stage) {
    let metadata = json!({"name": "matching", "labels": {"app": "a"}});
    let matching = json!({"metadata": metadata, "spec": machine()["spec"]["template"]["spec"]});
    let matching = serde_json::from_value(matching).unwrap();
    let instances = stage.instances();
    instances.create(&PostParams::default(), &matching).await.unwrap();
    forbid(
        stage,
        "UPDATE",
        "object.metadata.name != 'matching' || !has(object.metadata.ownerReferences)",
    )
    .await;
    let owner = json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "x"}]);
    let taken = Patch::Merge(json!({"metadata": {"ownerReferences": owner}}));
    let rehearsal = PatchParams {
        dry_run: true,
        ..PatchParams::default()
    };
    in_force(|| async { instances.patch("matching", &rehearsal, &taken).await.is_err() }).await;
    create(stage, set(2)).await;
    let two = settled(stage, 2).await;
    assert!(!two.contains("matching"), "{two:?}");
    let failure = |status: &VirtualMachineInstanceReplicaSetStatus| condition(status, "ReplicaFailure").is_some();
    let shown = set_when(stage, "a failure", failure).await.status.unwrap();
    let (reason, message) = condition(&shown, "ReplicaFailure").unwrap();
    assert!(
        reason == "FailedClaim" && message.contains("matching: ") && message.contains("not today"),
        "{reason}: {message}"
    );
    assert!(has_event(stage, "FailedClaim").await);
    allow(stage).await;
    set_when(stage, "no failure", |status| !failure(status)).await;
    settled(stage, 2).await;
}

async fn reconcile_refused(stage: &Stage) {
    let mut bad = set(2);
    bad["spec"]["template"]["metadata"]["labels"]["bad"] = json!("no label");
    create(stage, bad).await;
    let failure = |status: &VirtualMachineInstanceReplicaSetStatus| condition(status, "ReplicaFailure").is_some();
    let shown = set_when(stage, "a failure", failure).await.status.unwrap();
    let (reason, message) = condition(&shown, "ReplicaFailure").unwrap();
    assert!(
        reason == "FailedCreate" && message.contains("no label"),
        "{reason}: {message}"
    );
    assert!(has_event(stage, "FailedCreate").await);
    change(
        stage,
        json!({"spec": {"template": {"metadata": {"labels": {"bad": null}}}}}),
    )
    .await;
    settled(stage, 2).await;
    let shown = set_when(stage, "no failure", |status| !failure(status))
        .await
        .status
        .unwrap();
    assert_eq!(shown.conditions, []);

    // A deletion that is refused, by a policy as an administrator may have one.
    forbid(stage, "DELETE", "false").await;
    let name = own(stage).await[0].name_any();
    let (instances, rehearsal) = (stage.instances(), DeleteParams::default().dry_run());
    in_force(|| async { instances.delete(&name, &rehearsal).await.is_err() }).await;
    scale(stage, 1).await;
    let shown = set_when(stage, "a failure", failure).await.status.unwrap();
    let (reason, message) = condition(&shown, "ReplicaFailure").unwrap();
    assert!(
        reason == "FailedDelete" && message.contains("not today"),
        "{reason}: {message}"
    );
    assert_eq!(shown.replicas, 2);
    allow(stage).await;
    settled(stage, 1).await;
    set_when(stage, "no failure", |status| !failure(status)).await;
}

type Policy = k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicy;
type PolicyBinding = k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicyBinding;
const POLICY: &str = "not-today";

/// Forbids it here where `expression` does not hold.
async fn forbid(stage: &Stage, operation: &str, expression: &str) {
    let here = json!({"matchLabels": {"kubernetes.io/metadata.name": stage.namespace}});
    let rule = json!({"apiGroups": ["kubevirt.io"], "apiVersions": ["*"], "resources": ["virtualmachineinstances"], "operations": [operation]});
    let policy: Policy = serde_json::from_value(json!({"metadata": {"name": POLICY}, "spec": {
        "matchConstraints": {"namespaceSelector": here, "resourceRules": [rule]},
        "validations": [{"expression": expression, "message": "not today"}],
    }}))
    .unwrap();
    let binding: PolicyBinding = serde_json::from_value(
        json!({"metadata": {"name": POLICY}, "spec": {"policyName": POLICY, "validationActions": ["Deny"]}}),
    )
    .unwrap();
    Api::all(stage.client.clone())
        .create(&PostParams::default(), &policy)
        .await
        .unwrap();
    Api::all(stage.client.clone())
        .create(&PostParams::default(), &binding)
        .await
        .unwrap();
}

async fn allow(stage: &Stage) {
    let params = DeleteParams::default();
    let policies: Api<Policy> = Api::all(stage.client.clone());
    policies.delete(POLICY, &params).await.unwrap();
    let bindings: Api<PolicyBinding> = Api::all(stage.client.clone());
    bindings.delete(POLICY, &params).await.unwrap();
}

/// Waits until a rehearsal is refused.
async fn in_force<Rehearsal: Future<Output = bool>>(refused: impl Fn() -> Rehearsal) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !refused().await {
        assert!(tokio::time::Instant::now() < deadline, "the policy is not in force");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A set that is being deleted replaces nothing; its instances go by their owner, which no garbage collector sees here.
async fn reconcile_goes(stage: &Stage) {
    let mut held = set(2);
    held["metadata"]["finalizers"] = json!(["example.org/held"]);
    create(stage, held).await;
    let two = settled(stage, 2).await;
    sets(stage).delete("rs", &DeleteParams::foreground()).await.unwrap();
    let victim = two.first().unwrap();
    stage
        .instances()
        .delete(victim, &DeleteParams::default())
        .await
        .unwrap();
    gone(stage, victim).await;
    set_when(stage, "one instance", |status| status.replicas == 1).await;
    looked_at_again(stage, two.last().unwrap()).await;
    assert_eq!(own(stage).await.len(), 1, "none is replaced");
    change(stage, json!({"metadata": {"finalizers": null}})).await;
    let wait = await_condition(sets(stage), "rs", |set: Option<&ReplicaSet>| set.is_none());
    tokio::time::timeout(PATIENCE, wait)
        .await
        .expect("the set goes")
        .unwrap();
    assert_eq!(own(stage).await.len(), 1);
}

async fn reconcile_rest(stage: &Stage, theatre: &Theatre) {
    create(stage, set(3)).await;
    settled(stage, 3).await;
    stage.controllers.kill();
    let gate = Gate::new(None);
    let restarted = Controllers::start(gated(&theatre.controllers_config().await, &gate));
    for beat in 0..5 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        change(stage, json!({"metadata": {"annotations": {"beat": beat.to_string()}}})).await;
    }
    assert_eq!(gate.writes(), 0, "writes at rest");
    // It was awake all the time.
    scale(stage, 1).await;
    settled(stage, 1).await;
    assert!(gate.writes() > 0);
    drop(restarted);
}
