//! Virtual machines: how soon one starts, how soon twenty do, how quick its console is, and what all of Kubernest needs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, AttachParams, DeleteParams, ListParams, LogParams, PostParams, WatchEvent, WatchParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Resource, ResourceExt};
use kubernest_crds::kubevirt::v1::{VirtualMachineInstance, phase};
use kubernest_crds::labels::SYSTEM_NAMESPACE;
use kubernest_e2e::{Outer, PlainStream, machine, pods, wait};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::figure::{Figure, median, percentile};
use crate::writes;

const NAMESPACE: &str = "bench-machines";
/// Machines that are made at once.
const BURST: usize = 20;
/// Memory of each guest of the fleet, in bytes.
const FLEET_GUEST: u64 = 128 << 20;
/// Bytes that are sent to a console, one after the other.
const ECHOES: usize = 100;
/// What the small guest's shell says to the line "bench".
const ANSWER: &str = "guest: heard bench";
/// What KubeVirt's components request for one node, in MiB (virt-operator ×2, virt-api ×2, virt-controller ×2, virt-handler).
const KUBEVIRT_MIB: f64 = 2765.0;
/// What KubeVirt reserves beside a guest of the fleet, in MiB: 240 and a 512th of the guest.
const KUBEVIRT_RESERVES: f64 = 240.25;
/// Its kernel tells from its first moment on. With the default of 9600 baud qemu would hold each byte back for 4 ms. Where
/// twenty guests are emulated at once, timers come so late that Linux would take them for broken, and panic.
const KERNEL_ARGS: &str = "console=ttyS0,115200 earlyprintk=serial no_timer_check";

/// Kernel and initrd of the small guest, for qemu without Kubernest.
pub struct Guest(pub PathBuf);

/// All figures of machines.
pub async fn measure(outer: &Outer, guest: &Guest, runs: u32) -> Result<Vec<Figure>> {
    machine::namespace(outer, NAMESPACE)?;
    let image = outer.bed.load_testbox().await?;
    let mut figures = start(outer, guest, &image, runs).await?;
    figures.extend(echo(outer, guest, &image).await?);
    figures.extend(burst(outer, &image).await?);
    figures.extend(fleet(outer).await?);
    outer.kubectl(&["delete", "namespace", NAMESPACE])?;
    Ok(figures)
}

/// From creation to the guest's first serial byte, next to a plain pod and the same qemu by hand.
async fn start(outer: &Outer, guest: &Guest, image: &str, runs: u32) -> Result<Vec<Figure>> {
    let pods = Api::<Pod>::namespaced(outer.client.clone(), NAMESPACE);
    let instances = Api::<VirtualMachineInstance>::namespaced(outer.client.clone(), NAMESPACE);
    let (mut machines, mut plain, mut by_hand) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=runs {
        let began = Instant::now();
        pods.create(&PostParams::default(), &pod("plain", image)?).await?;
        await_condition(pods.clone(), "plain", conditions::is_pod_running()).await?;
        plain.push(began.elapsed().as_secs_f64());
        remove(&pods, "plain").await?;

        by_hand.push(guest.first_byte().await?);

        let created = Timestamp::now();
        instances
            .create(&PostParams::default(), &instance("vm", "wait", "128Mi")?)
            .await?;
        let spoke = said(outer, "vm", "").await?;
        machines.push(spoke.duration_since(created).as_secs_f64());
        remove(&instances, "vm").await?;
        let last = |all: &[f64]| all.last().copied().unwrap_or_default();
        println!(
            "   run {run} of {runs}: create to first serial byte {:.2} s; a plain pod {:.2} s; qemu by hand {:.2} s",
            last(&machines),
            last(&plain),
            last(&by_hand)
        );
    }
    let (Some(machine), Some(pod), Some(qemu)) = (median(machines), median(plain), median(by_hand)) else {
        bail!("nothing was measured")
    };
    Ok(vec![
        // Twice a pod's start, and qemu's own.
        Figure::against("vmi_start", machine, "s", 2.0 * pod + qemu, 1.0),
        Figure::alone("pod_start", pod, "s", None),
        Figure::alone("qemu_start_by_hand", qemu, "s", None),
    ])
}

