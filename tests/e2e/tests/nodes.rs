//! Virtual machines outlive the nodes that they run on: drained with their consent, lost without it, never twice at once.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, PostParams};
use kube::runtime::conditions::is_deleted;
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use kubernest_e2e::leftovers::{inventory, nodes_are_clean, nothing_since};
use kubernest_e2e::machine::{self, Machine, USER, template};
use kubernest_e2e::{Outer, wait};
use serde_json::json;

const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";

#[tokio::test(flavor = "multi_thread")]
async fn e2e_machines_outlive_their_nodes() -> Result<()> {
    let outer = Outer::open().await?;
    nodes_are_clean(&outer)?;
    let space = "org-nodes";
    machine::namespace(&outer, space)?;
    let before = inventory(&outer, space).await?;
    let machine = Machine::create(&outer, space, "vm", "Always", template("shell", None)?).await?;
    let first = machine.instance_in("Running", None).await?;

    let second = drained(&outer, &machine, space, &first).await?;
    lost(&outer, &machine, space, &second).await?;

    machine.delete().await?;
    nothing_since(&outer, space, &before).await?;
    nodes_are_clean(&outer)?;
    // Unwaited for: where kube-apiserver asked the lost replica of kubernest-api what it serves, it asks again after a
    // minute only, and namespaces go once all groups are known.
    outer.kubectl(&["delete", "namespace", space, "--wait=false"])?;
    Ok(())
}

/// A budget holds the drain up; without it the guest is shut down and started on the other node.
async fn drained(outer: &Outer, machine: &Machine<'_>, space: &str, first: &str) -> Result<String> {
    let node = machine.node().await?;
    // The guest hears its power button once it is ready.
    machine.says("guest: ready").await?;
    let budgets = Api::<PodDisruptionBudget>::namespaced(outer.client.clone(), space);
    let budget = json!({"metadata": {"name": "vm"}, "spec": {
        "minAvailable": 1, "selector": {"matchLabels": {"vm.kubevirt.io/name": "vm"}},
    }});
    let budget: PodDisruptionBudget = serde_json::from_value(budget)?;
    budgets.create(&PostParams::default(), &budget).await?;
    let counted = |budget: Option<&PodDisruptionBudget>| {
        let status = budget.and_then(|budget| budget.status.as_ref());
        status.is_some_and(|status| status.expected_pods == 1)
    };
    wait::until(&budgets, "vm", "the budget counts the launcher", counted).await?;
    let drain = |patience: &str| {
        let patience = format!("--timeout={patience}");
        let selector = "--pod-selector=kubevirt.io=virt-launcher";
        outer.kubectl(&["drain", &node, selector, "--delete-emptydir-data", &patience])
    };
    let refused = drain("20s").err().context("the drain went past the budget")?;
    ensure!(refused.to_string().contains("disruption budget"), "{refused}");
    ensure!(machine.instance_in("Running", None).await? == first, "it was disturbed");

    budgets.delete("vm", &DeleteParams::default()).await?;
    let mut console = machine.stream("console", USER).await?;
    let heard = tokio::spawn(async move { console.expect("guest: button").await });
    println!("-- draining {node}");
    drain("5m")?;
    ensure!(heard.await??, "the guest was not asked to shut down");
    let second = machine.instance_in("Running", Some(first)).await?;
    let now = machine.node().await?;
    ensure!(now != node, "it runs on the node that was drained");
    let events = outer.kubectl(&["get", "events", "-n", space, "-o", "jsonpath={.items[*].reason}"])?;
    // Its kubelet tells its end before it takes the volumes down, and deletes it only then.
    let mut reasons = events.split(' ');
    ensure!(
        reasons.any(|reason| reason == "PodEvicted"),
        "nobody says why: {events}"
    );
    outer.kubectl(&["uncordon", &node])?;
    Ok(second)
}

/// The plug of its node is pulled: nothing starts while nobody knows what runs there, and the machine starts elsewhere once
/// somebody has said that the node is off.
async fn lost(outer: &Outer, machine: &Machine<'_>, space: &str, second: &str) -> Result<()> {
    let node = machine.node().await?;
    let number: usize = (0..outer.bed.plan().nodes())
        .find(|number| outer.bed.plan().node_name(*number) == node)
        .context("the node's number")?;
    println!("-- pulling the plug of {node}");
    outer.bed.power_off(number).await?;
    let nodes = Api::<Node>::all(outer.client.clone());
    let silent = |node: Option<&Node>| node.is_some_and(|node| tainted(node, UNREACHABLE));
    wait::until(&nodes, &node, "noticed", silent).await?;
    let doubtful = |instance: Option<&VirtualMachineInstance>| {
        let conditions = instance
            .and_then(|instance| instance.status.as_ref())
            .map(|status| &status.conditions);
        let mut reasons = conditions
            .into_iter()
            .flatten()
            .map(|condition| condition.reason.as_deref());
        reasons.any(|reason| reason == Some("NodeUnreachable"))
    };
    wait::until(&machine.instances(), "vm", "told of", doubtful).await?;
    let instance = machine.instances().get("vm").await?;
    ensure!(instance.uid().as_deref() == Some(second), "a second run was begun");
    let launchers = outer.launchers(space, "vm").await?;
    let [launcher] = launchers.as_slice() else {
        anyhow::bail!("a second launcher was made: {launchers:?}")
    };

    outer.kubectl(&[
        "taint",
        "node",
        &node,
        &format!("{OUT_OF_SERVICE}=nodeshutdown:NoExecute"),
    ])?;
    machine.instance_in("Running", Some(second)).await?;
    ensure!(machine.node().await? != node, "it runs on a node without power");
    machine.says("guest: ready").await?;

    outer.bed.restore(number).await?;
    // Kubernetes has it deleted; its kubelet may be first to find out.
    let pods = Api::<Pod>::namespaced(outer.client.clone(), space);
    let uid = launcher.uid().context("uid")?;
    wait::until(&pods, &launcher.name_any(), "the lost launcher gone", is_deleted(&uid)).await?;
    outer.kubectl(&["taint", "node", &node, &format!("{OUT_OF_SERVICE}-")])?;
    outer.kubectl(&[
        "rollout",
        "status",
        "-n",
        "kubernest-system",
        "daemonset/kubernest-node",
    ])?;
    for deployment in ["kubernest-operator", "kubernest-api"] {
        let deployment = format!("deployment/{deployment}");
        outer.kubectl(&["rollout", "status", "-n", "kubernest-system", &deployment])?;
    }
    Ok(())
}

fn tainted(node: &Node, key: &str) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    taints.into_iter().flatten().any(|taint| taint.key == key)
}
