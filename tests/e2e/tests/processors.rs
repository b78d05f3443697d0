//! A virtual machine on a processor that nobody else uses, on the node of the bed whose kubelet gives some away.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, PostParams};
use kube::{ResourceExt, runtime::conditions};
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use kubernest_crds::labels;
use kubernest_e2e::leftovers::{inventory, nothing_since};
use kubernest_e2e::machine::{self, Machine, template};
use kubernest_e2e::{Outer, wait};
use serde_json::{Value, json};

const SPACE: &str = "org-processors";

#[tokio::test(flavor = "multi_thread")]
async fn e2e_a_machine_has_a_processor_of_its_own() -> Result<()> {
    let outer = Outer::open().await?;
    machine::namespace(&outer, SPACE)?;
    let before = inventory(&outer, SPACE).await?;
    let plan = outer.bed.plan();
    let gives = plan
        .static_cpus()
        .context("no node of this bed gives processors away")?;
    let nodes = Api::<Node>::all(outer.client.clone());
    for i in 0..plan.nodes() {
        let name = plan.node_name(i);
        let said = if i == gives { "true" } else { "false" };
        let labelled = |node: Option<&Node>| {
            node.is_some_and(|node| {
                node.labels()
                    .get(labels::CPU_MANAGER)
                    .is_some_and(|label| label == said)
            })
        };
        wait::until(&nodes, &name, &format!("{}={said}", labels::CPU_MANAGER), labelled).await?;
    }

    let machine = Machine::create(&outer, SPACE, "vm", "Always", pinned(None)?).await?;
    machine.instance_in("Running", None).await?;
    let instance = machine.instances().get("vm").await?;
    let status = instance.status.context("its status")?;
    ensure!(status.node_name == Some(plan.node_name(gives)), "it is on another node");
    ensure!(
        status.qos_class.as_deref() == Some("Guaranteed"),
        "{:?}",
        status.qos_class
    );

    let threads = qemu_threads(&format!("{SPACE}_vm"))?;
    let guests: Vec<_> = threads.iter().filter(|(name, _)| name.starts_with("CPU 0/")).collect();
    println!("-- qemu's threads: {threads:?}");
    ensure!(guests.len() == 1, "the guest has one processor");
    let own = &guests[0].1;
    ensure!(own.parse::<u32>().is_ok(), "it runs on {own}, which is not one");
    ensure!(threads.iter().all(|(_, allowed)| allowed == own), "qemu keeps to it");
    machine.says("guest: ready").await?;
    others_are_kept_off(&outer, &plan.node_name(gives), own).await?;

    // Where none is given away it waits, and says for what.
    let elsewhere = (0..plan.nodes()).find(|i| *i != gives).context("another node")?;
    let lost = Machine::create(
        &outer,
        SPACE,
        "lost",
        "Always",
        pinned(Some(&plan.node_name(elsewhere)))?,
    )
    .await?;
    lost.shows("ErrorUnschedulable").await?;
    let told = |vmi: Option<&VirtualMachineInstance>| {
        let status = vmi.and_then(|vmi| vmi.status.as_ref());
        let mut conditions = status.iter().flat_map(|status| &status.conditions);
        let wanted = "kubevirt.io/cpumanager=true";
        conditions.any(|condition| {
            condition
                .message
                .as_ref()
                .is_some_and(|message| message.contains(wanted))
        })
    };
    wait::until(&lost.instances(), "lost", "told what it waits for", told).await?;

    lost.delete().await?;
    machine.delete().await?;
    nothing_since(&outer, SPACE, &before).await?;
    outer.kubectl(&["delete", "namespace", SPACE])?;
    Ok(())
}

/// A machine with one dedicated processor, on this node only if one is named.
fn pinned(node: Option<&str>) -> Result<Value> {
    let mut template = template("shell", None)?;
    template["spec"]["domain"]["cpu"] = json!({"cores": 1, "dedicatedCpuPlacement": true});
    if let Some(node) = node {
        template["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": node});
    }
    Ok(template)
}

/// Names of the threads of a domain's qemu with what each may run on, as the machine that the bed is on sees them.
fn qemu_threads(domain: &str) -> Result<Vec<(String, String)>> {
    let name = format!("guest={domain},");
    let processes = fs::read_dir("/proc")?.flatten().map(|entry| entry.path());
    let runs_it = |process: &std::path::PathBuf| {
        let line = fs::read(process.join("cmdline")).unwrap_or_default();
        line.starts_with(b"/usr/bin/qemu-system") && String::from_utf8_lossy(&line).contains(&name)
    };
    let qemu = processes.filter(|process| process.join("task").exists()).find(runs_it);
    let qemu = qemu.with_context(|| format!("no qemu of {domain}"))?;
    let threads = fs::read_dir(qemu.join("task"))?.flatten().map(|entry| entry.path());
    let thread = |thread: std::path::PathBuf| {
        let allowed = allowed(&fs::read_to_string(thread.join("status")).ok()?)?;
        Some((fs::read_to_string(thread.join("comm")).ok()?.trim().to_owned(), allowed))
    };
    Ok(threads.filter_map(thread).collect())
}

fn allowed(status: &str) -> Option<String> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    Some(line.trim().to_owned())
}

/// A pod of the same node, made now, may not run there.
async fn others_are_kept_off(outer: &Outer, node: &str, own: &str) -> Result<()> {
    let image = outer.bed.load_testbox().await?;
    let pods = Api::<Pod>::namespaced(outer.client.clone(), SPACE);
    let pod = json!({"metadata": {"name": "other"}, "spec": {"nodeName": node, "restartPolicy": "Never", "containers": [{
        "name": "main", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["cat", "/proc/self/status"],
    }]}});
    pods.create(&PostParams::default(), &serde_json::from_value(pod)?)
        .await?;
    let over = |pod: Option<&Pod>| pod.and_then(|pod| pod.status.as_ref()?.phase.as_deref()) == Some("Succeeded");
    wait::until(&pods, "other", "over", over).await?;
    let shared = allowed(&pods.logs("other", &Default::default()).await?).context("what it may run on")?;
    println!("-- {own} is the machine's, other pods of {node} share {shared}");
    let numbers = |list: &str| -> Result<BTreeSet<u32>> {
        let mut all = BTreeSet::new();
        for part in list.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            all.extend(first.parse::<u32>()?..=last.parse::<u32>()?);
        }
        Ok(all)
    };
    ensure!(numbers(&shared)?.is_disjoint(&numbers(own)?), "{shared} has {own}");
    let uid = pods.get("other").await?.uid().context("uid")?;
    pods.delete("other", &DeleteParams::default()).await?;
    wait::until(&pods, "other", "gone", conditions::is_deleted(&uid)).await?;
    Ok(())
}
