//! A guest with Debian's guest agent: what is known of it through the API server, and probes that go through it.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt};
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use kubernest_e2e::leftovers::{inventory, nothing_since};
use kubernest_e2e::machine::{self, Machine, USER, template};
use kubernest_e2e::{Outer, wait};
use serde_json::json;

fn has(instance: Option<&VirtualMachineInstance>, condition: &str) -> bool {
    let conditions = instance.and_then(|instance| instance.status.as_ref());
    let mut conditions = conditions.iter().flat_map(|status| &status.conditions);
    conditions.any(|one| one.type_ == condition && one.status == "True")
}

fn connected(instance: Option<&VirtualMachineInstance>) -> bool {
    has(instance, "AgentConnected")
}

fn gone(instance: Option<&VirtualMachineInstance>) -> bool {
    instance.is_some() && !connected(instance)
}

fn ready(instance: Option<&VirtualMachineInstance>) -> bool {
    has(instance, "Ready")
}

fn unready(instance: Option<&VirtualMachineInstance>) -> bool {
    instance.is_some() && !ready(instance)
}

#[tokio::test(flavor = "multi_thread")]
async fn e2e_a_guest_agent_tells_and_runs_probes() -> Result<()> {
    let outer = Outer::open().await?;
    let space = "org-agents";
    machine::namespace(&outer, space)?;
    let before = inventory(&outer, space).await?;
    let mut template = template("shell", None)?;
    template["spec"]["domain"]["firmware"]["kernelBoot"]["container"]["initrdPath"] = json!("/boot/initrd-agent.img");
    // The guest's own web page is there once it is ready.
    let command = ["/bin/sh", "-c", "test -s /www/index.html && echo served"];
    template["spec"]["readinessProbe"] =
        json!({"exec": {"command": command}, "timeoutSeconds": 10, "periodSeconds": 2});
    template["spec"]["livenessProbe"] = json!({"guestAgentPing": {}, "timeoutSeconds": 10, "periodSeconds": 5,
        "initialDelaySeconds": 240, "failureThreshold": 10});
    let machine = Machine::create(&outer, space, "vm", "Always", template).await?;
    machine.instance_in("Running", None).await?;
    let (code, answer) = machine.told("guestosinfo", "mallory").await?;
    ensure!(code == 403, "a stranger asks the guest: {code} {answer}");

    let instances = machine.instances();
    wait::until(&instances, "vm", "AgentConnected", connected).await?;
    // Asked once it is connected, and told by a write of its own.
    let told = |vmi: Option<&VirtualMachineInstance>| {
        let os = vmi.and_then(|vmi| vmi.status.as_ref()?.guest_os_info.as_ref());
        os.is_some_and(|os| os.pretty_name == "Tiny Guest 1")
    };
    wait::until(&instances, "vm", "the guest's system", told).await?;
    wait::until(&instances, "vm", "Ready by a probe in the guest", ready).await?;
    answers(&machine).await?;

    // Nothing is written while nothing is new.
    let rest = instances.get("vm").await?.resource_version();
    answers(&machine).await?;
    ensure!(instances.get("vm").await?.resource_version() == rest, "written at rest");

    // A user's pause is no reason to stop a guest that is pinged.
    machine.ask("virtualmachineinstances", "pause").await?;
    wait::until(&instances, "vm", "not Ready while it stands still", unready).await?;
    // The kubelet too, whose word about the pause would otherwise come when it is over.
    let pods = Api::<Pod>::namespaced(outer.client.clone(), space);
    let launchers = outer.launchers(space, "vm").await?;
    let launcher = launchers.first().context("a launcher")?.name_any();
    let out_of_services = |pod: Option<&Pod>| {
        let conditions = pod.and_then(|pod| pod.status.as_ref()?.conditions.as_ref());
        conditions.is_some_and(|all| all.iter().any(|one| one.type_ == "Ready" && one.status == "False"))
    };
    wait::until(&pods, &launcher, "in no Service", out_of_services).await?;
    machine.ask("virtualmachineinstances", "unpause").await?;
    wait::until(&instances, "vm", "Ready when it goes on", ready).await?;

    let mut console = machine.stream("console", USER).await?;
    console.send(b"agent stop\n").await?;
    wait::until(&instances, "vm", "no AgentConnected", gone).await?;
    let (code, answer) = machine.told("guestosinfo", USER).await?;
    let message = answer["message"].as_str().unwrap_or_default();
    ensure!(
        code == 409 && message.ends_with("VMI does not have guest agent connected"),
        "{code} {answer}"
    );
    wait::until(&instances, "vm", "not Ready without its agent", unready).await?;
    console.send(b"agent start\n").await?;
    wait::until(&instances, "vm", "Ready again", ready).await?;
    // Without it the guest would be asked by its power button.
    wait::until(&instances, "vm", "AgentConnected again", connected).await?;

    machine.ask("virtualmachineinstances", "softreboot").await?;
    machine.says("guest: agent runs shutdown -h -r").await?;
    machine.delete().await?;
    nothing_since(&outer, space, &before).await?;
    outer.kubectl(&["delete", "namespace", space])?;
    Ok(())
}

async fn answers(machine: &Machine<'_>) -> Result<()> {
    let (code, info) = machine.told("guestosinfo", USER).await?;
    ensure!(code == 200 && info["hostname"] == "tiny", "{code} {info}");
    for list in ["userlist", "filesystemlist"] {
        let (code, answer) = machine.told(list, USER).await?;
        ensure!(code == 200 && answer["items"].is_array(), "{list}: {code} {answer}");
    }
    Ok(())
}
