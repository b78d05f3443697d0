//! The runtime's writes and its election in front of a real API server, whose answers unit tests can only assume.

#![allow(clippy::unwrap_used, reason = "a test; helpers count as production code for clippy")]

use std::{collections::BTreeSet, time::Duration};

use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{ConfigMap, Namespace},
    events::v1::Event,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ListParams, PostParams},
};
use kubernest_crds::{Phase, TenantCluster, TenantClusterStatus};
use kubernest_integration::{ControlPlane, install_crds, wait_until};
use kubernest_runtime::{Applier, CancellationToken, events::Recorder, lease};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const MANAGER: &str = "kubernest-test";
const LIMIT: Duration = Duration::from_secs(30);

async fn plane() -> (ControlPlane, Client) {
    let plane = ControlPlane::start().await.unwrap();
    let client = plane.client().await.unwrap();
    let namespace: Namespace = from(json!({"metadata": {"name": "org"}}));
    Api::all(client.clone())
        .create(&PostParams::default(), &namespace)
        .await
        .unwrap();
    (plane, client)
}

fn from<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn config_map(value: &str) -> ConfigMap {
    from(json!({"metadata": {"name": "a", "namespace": "org"}, "data": {"k": value}}))
}

fn version(object: &impl Resource) -> String {
    object.resource_version().unwrap()
}

#[tokio::test]
async fn integration_apply_creates_changes_and_rests() {
    let (_plane, client) = plane().await;
    let applier = Applier::new(client.clone(), MANAGER);
    let created = applier.apply(&config_map("1"), None).await.unwrap();
    // Another process, which remembers nothing, writes nothing either.
    let again = Applier::new(client.clone(), MANAGER)
        .apply(&config_map("1"), Some(&created))
        .await
        .unwrap();
    assert_eq!(version(&again), version(&created));
    let changed = applier.apply(&config_map("2"), Some(&again)).await.unwrap();
    assert_ne!(version(&changed), version(&created));
    assert_eq!(changed.data.as_ref().unwrap()["k"], "2");

    let kept = applier.create_if_absent(&config_map("3")).await.unwrap();
    assert_eq!(version(&kept), version(&changed), "what is there is kept");

    applier.delete(&changed).await.unwrap();
    applier.delete(&changed).await.unwrap();
    let other = applier.apply(&config_map("1"), None).await.unwrap();
    applier.delete(&changed).await.unwrap();
    let maps: Api<ConfigMap> = Api::namespaced(client, "org");
    assert_eq!(
        maps.get("a").await.unwrap().uid(),
        other.uid(),
        "only the object that was seen is deleted"
    );
}

#[tokio::test]
async fn integration_apply_writes_status_and_finalizers() {
    let (_plane, client) = plane().await;
    install_crds(&client).await.unwrap();
    let applier = Applier::new(client.clone(), MANAGER);
    let tenants: Api<TenantCluster> = Api::namespaced(client, "org");
    let tenant: TenantCluster =
        from(json!({"metadata": {"name": "a", "namespace": "org"}, "spec": {"version": "v1.35.4"}}));
    let tenant = tenants.create(&PostParams::default(), &tenant).await.unwrap();

    let status = TenantClusterStatus {
        phase: Phase::Provisioning,
        vni: Some(4097),
        ..TenantClusterStatus::default()
    };
    let with_status = applier.apply_status(&tenant, &status).await.unwrap();
    assert_eq!(with_status.status.as_ref().unwrap().vni, Some(4097));
    assert_eq!(with_status.spec, tenant.spec);
    let gone = TenantClusterStatus {
        phase: Phase::Ready,
        ..TenantClusterStatus::default()
    };
    let without = applier.apply_status(&with_status, &gone).await.unwrap();
    assert_eq!(
        without.status.as_ref().unwrap().vni,
        None,
        "a field that is no longer applied goes"
    );

    let held = applier.add_finalizer(&without, "kubernest.io/test").await.unwrap();
    assert_eq!(held.finalizers(), ["kubernest.io/test"]);
    assert_eq!(
        version(&applier.add_finalizer(&held, "kubernest.io/test").await.unwrap()),
        version(&held)
    );
    let stale = applier
        .remove_finalizer(
            &TenantCluster {
                metadata: {
                    let mut m = held.metadata.clone();
                    m.resource_version = without.resource_version();
                    m
                },
                ..held.clone()
            },
            "kubernest.io/test",
        )
        .await;
    assert!(
        stale.unwrap_err().is_conflict(),
        "a finalizer is not removed on old knowledge"
    );

    applier.delete(&held).await.unwrap();
    let deleting = tenants.get("a").await.unwrap();
    assert!(deleting.meta().deletion_timestamp.is_some());
    applier.remove_finalizer(&deleting, "kubernest.io/test").await.unwrap();
    applier.remove_finalizer(&deleting, "kubernest.io/test").await.unwrap();
    assert!(tenants.get_opt("a").await.unwrap().is_none());
}