/// When the launcher's container wrote the first line of the guest's that has `text`; the launcher's own lines are JSON.
async fn said(outer: &Outer, name: &str, text: &str) -> Result<Timestamp> {
    let instances = Api::<VirtualMachineInstance>::namespaced(outer.client.clone(), NAMESPACE);
    running(&instances, name).await?;
    let launchers = outer.launchers(NAMESPACE, name).await?;
    let launcher = launchers.first().context("the launcher")?.name_any();
    let pods = Api::<Pod>::namespaced(outer.client.clone(), NAMESPACE);
    let params = LogParams {
        follow: true,
        timestamps: true,
        ..LogParams::default()
    };
    let mut lines = futures::AsyncBufReadExt::lines(pods.log_stream(&launcher, &params).await?);
    while let Some(line) = lines.try_next().await? {
        let (time, line) = line.split_once(' ').unwrap_or((&line, ""));
        if !line.starts_with('{') && line.contains(text) {
            return Ok(time.parse()?);
        }
    }
    bail!("the guest of {name} ended without a line with {text:?}")
}

impl Guest {
    /// Seconds from qemu's start to the first byte on its serial line.
    async fn first_byte(&self) -> Result<f64> {
        let began = Instant::now();
        let mut qemu = self.boot("wait")?;
        let mut said = qemu.stdout.take().context("its output")?;
        let mut byte = [0];
        ensure!(said.read(&mut byte).await? == 1, "qemu ended without a byte");
        let took = began.elapsed().as_secs_f64();
        qemu.kill().await?;
        Ok(took)
    }

