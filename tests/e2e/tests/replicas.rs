//! A replica set of virtual machines, scaled as Deployments are.

use anyhow::{Result, ensure};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::{ResourceExt, runtime::conditions::is_deleted};
use kubernest_crds::kubevirt::v1::{VirtualMachineInstance, VirtualMachineInstanceReplicaSet};
use kubernest_e2e::leftovers::{inventory, nothing_since};
use kubernest_e2e::machine::{self, template};
use kubernest_e2e::{Outer, wait};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn e2e_a_replica_set_is_scaled_by_hand_and_by_an_autoscaler() -> Result<()> {
    let outer = Outer::open().await?;
    let space = "org-replicas";
    machine::namespace(&outer, space)?;
    let before = inventory(&outer, space).await?;
    let sets = Api::<VirtualMachineInstanceReplicaSet>::namespaced(outer.client.clone(), space);
    let mut template = template("shell", None)?;
    template["metadata"] = json!({"labels": {"app": "web"}});
    let set = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceReplicaSet", "metadata": {"name": "web"},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "web"}}, "template": template},
    });
    sets.create(&PostParams::default(), &serde_json::from_value(set)?)
        .await?;
    ready(&sets, 1).await?;

    let autoscalers = Api::<HorizontalPodAutoscaler>::namespaced(outer.client.clone(), space);
    let autoscaler = json!({"metadata": {"name": "web"}, "spec": {
        "minReplicas": 2, "maxReplicas": 3,
        "scaleTargetRef": {"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceReplicaSet", "name": "web"},
    }});
    let autoscaler = serde_json::from_value(autoscaler)?;
    autoscalers.create(&PostParams::default(), &autoscaler).await?;
    ready(&sets, 2).await?;
    autoscalers.delete("web", &DeleteParams::default()).await?;
    print!("{}", outer.kubectl(&["get", "vmirs,vmi", "-n", space])?);

    // One that is over is replaced.
    let instances = Api::<VirtualMachineInstance>::namespaced(outer.client.clone(), space);
    let listed = instances.list(&ListParams::default().labels("app=web")).await?;
    ensure!(listed.items.len() == 2, "two instances, found {}", listed.items.len());
    let victim = &listed.items[0];
    instances.delete(&victim.name_any(), &DeleteParams::default()).await?;
    ready(&sets, 1).await?;
    ready(&sets, 2).await?;

    outer.kubectl(&["scale", "vmirs/web", "-n", space, "--replicas=0"])?;
    ready(&sets, 0).await?;
    outer.kubectl(&["wait", "vmi", "--all", "-n", space, "--for=delete", "--timeout=5m"])?;
    let uid = sets.get("web").await?.uid().unwrap_or_default();
    sets.delete("web", &DeleteParams::default()).await?;
    wait::until(&sets, "web", "gone", is_deleted(&uid)).await?;
    nothing_since(&outer, space, &before).await?;
    outer.kubectl(&["delete", "namespace", space])?;
    Ok(())
}

/// Waits until this many are Ready; others may be on their way.
async fn ready(sets: &Api<VirtualMachineInstanceReplicaSet>, count: i32) -> Result<()> {
    let counted = |set: Option<&VirtualMachineInstanceReplicaSet>| {
        let status = set.and_then(|set| set.status.as_ref());
        status.is_some_and(|status| status.ready_replicas == count && status.replicas >= count)
    };
    wait::until(sets, "web", &format!("{count} ready"), counted).await?;
    Ok(())
}
