//! Virtual machines as KubeVirt's users have them, with a real guest: started, watched, paused, stopped, read back, and
//! reached through the API server with an ordinary user's rights.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::{ResourceExt, runtime::conditions::is_deleted};
use kubernest_crds::kubevirt::v1::VirtualMachine;
use kubernest_e2e::leftovers::{inventory, nothing_since};
use kubernest_e2e::machine::{self, Machine, USER, template};
use kubernest_e2e::{Outer, wait};
use kubernest_integration::{PlainStream, StreamError};
use serde_json::json;

const SYSTEM: &str = "kubernest-system";

#[tokio::test(flavor = "multi_thread")]
async fn e2e_a_machine_is_used_through_the_api_server() -> Result<()> {
    let outer = Outer::open().await?;
    let space = "org-machines";
    machine::namespace(&outer, space)?;
    claim(&outer, space, "data").await?;
    let before = inventory(&outer, space).await?;
    let mut shell = template("shell", Some("data"))?;
    shell["spec"]["readinessProbe"] = json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1});
    let machine = Machine::create(&outer, space, "vm", "Halted", shell).await?;
    machine.shows("Stopped").await?;
    refuses_strangers(&machine).await?;

    machine.ask("virtualmachines", "start").await?;
    let first = machine.instance_in("Running", None).await?;
    let console = console_answers(&machine).await?;
    wait::until(&machine.api(), "vm", "the guest listens", ready).await?;
    pause_stops_the_guest(&machine, console).await?;
    reboots(&machine).await?;
    screen_and_ports_are_reached(&machine).await?;
    usage_is_told(&outer, space).await?;
    outer.memory_fits_its_request(space, "vm").await?;
    console_outlives_the_other_replica(&outer, &machine).await?;

    machine.ask("virtualmachines", "restart").await?;
    let second = machine.instance_in("Running", Some(&first)).await?;
    // By the time that it answers it has said what is on its disks.
    heard(&machine, "back").await?;
    let logs = outer.kubectl(&["logs", "-n", space, "-l", "vm.kubevirt.io/name=vm", "--tail=-1"])?;
    ensure!(
        logs.contains("starts written-by-guest"),
        "what the guest wrote is lost: {logs}"
    );
    machine.ask("virtualmachines", "stop").await?;
    machine.shows("Stopped").await?;
    ensure!(
        machine.put("virtualmachines", "restart", USER).await?.0 == 409,
        "nothing runs"
    );
    ensure!(first != second, "a run is an instance of its own");

    machine.delete().await?;
    nothing_since(&outer, space, &before).await?;
    outer.kubectl(&["delete", "namespace", space])?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn e2e_run_strategies_start_and_start_again() -> Result<()> {
    let outer = Outer::open().await?;
    let space = "org-strategies";
    machine::namespace(&outer, space)?;

    // Without a kernel of its own: the firmware finds one on the disk.
    let mut disk = template("poweroff", None)?;
    disk["spec"]["domain"]["firmware"] = json!({"bootloader": {"bios": {}}});
    disk["spec"]["volumes"][0]["containerDisk"]["path"] = json!("/boot/boot.img");
    let once = Machine::create(&outer, space, "once", "Once", disk).await?;
    let run = once.instance_in("Succeeded", None).await?;
    let rerun = Machine::create(&outer, space, "rerun", "RerunOnFailure", template("panic", None)?).await?;
    let failed = rerun.instance_in("Failed", None).await?;
    rerun.instance_in("Running", Some(&failed)).await?;
    ensure!(once.instance_in("Succeeded", None).await? == run, "Once runs once");

    let mut manual = template("shell", None)?;
    manual["spec"]["readinessProbe"] = json!({"httpGet": {"port": 8080, "path": "/"}, "periodSeconds": 1});
    manual["spec"]["startStrategy"] = json!("Paused");
    let manual = Machine::create(&outer, space, "manual", "Manual", manual).await?;
    manual.shows("Stopped").await?;
    manual.ask("virtualmachines", "start").await?;
    manual.shows("Paused").await?;
    ensure!(
        !ready(Some(&manual.api().get("manual").await?)),
        "it answers its probe though it stands still"
    );
    manual.ask("virtualmachineinstances", "unpause").await?;
    wait::until(&manual.api(), "manual", "the guest answers its probe", ready).await?;
    manual.shows("Running").await?;
    manual.ask("virtualmachines", "stop").await?;
    manual.shows("Stopped").await?;
    for machine in [once, rerun, manual] {
        machine.delete().await?;
    }
    outer.kubectl(&["delete", "namespace", space])?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn e2e_the_sample_machine_has_a_shell_on_its_console() -> Result<()> {
    let outer = Outer::open().await?;
    let space = "org-sample";
    machine::namespace(&outer, space)?;
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/samples/virtualmachine.yaml");
    let sample = outer.kubectl(&["create", "--dry-run=client", "-o", "json", "-f", sample])?;
    let mut sample: VirtualMachine = serde_json::from_str(&sample)?;
    sample.metadata.namespace = Some(space.to_owned());
    let machine = Machine::create_from(&outer, sample).await?;
    wait::until(&machine.api(), "hello", "the sample's guest serves its page", ready).await?;
    let mut console = machine.stream("console", USER).await?;
    console.send(b"echo $((6 * 7)) of $(hostname)\n").await?;
    ensure!(console.expect("42 of hello").await?, "no shell");
    machine.delete().await?;
    outer.kubectl(&["delete", "namespace", space])?;
    Ok(())
}

fn ready(machine: Option<&VirtualMachine>) -> bool {
    let status = machine.and_then(|machine| machine.status.as_ref());
    status.is_some_and(|status| status.ready)
}

async fn claim(outer: &Outer, namespace: &str, name: &str) -> Result<()> {
    let object = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "64Mi"}}},
    });
    let claims = Api::namespaced(outer.client.clone(), namespace);
    let object: k8s_openapi::api::core::v1::PersistentVolumeClaim = serde_json::from_value(object)?;
    claims.create(&PostParams::default(), &object).await?;
    Ok(())
}