#[tokio::test]
async fn integration_events_tell_what_is_new_until_it_is_too_much() {
    let (_plane, client) = plane().await;
    let object = Applier::new(client.clone(), MANAGER)
        .apply(&config_map("1"), None)
        .await
        .unwrap();
    let recorder = Recorder::new(client.clone(), MANAGER);
    for note in [
        "2 of 2 nodes are Ready",
        "1 of 1 nodes are Ready",
        "2 of 2 nodes are Ready",
    ] {
        recorder.normal(&object, "NodesReady", "Reconcile", note).await;
    }
    // A state that is lost and reached again is said again.
    for (reached, reason) in [(true, "Up"), (false, "Down"), (true, "Up")] {
        recorder
            .transition(&object, reached, reason, "Reconcile", "in the same words")
            .await;
    }
    for round in 0..20 {
        recorder
            .warning(&object, "Error", "Reconcile", &format!("try {round}"))
            .await;
    }
    let events: Vec<Event> = Api::namespaced(client, "org")
        .list(&ListParams::default())
        .await
        .unwrap()
        .items;
    let of = |reason: &str| {
        let those = events.iter().filter(|event| event.reason.as_deref() == Some(reason));
        those.collect::<Vec<_>>()
    };
    let notes: BTreeSet<_> = of("NodesReady").iter().map(|event| event.note.as_deref()).collect();
    assert_eq!(
        notes,
        [Some("1 of 1 nodes are Ready"), Some("2 of 2 nodes are Ready")].into()
    );
    assert_eq!(of("NodesReady").len(), 2, "the same is not said twice");
    assert_eq!((of("Up").len(), of("Down").len()), (2, 1));
    let errors = of("Error");
    let series: Vec<_> = errors.iter().filter_map(|event| event.series.as_ref()).collect();
    assert!(errors.len() < 10, "{} events", errors.len());
    let [series] = series[..] else { panic!("{errors:?}") };
    assert_eq!(
        series.count as usize + errors.len() - 1,
        20,
        "none is left out of the count"
    );
}

#[tokio::test]
async fn integration_lease_has_one_holder_and_passes_on() {
    let (_plane, client) = plane().await;
    let shutdown = CancellationToken::new();
    let settings = |who: &str| lease::Settings {
        // A processor that is busy elsewhere for seconds must not lose it.
        duration: Duration::from_secs(10),
        renew_deadline: Duration::from_secs(8),
        retry_period: Duration::from_millis(300),
        ..lease::Settings::new("org", "leader", who.to_owned())
    };
    let first = lease::acquire(client.clone(), settings("first"), &shutdown)
        .await
        .unwrap();
    let waiting = tokio::time::timeout(
        Duration::from_secs(12),
        lease::acquire(client.clone(), settings("second"), &shutdown),
    );
    assert!(
        waiting.await.is_err(),
        "a lease that is renewed is not taken, however long one waits"
    );

    first.release().await;
    let second = lease::acquire(client.clone(), settings("second"), &shutdown)
        .await
        .unwrap();
    let leases: Api<Lease> = Api::namespaced(client.clone(), "org");
    let holder = || async {
        leases
            .get("leader")
            .await
            .unwrap()
            .spec
            .unwrap()
            .holder_identity
            .unwrap_or_default()
    };
    assert_eq!(holder().await, "second");

    // Somebody takes it by force: the holder notices.
    let taken = wait_until(LIMIT, || async {
        let mut lease = leases.get("leader").await.unwrap();
        lease.spec.as_mut().unwrap().holder_identity = Some("thief".to_owned());
        leases.replace("leader", &PostParams::default(), &lease).await.is_ok()
    });
    assert!(taken.await);
    tokio::time::timeout(LIMIT, second.lost()).await.unwrap();

    // The thief never renews: after its duration the lease is free.
    let third = lease::acquire(client.clone(), settings("third"), &shutdown)
        .await
        .unwrap();
    assert_eq!(holder().await, "third");
    third.release().await;
    assert_eq!(holder().await, "");
}
