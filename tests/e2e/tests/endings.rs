//! Machines that end by no wish of their owner: each time it is told why, and the machine runs again.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kubernest_e2e::leftovers::{inventory, nothing_since};
use kubernest_e2e::machine::{self, Machine, USER, template};
use kubernest_e2e::{Outer, pods, wait};
use kubernest_integration::PlainStream;
use kubernest_testbed::config::PAUSE_IMAGE;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn e2e_a_guest_that_does_not_answer_its_probe_starts_again() -> Result<()> {
    let outer = Outer::open().await?;
    let space = "org-liveness";
    machine::namespace(&outer, space)?;
    let before = inventory(&outer, space).await?;
    let mut template = template("shell", None)?;
    // Guests boot within that.
    template["spec"]["livenessProbe"] = json!({"httpGet": {"port": 8080, "path": "/"}, "initialDelaySeconds": 90,
        "periodSeconds": 1, "failureThreshold": 3});
    let machine = Machine::create(&outer, space, "vm", "Always", template).await?;
    let first = machine.instance_in("Running", None).await?;
    machine.says("guest: ready").await?;
    let _console = types(&machine, "deaf").await?;
    let second = machine.instance_in("Running", Some(&first)).await?;
    let told = told(&outer, space, &first, "LivenessProbeFailed").await?;
    ensure!(told.contains("liveness probe"), "{told}");
    machine.says("guest: ready").await?;
    ensure!(
        machine.instance_in("Running", None).await? == second,
        "it started twice"
    );
    machine.delete().await?;
    nothing_since(&outer, space, &before).await?;
    outer.kubectl(&["delete", "namespace", space])?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn e2e_a_machine_killed_for_its_memory_starts_again() -> Result<()> {
    let outer = Outer::open().await?;
    let space = "org-memory";
    machine::namespace(&outer, space)?;
    let before = inventory(&outer, space).await?;
    let machine = Machine::create(&outer, space, "vm", "Always", template("shell", None)?).await?;
    let first = machine.instance_in("Running", None).await?;
    machine.says("guest: ready").await?;
    let launchers = outer.launchers(space, "vm").await?;
    let launcher = launchers.first().context("a launcher")?;
    // What is requested holds a whole guest, so only a limit below that is ever met; and whoever takes what is left, the
    // kernel chooses the largest.
    pods::limit_memory(&launcher.uid().context("uid")?, 8 << 20)?;
    let hungry = "head -c 64M /dev/zero | tail -c 64M >/dev/null";
    let eats = outer.kubectl(&["exec", "-n", space, &launcher.name_any(), "--", "sh", "-c", hungry]);
    println!("-- what took the memory ended: {eats:?}");
    machine.instance_in("Running", Some(&first)).await?;
    let told = told(&outer, space, &first, "OOMKilled").await?;
    ensure!(told.contains("memory"), "{told}");
    machine.says("guest: ready").await?;
    machine.delete().await?;
    nothing_since(&outer, space, &before).await?;
    outer.kubectl(&["delete", "namespace", space])?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn e2e_a_machine_makes_way_for_a_pod_of_higher_priority() -> Result<()> {
    let outer = Outer::open().await?;
    let space = "org-priority";
    machine::namespace(&outer, space)?;
    let [low, high] = ["story-low", "story-high"];
    outer.kubectl(&["delete", "priorityclass", low, high, "--ignore-not-found"])?;
    for (class, value) in [(low, "--value=1"), (high, "--value=2")] {
        // The machine itself is in nobody's way.
        let policy = if class == low { "Never" } else { "PreemptLowerPriority" };
        let policy = format!("--preemption-policy={policy}");
        outer.kubectl(&["create", "priorityclass", class, value, &policy])?;
    }
    let before = inventory(&outer, space).await?;

    let mut template = template("shell", None)?;
    template["spec"]["priorityClassName"] = json!(low);
    let machine = Machine::create(&outer, space, "vm", "Always", template).await?;
    let first = machine.instance_in("Running", None).await?;
    machine.says("guest: ready").await?;
    let node = machine.node().await?;
    let mut console = machine.stream("console", USER).await?;
    let heard = tokio::spawn(async move { console.expect("guest: button").await });

    // It wants the machine's node, and the machine off it.
    let pods = Api::<Pod>::namespaced(outer.client.clone(), space);
    let beside = json!({"labelSelector": {"matchLabels": {"vm.kubevirt.io/name": "vm"}},
        "topologyKey": "kubernetes.io/hostname"});
    let important = json!({"metadata": {"name": "important"}, "spec": {
        "priorityClassName": high,
        "terminationGracePeriodSeconds": 0,
        "nodeSelector": {"kubernetes.io/hostname": node},
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [beside]}},
        "containers": [{"name": "pause", "image": PAUSE_IMAGE}],
    }});
    pods.create(&PostParams::default(), &serde_json::from_value(important)?)
        .await?;
    let running = |pod: Option<&Pod>| pod.and_then(|pod| pod.status.as_ref()?.phase.as_deref()) == Some("Running");
    wait::until(&pods, "important", "the pod runs", running).await?;
    ensure!(heard.await??, "the guest was not asked to shut down");
    machine.instance_in("Running", Some(&first)).await?;
    let told = told(&outer, space, &first, "PodEvicted").await?;
    ensure!(told.contains("preempt"), "{told}");
    ensure!(machine.node().await? != node, "it is back where it made way");

    pods.delete("important", &DeleteParams::default()).await?;
    wait::until(&pods, "important", "gone", |pod: Option<&Pod>| pod.is_none()).await?;
    machine.delete().await?;
    nothing_since(&outer, space, &before).await?;
    outer.kubectl(&["delete", "priorityclass", low, high])?;
    outer.kubectl(&["delete", "namespace", space])?;
    Ok(())
}

/// Types a line at the guest's console, which is to be kept until the guest has done it.
async fn types(machine: &Machine<'_>, line: &str) -> Result<PlainStream> {
    let mut console = machine.stream("console", USER).await?;
    console.send(format!("{line}\n").as_bytes()).await?;
    Ok(console)
}

/// What the event says by which the end of an instance was told.
async fn told(outer: &Outer, space: &str, uid: &str, reason: &str) -> Result<String> {
    let events = Api::<Event>::namespaced(outer.client.clone(), space);
    let events = events.list(&ListParams::default()).await?.items;
    let of_instance = |event: &&Event| event.involved_object.uid.as_deref() == Some(uid);
    let own: Vec<_> = events.iter().filter(of_instance).collect();
    let told = own.iter().find(|event| event.reason.as_deref() == Some(reason));
    let told = told.with_context(|| format!("no event {reason} among {own:#?}"))?;
    Ok(told.message.clone().unwrap_or_default())
}