async fn refuses_strangers(machine: &Machine<'_>) -> Result<()> {
    let (code, message) = machine.put("virtualmachines", "start", "mallory").await?;
    ensure!(code == 403, "a stranger starts machines: {code} {message}");
    for path in ["console", "vnc", "portforward/8080"] {
        match machine.stream(path, "mallory").await {
            Err(StreamError::Refused { code: 403, .. }) => {}
            other => anyhow::bail!("a stranger's {path}: {:?}", other.err()),
        }
    }
    Ok(())
}

/// The guest hears what is typed and is heard; a newer session ends the older.
async fn console_answers(machine: &Machine<'_>) -> Result<PlainStream> {
    let mut older = heard(machine, "one").await?;
    let newer = heard(machine, "two").await?;
    while older.receive().await?.is_some() {}
    Ok(newer)
}

/// Types until the guest, which may be booting, answers.
async fn heard(machine: &Machine<'_>, word: &str) -> Result<PlainStream> {
    let mut console = machine.stream("console", USER).await?;
    type_until_heard(&mut console, word).await?;
    Ok(console)
}

async fn type_until_heard(console: &mut PlainStream, word: &str) -> Result<()> {
    let answer = format!("guest: heard {word}");
    loop {
        console.send(format!("{word}\n").as_bytes()).await?;
        // A guest that still boots throws away what it is told.
        let heard = tokio::time::timeout(std::time::Duration::from_secs(2), console.expect(&answer)).await;
        match heard {
            Ok(heard) => return heard?.then_some(()).context("the console ended"),
            Err(_) => continue,
        }
    }
}

