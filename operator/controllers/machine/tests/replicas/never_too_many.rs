//! No more instances than asked for, whoever dies when and whoever works beside.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use kube::api::DeleteParams;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use serde_json::json;
use tokio::task::JoinSet;

use super::{change, create, end, gone, is_active, own, scale, set, set_when, settled};
use crate::support::gate::Gate;
use crate::support::kubelet::Kubelet;
use crate::support::stage::{Controllers, Stage, Theatre, gated};

/// The most instances that counted at any moment, by the order of their writes.
struct Most {
    most: Arc<Mutex<usize>>,
    _task: JoinSet<()>,
}

impl Most {
    fn watch(client: &Client, namespace: &str) -> Self {
        let most: Arc<Mutex<usize>> = Arc::default();
        let (api, seen) = (
            Api::<VirtualMachineInstance>::namespaced(client.clone(), namespace),
            most.clone(),
        );
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut active: BTreeMap<String, bool> = BTreeMap::new();
            let mut events = watcher::watcher(api, watcher::Config::default()).boxed();
            while let Some(event) = events.next().await {
                match event.expect("a watch that lasts") {
                    watcher::Event::Apply(one) | watcher::Event::InitApply(one) => {
                        active.insert(one.uid().unwrap(), is_active(&one));
                    }
                    watcher::Event::Delete(one) => {
                        active.remove(&one.uid().unwrap());
                    }
                    _ => {}
                }
                let now = active.values().filter(|active| **active).count();
                let mut most = seen.lock().unwrap();
                *most = now.max(*most);
            }
        });
        Self { most, _task: task }
    }

    fn get(&self) -> usize {
        *self.most.lock().unwrap()
    }
}

/// Operators that die after each write, or after some, and their successors that know nothing of it; besides, two that work
/// at the same time, though the Lease lets only one.
pub async fn reconcile_never_too_many(theatre: &Theatre) {
    for writes in [1, 3] {
        let config = theatre.controllers_config().await;
        let nobody = Controllers::start(gated(&config, &Gate::new(Some(0))));
        nobody.kill();
        let mut stage = Stage::with_controllers(theatre, &format!("replicas-killed-after-{writes}"), nobody).await;
        stage.kubelet = Some(Kubelet::start(&stage.client, &stage.namespace).await);
        let most = Most::watch(&stage.client, &stage.namespace);
        let deaths = Arc::new(AtomicUsize::new(0));
        let (count, killed) = (deaths.clone(), config.clone());
        let mut operators = JoinSet::new();
        operators.spawn(async move {
            let mut gate = Gate::new(Some(writes - 1));
            loop {
                let _alive = Controllers::start(gated(&killed, &gate));
                gate.reached().await;
                count.fetch_add(1, Ordering::SeqCst);
                gate = gate.next();
            }
        });
        life(&stage).await;
        println!(
            "  {writes} writes each: {} operators died",
            deaths.load(Ordering::SeqCst)
        );
        assert!(deaths.load(Ordering::SeqCst) >= 3);
        assert_eq!(most.get(), 3, "never more than asked for");
    }
    let stage = Stage::set(theatre, "replicas-two").await;
    let most = Most::watch(&stage.client, &stage.namespace);
    let second = Controllers::start(gated(&theatre.controllers_config().await, &Gate::new(None)));
    create(&stage, set(20)).await;
    settled(&stage, 20).await;
    assert_eq!(most.get(), 20, "never more than asked for");
    scale(&stage, 30).await;
    settled(&stage, 30).await;
    assert_eq!(most.get(), 30, "never more than asked for");
    drop(second);
}

/// An operator whose cache is as old as its start makes and deletes as many as one that knows all.
pub async fn reconcile_old_cache(stage: &Stage, theatre: &Theatre) {
    create(stage, set(3)).await;
    settled(stage, 3).await;
    stage.controllers.kill();
    let gate = Gate::deaf_to("virtualmachineinstances");
    let deaf = Controllers::start(gated(&theatre.controllers_config().await, &gate));
    for replicas in [4, 2, 1] {
        scale(stage, replicas).await;
        set_when(stage, "another number", |status| status.replicas == replicas).await;
        for beat in 0..3 {
            change(
                stage,
                json!({"metadata": {"annotations": {"beat": format!("{replicas}/{beat}")}}}),
            )
            .await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            let active = own(stage).await.iter().filter(|one| is_active(one)).count();
            assert_eq!(i32::try_from(active).unwrap(), replicas);
        }
    }
    drop(deaf);
}

/// Three come, one fails, one is deleted, two go.
async fn life(stage: &Stage) {
    create(stage, set(3)).await;
    let three = settled(stage, 3).await;
    let (failed, deleted) = (three.first().unwrap(), three.last().unwrap());
    end(stage, failed, "Failed").await;
    gone(stage, failed).await;
    settled(stage, 3).await;
    stage
        .instances()
        .delete(deleted, &DeleteParams::default())
        .await
        .unwrap();
    gone(stage, deleted).await;
    settled(stage, 3).await;
    scale(stage, 1).await;
    settled(stage, 1).await;
}