    /// qemu with the launcher's machine, its serial line on standard input and output; `then` says what its guest does.
    fn boot(&self, then: &str) -> Result<Child> {
        let machine = "-machine q35 -accel tcg,thread=multi,tb-size=64 -cpu Nehalem -m 128";
        let rest = "-nodefaults -no-user-config -display none -serial stdio";
        Command::new("qemu-system-x86_64")
            .args(machine.split(' ').chain(rest.split(' ')))
            .arg("-kernel")
            .arg(self.0.join("vmlinuz"))
            .arg("-initrd")
            .arg(self.0.join("initrd.img"))
            .args(["-append", &format!("{KERNEL_ARGS} then={then}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("qemu-system-x86_64")
    }
}

/// The serial line of a guest that qemu runs without Kubernest.
struct SerialLine {
    /// Ends with it.
    _qemu: Child,
    to: ChildStdin,
    from: ChildStdout,
}

impl SerialLine {
    async fn open(guest: &Guest) -> Result<Self> {
        let mut qemu = guest.boot("shell")?;
        let (to, from) = (qemu.stdin.take(), qemu.stdout.take());
        let (to, from) = (to.context("its input")?, from.context("its output")?);
        let mut line = Self { _qemu: qemu, to, from };
        let mut heard = Vec::new();
        // The guest answers once it reads its console.
        loop {
            line.to.write_all(b"bench\n").await?;
            let answer = async {
                while !String::from_utf8_lossy(&heard).contains(ANSWER) {
                    ensure!(line.from.read_buf(&mut heard).await? > 0, "qemu by hand ended");
                }
                Ok(())
            };
            if let Ok(answer) = tokio::time::timeout(Duration::from_secs(2), answer).await {
                return answer.map(|()| line);
            }
        }
    }

    /// Milliseconds until the terminal has echoed a byte.
    async fn echo(&mut self) -> Result<f64> {
        let began = Instant::now();
        self.to.write_all(b"x").await?;
        let mut heard = Vec::new();
        while !heard.contains(&b'x') {
            ensure!(self.from.read_buf(&mut heard).await? > 0, "qemu by hand ended");
        }
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }
}

/// A byte to a guest's console and back, next to one to a program in a pod and back by `exec`, and to the same guest's serial
/// line without Kubernest, in turn.
async fn echo(outer: &Outer, guest: &Guest, image: &str) -> Result<Vec<Figure>> {
    let instances = Api::<VirtualMachineInstance>::namespaced(outer.client.clone(), NAMESPACE);
    let pods = Api::<Pod>::namespaced(outer.client.clone(), NAMESPACE);
    pods.create(&PostParams::default(), &pod("echo", image)?).await?;
    instances
        .create(&PostParams::default(), &instance("echo", "shell", "128Mi")?)
        .await?;
    await_condition(pods.clone(), "echo", conditions::is_pod_running()).await?;
    running(&instances, "echo").await?;
    let base = "/apis/subresources.kubevirt.io/v1";
    let path = format!("{base}/namespaces/{NAMESPACE}/virtualmachineinstances/echo/console");
    let kubeconfig = outer.bed.kubeconfig();
    let mut console = PlainStream::open(Path::new(&kubeconfig), &path, None).await?;
    // The guest answers once it reads its console.
    loop {
        console.send(b"bench\n").await?;
        let heard = tokio::time::timeout(Duration::from_secs(2), console.expect(ANSWER)).await;
        if let Ok(heard) = heard {
            ensure!(heard?, "the console ended");
            break;
        }
    }
    let params = AttachParams::default().stdin(true).stdout(true).stderr(false);
    let mut process = pods.exec("echo", ["cat"], &params).await?;
    let (mut to, mut from) = (
        process.stdin().context("its input")?,
        process.stdout().context("its output")?,
    );
    let mut serial = SerialLine::open(guest).await?;
    let (mut machine, mut pod, mut by_hand) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ECHOES {
        let began = Instant::now();
        console.send(b"x").await?;
        // The terminal's own echo; whatever was on its way before is read with it.
        while !console.receive().await?.context("the console ended")?.contains(&b'x') {}
        machine.push(began.elapsed().as_secs_f64() * 1e3);
        let began = Instant::now();
        to.write_all(b"x").await?;
        to.flush().await?;
        let mut byte = [0];
        from.read_exact(&mut byte).await?;
        pod.push(began.elapsed().as_secs_f64() * 1e3);
        by_hand.push(serial.echo().await?);
    }
    drop((to, console, serial));
    remove(&pods, "echo").await?;
    remove(&instances, "echo").await?;
    let (Some(machine), Some(pod), Some(by_hand)) = (median(machine), median(pod), median(by_hand)) else {
        bail!("nothing was measured")
    };
    Ok(vec![
        Figure::against("console_echo", machine, "ms", pod, 1.0),
        // What the guest and qemu take of it.
        Figure::beside("serial_echo_by_hand", by_hand, "ms", pod),
    ])
}

/// Twenty at once, next to as many pods; and what Kubernest needs before and with them.
async fn burst(outer: &Outer, image: &str) -> Result<Vec<Figure>> {
    let pods = Api::<Pod>::namespaced(outer.client.clone(), NAMESPACE);
    let instances = Api::<VirtualMachineInstance>::namespaced(outer.client.clone(), NAMESPACE);
    let is_running = |pod: &Pod| pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running");
    let plain = all_at_once(&pods, |name| pod(name, image), is_running).await?;
    remove_all(&pods).await?;

    let at_rest = control_plane_mib(outer).await?;
    let mut audit = writes::Audit::open(&outer.bed.audit_log())?;
    let machines = all_at_once(&instances, |name| instance(name, "wait", "64Mi"), is_in_running).await?;
    audit.rest(Duration::from_secs(10), Duration::from_secs(120)).await?;
    let written: BTreeMap<String, usize> = audit
        .all()
        .into_iter()
        .filter(|(write, _)| !writes::is_lease(write))
        .collect();
    println!("   writes for {BURST} machines: {written:?}");
    let loaded = control_plane_mib(outer).await?;
    remove_all(&instances).await?;

    let writes: usize = written.values().sum();
    let of = |all: &[f64], part| percentile(all.to_vec(), part).context("nothing was measured");
    Ok(vec![
        Figure::beside("vmi_burst_p50", of(&machines, 0.5)?, "s", of(&plain, 0.5)?),
        Figure::beside("vmi_burst_p95", of(&machines, 0.95)?, "s", of(&plain, 0.95)?),
        Figure::alone("vmi_burst_writes", writes as f64 / BURST as f64, "1/VMI", None),
        Figure::beside("control_plane_mib", at_rest, "MiB", KUBEVIRT_MIB),
        Figure::beside("control_plane_20_vms_mib", loaded, "MiB", KUBEVIRT_MIB),
    ])
}

/// What a machine needs beyond its guest's memory where ten share a node, and with it the pages of their programs.
async fn fleet(outer: &Outer) -> Result<Vec<Figure>> {
    let instances = Api::<VirtualMachineInstance>::namespaced(outer.client.clone(), NAMESPACE);
    all_at_once(
        &instances,
        |name| instance(name, "shell", &FLEET_GUEST.to_string()),
        is_in_running,
    )
    .await?;
    let (mut overhead, mut own) = (Vec::new(), Vec::new());
    let fleet = instances.list(&ListParams::default()).await?;
    // All are there before the first is measured: only then they share what they share.
    for instance in &fleet {
        said(outer, &instance.name_any(), "guest: ready").await?;
    }
    for instance in &fleet {
        let launchers = outer.launchers(NAMESPACE, &instance.name_any()).await?;
        let launcher = launchers.first().context("the launcher")?;
        let memory = pods::memory(&launcher.uid().context("uid")?, Some(FLEET_GUEST))?;
        ensure!(memory.guest > 0.0, "no memory of the guest was found");
        println!(
            "   {}: {:.1?}, {:.1} MiB of it in no file; guest {:.1} MiB, {:.1} MiB of translated code",
            launcher.name_any(),
            memory.by_program,
            memory.in_no_file,
            memory.guest,
            memory.translated
        );
        overhead.push(memory.by_program.values().sum());
        own.push(memory.in_no_file);
    }
    remove_all(&instances).await?;
    let (Some(overhead), Some(own)) = (median(overhead), median(own)) else {
        bail!("nothing was measured")
    };
    Ok(vec![
        // At most 60 MiB; next to it what KubeVirt reserves for such a guest.
        Figure::against(
            "vm_overhead_20_vms_mib",
            overhead,
            "MiB",
            KUBEVIRT_RESERVES,
            60.0 / KUBEVIRT_RESERVES,
        ),
        Figure::alone("vm_in_no_file_20_vms_mib", own, "MiB", None),
    ])
}

/// Seconds from each one's creation until it is seen to run, all made at once.
async fn all_at_once<K>(api: &Api<K>, make: impl Fn(&str) -> Result<K>, runs: impl Fn(&K) -> bool) -> Result<Vec<f64>>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + serde::Serialize,
{
    let objects: Vec<K> = (0..BURST)
        .map(|number| make(&format!("burst-{number}")))
        .collect::<Result<_>>()?;
    let version = api
        .list(&ListParams::default())
        .await?
        .metadata
        .resource_version
        .context("version")?;
    let mut events = api.watch(&WatchParams::default(), &version).await?.boxed();
    let began = Instant::now();
    let params = PostParams::default();
    futures::future::try_join_all(objects.iter().map(|object| api.create(&params, object))).await?;
    let mut seen = BTreeMap::new();
    while seen.len() < BURST {
        match events.try_next().await?.context("the watch ended")? {
            WatchEvent::Added(object) | WatchEvent::Modified(object) if runs(&object) => {
                seen.entry(object.name_any()).or_insert(began.elapsed().as_secs_f64());
            }
            _ => {}
        }
    }
    Ok(seen.into_values().collect())
}

/// Memory of all of Kubernest's processes, as proportional set size.
async fn control_plane_mib(outer: &Outer) -> Result<f64> {
    let pods = Api::<Pod>::namespaced(outer.client.clone(), SYSTEM_NAMESPACE);
    let mut by_program = BTreeMap::new();
    for pod in pods.list(&ListParams::default()).await? {
        for (program, mib) in pods::memory(&pod.uid().unwrap_or_default(), None)?.by_program {
            *by_program.entry(program).or_insert(0.0) += mib;
        }
    }
    println!("   Kubernest's own processes: {by_program:.1?}");
    Ok(by_program.values().sum())
}

async fn running(instances: &Api<VirtualMachineInstance>, name: &str) -> Result<()> {
    let reached = |instance: Option<&VirtualMachineInstance>| instance.is_some_and(is_in_running);
    wait::until(instances, name, phase::RUNNING, reached).await?;
    Ok(())
}

fn is_in_running(instance: &VirtualMachineInstance) -> bool {
    instance.status.as_ref().and_then(|status| status.phase.as_deref()) == Some(phase::RUNNING)
}

async fn remove<K>(api: &Api<K>, name: &str) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    let uid = api.get(name).await?.uid().unwrap_or_default();
    api.delete(name, &DeleteParams::default().grace_period(1)).await?;
    await_condition(api.clone(), name, conditions::is_deleted(&uid)).await?;
    Ok(())
}

async fn remove_all<K>(api: &Api<K>) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    for number in 0..BURST {
        let name = format!("burst-{number}");
        api.delete(&name, &DeleteParams::default().grace_period(1)).await?;
    }
    for object in api.list(&ListParams::default()).await? {
        let uid = object.uid().unwrap_or_default();
        await_condition(api.clone(), &object.name_any(), conditions::is_deleted(&uid)).await?;
    }
    Ok(())
}

fn pod(name: &str, image: &str) -> Result<Pod> {
    let container =
        json!({"name": "main", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["sleep", "1000000"]});
    let spec = json!({"terminationGracePeriodSeconds": 1, "containers": [container]});
    Ok(serde_json::from_value(
        json!({"metadata": {"name": name}, "spec": spec}),
    )?)
}

fn instance(name: &str, then: &str, memory: &str) -> Result<VirtualMachineInstance> {
    let mut template: Value = machine::template(then, None)?;
    let spec = &mut template["spec"];
    spec["terminationGracePeriodSeconds"] = json!(1);
    spec["domain"]["memory"]["guest"] = json!(memory);
    spec["domain"]["firmware"]["kernelBoot"]["kernelArgs"] = json!(format!("{KERNEL_ARGS} then={then}"));
    let object = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": name}, "spec": spec,
    });
    Ok(serde_json::from_value(object)?)
}