async fn pause_stops_the_guest(machine: &Machine<'_>, mut console: PlainStream) -> Result<()> {
    machine.ask("virtualmachineinstances", "pause").await?;
    machine.shows("Paused").await?;
    let (code, message) = machine.put("virtualmachineinstances", "pause", USER).await?;
    ensure!(
        code == 409 && message.ends_with("VMI is already paused"),
        "{code} {message}"
    );
    console.send(b"paused\n").await?;
    machine.ask("virtualmachineinstances", "unpause").await?;
    machine.shows("Running").await?;
    type_until_heard(&mut console, "again").await
}

async fn reboots(machine: &Machine<'_>) -> Result<()> {
    for verb in ["reset", "softreboot"] {
        let mut console = heard(machine, verb).await?;
        machine.ask("virtualmachineinstances", verb).await?;
        ensure!(console.expect("guest: up").await?, "the console ended at {verb}");
        ensure!(console.expect("guest: ready").await?, "the console ended at {verb}");
    }
    Ok(())
}

async fn screen_and_ports_are_reached(machine: &Machine<'_>) -> Result<()> {
    let mut screen = machine.stream("vnc", USER).await?;
    ensure!(screen.expect("RFB 003.").await?, "no greeting");
    match machine.stream("vnc?preserveSession=true", USER).await {
        Err(StreamError::Refused { code: 409, .. }) => {}
        other => anyhow::bail!("a session that shall stay: {:?}", other.err()),
    }
    let picture = machine.download("vnc/screenshot").await?;
    ensure!(
        picture.starts_with(b"\x89PNG\r\n\x1a\n"),
        "no PNG: {} bytes",
        picture.len()
    );
    let mut page = machine.stream("portforward/8080", USER).await?;
    page.send(b"GET / HTTP/1.0\r\n\r\n").await?;
    ensure!(page.expect("hello from the guest").await?, "no answer");
    Ok(())
}

/// Prometheus gets what the machine uses from its launcher, where the pod's annotations say.
async fn usage_is_told(outer: &Outer, space: &str) -> Result<()> {
    let launchers = outer.launchers(space, "vm").await?;
    let [launcher] = launchers.as_slice() else {
        anyhow::bail!("one launcher, found {}", launchers.len())
    };
    let port = launcher.annotations().get("prometheus.io/port").context("a port")?;
    let name = launcher.name_any();
    let path = format!("/api/v1/namespaces/{space}/pods/{name}:{port}/proxy/metrics");
    let told = outer.kubectl(&["get", "--raw", &path])?;
    let cpu = r#"kubevirt_vmi_cpu_usage_seconds_total{namespace="org-machines",name="vm"}"#;
    ensure!(told.contains(cpu), "no {cpu} in {told}");
    Ok(())
}

/// The replica that does not carry the console goes; the console stays.
async fn console_outlives_the_other_replica(outer: &Outer, machine: &Machine<'_>) -> Result<()> {
    let mut console = heard(machine, "before").await?;
    let pods = Api::<Pod>::namespaced(outer.client.clone(), SYSTEM);
    let selector = ListParams::default().labels("app.kubernetes.io/component=api");
    let mut others = Vec::new();
    for pod in pods.list(&selector).await? {
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{}:8080/proxy/metrics", pod.name_any());
        let metrics = outer.kubectl(&["get", "--raw", &path])?;
        let streams = metrics
            .lines()
            .filter(|line| line.contains("subresource_streams{subresource=\"console\"}"));
        if streams.map(|line| line.ends_with(" 1")).all(|carries| !carries) {
            others.push(pod);
        }
    }
    let [other] = others.as_slice() else {
        anyhow::bail!(
            "one of two replicas carries the console, found {} that do not",
            others.len()
        )
    };
    pods.delete(&other.name_any(), &DeleteParams::default().grace_period(0))
        .await?;
    wait::until(
        &pods,
        &other.name_any(),
        "replica gone",
        is_deleted(&other.uid().unwrap_or_default()),
    )
    .await?;
    type_until_heard(&mut console, "after").await?;
    outer.kubectl(&["rollout", "status", "-n", SYSTEM, "deployment/kubernest-api"])?;
    Ok(())
}
