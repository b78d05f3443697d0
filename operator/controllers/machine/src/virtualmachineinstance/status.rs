//! The status of an instance as a function of what was observed: phase, conditions, interfaces, volumes.
//!
//! Phases go forward only: Pending → Scheduling → Scheduled → Running → Succeeded | Failed. A final phase never changes.
//! Pure; the clock is passed in, and moves a time only where something changed.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use kubernest_crds::kubevirt::v1::{
    ConsoleTail, Disk, InterfaceStatus, PhaseTransition, VirtualMachineInstance,
    VirtualMachineInstanceCondition as Condition, VirtualMachineInstanceSpec, VirtualMachineInstanceStatus,
    VolumeStatus, phase, start_strategy, vmi_conditions,
};
use kubernest_crds::labels;
use kubernest_domain::paths;

use super::build::CONTAINER;
use super::dereference::node_of;
use super::ending::{self, Ending};
use super::validate::{self, Binding, Obstacle};
use super::{gate, networks, reasons, resources};
use crate::Emulation;
use crate::conditions::{self, FALSE, TRUE, clear, is_true, set};
use crate::stores::NodeState;

/// Condition type that carries the scheduler's refusal (KubeVirt copies the pod's).
pub const POD_SCHEDULED: &str = "PodScheduled";
/// Most lines of a console tail.
pub const TAIL_LINES: usize = 20;
/// Most bytes of a line of it.
pub const TAIL_LINE_BYTES: usize = 200;

/// What a status follows from.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    /// The launcher pod, confirmed.
    pub pod: Option<&'a Pod>,
    /// Its node.
    pub node: NodeState,
    /// Why there is no pod yet.
    pub obstacle: Option<&'a Obstacle>,
    /// The operator's flag, for the words of SoftwareEmulation.
    pub emulation: Emulation,
}

/// The status that `instance` should have.
pub fn status(instance: &VirtualMachineInstance, seen: Seen<'_>, now: Timestamp) -> VirtualMachineInstanceStatus {
    let previous = instance.status.clone().unwrap_or_default();
    let before = previous.phase.clone().unwrap_or_default();
    let deleting = instance.metadata.deletion_timestamp.is_some();
    let had_pod = !matches!(before.as_str(), "" | phase::PENDING);
    let over = if super::is_final(&before) || (seen.pod.is_none() && !had_pod) {
        None
    } else {
        ending::ending(seen.pod, seen.node, deleting)
    };
    let phase = match &over {
        Some(over) => over.phase.to_owned(),
        None => forward(&before, seen.pod).to_owned(),
    };
    let addressed = seen
        .pod
        .filter(|_| !super::is_final(&phase))
        .filter(|pod| has_addresses(pod));
    let mut interfaces = match interfaces(instance, seen.pod) {
        Some(now) => with_the_agents_word(now, &previous.interfaces),
        None => previous.interfaces,
    };
    if addressed.is_none() {
        forget_addresses(&mut interfaces);
    }
    let mut status = VirtualMachineInstanceStatus {
        node_name: seen.pod.and_then(node_of).map(str::to_owned).or(previous.node_name),
        active_pods: active_pods(seen.pod),
        launcher_address: addressed.and_then(|pod| pod.status.as_ref()?.pod_ip.clone()),
        interfaces,
        volume_status: volume_status(instance),
        // kubernest-api's: it stays as what ran there last. An apply that left it out would take nothing away, each time anew.
        guest_os_info: previous.guest_os_info,
        qos_class: seen
            .pod
            .and_then(|pod| pod.status.as_ref()?.qos_class.clone())
            .or(previous.qos_class),
        reason: over.as_ref().map(|over| over.reason.clone()).or(previous.reason),
        console_tail: over
            .as_ref()
            .and_then(|over| last_words(over, previous.console_tail.as_ref()))
            .or(previous.console_tail),
        conditions: previous.conditions,
        phase_transition_timestamps: previous.phase_transition_timestamps,
        phase: Some(phase.clone()),
    };
    if phase != before && phase == phase::RUNNING && starts_paused(instance) {
        // Once: from now on the condition is that of who pauses and unpauses.
        let (reason, message) = (reasons::PAUSED_BY_USER, "the guest was started paused");
        set(
            &mut status.conditions,
            vmi_conditions::PAUSED,
            TRUE,
            reason,
            message,
            now,
        );
    }
    if phase != before {
        // Where the pod is made at the first look, the instance was pending no longer than that took.
        let pending = (before.is_empty() && phase != phase::PENDING).then(|| phase::PENDING.to_owned());
        let begun = pending.into_iter().chain([phase]).map(|phase| PhaseTransition {
            phase,
            phase_transition_timestamp: conditions::seconds(now),
        });
        status.phase_transition_timestamps.extend(begun);
    }
    set_conditions(&mut status, &instance.spec, seen, over.as_ref(), now);
    status
}

/// Whether its guest is to stand still at first.
pub fn starts_paused(instance: &VirtualMachineInstance) -> bool {
    instance.spec.start_strategy.as_deref() == Some(start_strategy::PAUSED)
}

/// The phase of a run that is not over.
fn forward<'a>(before: &'a str, pod: Option<&Pod>) -> &'a str {
    let order = [phase::PENDING, phase::SCHEDULING, phase::SCHEDULED, phase::RUNNING];
    let reached = match pod {
        None => phase::PENDING,
        Some(pod) if guest_runs(pod) => phase::RUNNING,
        Some(pod) if compute(pod).is_some_and(is_running) => phase::SCHEDULED,
        Some(_) => phase::SCHEDULING,
    };
    let rank = |phase: &str| order.iter().position(|known| *known == phase);
    if super::is_final(before) || rank(before) > rank(reached) {
        before
    } else {
        reached
    }
}

/// The launcher said that the domain runs: by its startup probe where the guest is asked as well, else by its readiness.
fn guest_runs(pod: &Pod) -> bool {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let by_startup = containers
        .filter(|container| container.name == CONTAINER)
        .any(|container| container.startup_probe.is_some());
    if by_startup {
        return compute(pod).is_some_and(|container| is_running(container) && container.started == Some(true));
    }
    // Not the pod's readiness, which it has not while the guest stands still.
    pod_condition(pod, "ContainersReady").is_some_and(|ready| ready.status == TRUE)
}

fn set_conditions(
    status: &mut VirtualMachineInstanceStatus,
    spec: &VirtualMachineInstanceSpec,
    seen: Seen<'_>,
    over: Option<&Ending>,
    now: Timestamp,
) {
    let running = status.phase.as_deref() == Some(phase::RUNNING);
    let is_over = status.phase.as_deref().is_some_and(super::is_final);
    let all = &mut status.conditions;
    let paused = is_true(all, vmi_conditions::PAUSED);
    match over {
        Some(over) => set(all, vmi_conditions::READY, FALSE, &over.reason, &describe(over), now),
        // What ended it stays in the words of Ready.
        None if is_over => {}
        None => {
            let (ready, reason, message) = readiness(seen, running, paused);
            set(
                all,
                vmi_conditions::READY,
                if ready { TRUE } else { FALSE },
                reason,
                &message,
                now,
            );
        }
    }
    if is_over {
        clear(all, POD_SCHEDULED);
        clear(all, vmi_conditions::PAUSED);
        clear(all, vmi_conditions::AGENT_CONNECTED);
        return;
    }
    set_synchronized(all, seen, now);
    match seen
        .pod
        .and_then(|pod| pod_condition(pod, "PodScheduled"))
        .filter(|condition| condition.status == FALSE)
    {
        Some(refusal) => {
            let reason = refusal.reason.as_deref().unwrap_or(reasons::UNSCHEDULABLE);
            let message = refusal.message.clone().unwrap_or_default() + resources::unscheduled(spec);
            set(all, POD_SCHEDULED, FALSE, reason, &message, now);
        }
        None => clear(all, POD_SCHEDULED),
    }
    let message = "a machine is not moved between nodes while it runs";
    set(
        all,
        vmi_conditions::LIVE_MIGRATABLE,
        FALSE,
        "NotSupported",
        message,
        now,
    );
    if let Some(pod) = seen.pod {
        set_emulation(all, pod, seen.emulation, now);
    }
}

/// Whether the pod's readiness is the guest's own answer, rather than the launcher's word.
fn asks_the_guest(pod: &Pod) -> bool {
    let launchers = IntOrString::Int(i32::from(paths::HEALTH_PORT));
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut probes = containers
        .filter(|container| container.name == CONTAINER)
        .filter_map(|container| container.readiness_probe.as_ref());
    probes.any(|probe| probe.http_get.as_ref().is_none_or(|get| get.port != launchers))
}

/// Ready mirrors the pod's readiness: the launcher's word that the domain runs, or the answer to the instance's probe.
fn readiness(seen: Seen<'_>, running: bool, paused: bool) -> (bool, &'static str, String) {
    let Some(pod) = seen.pod else {
        let why = seen.obstacle.map(ToString::to_string);
        return (
            false,
            reasons::POD_NOT_EXISTS,
            why.unwrap_or_else(|| "the launcher pod is being made".to_owned()),
        );
    };
    let node = node_of(pod).unwrap_or_default();
    match pod_condition(pod, "Ready") {
        _ if seen.node == NodeState::Unreachable => {
            let remedy = "bring it back, or if it is surely off taint it node.kubernetes.io/out-of-service";
            let message = format!(
                "node {node} does not answer; the machine is not started elsewhere while it may run there: {remedy}"
            );
            (false, reasons::NODE_UNREACHABLE, message)
        }
        _ if pod.metadata.deletion_timestamp.is_some() => (
            false,
            reasons::POD_TERMINATING,
            "the launcher pod is being deleted".to_owned(),
        ),
        // One sentence for all that happens until then: a word for each would be a write for each.
        _ if !running => (
            false,
            reasons::GUEST_NOT_RUNNING,
            "the guest is not running yet".to_owned(),
        ),
        // Its pod says so a moment later, and a moment longer.
        _ if paused || gate::is_shut(pod) => (false, reasons::GATES_NOT_READY, "the guest is paused".to_owned()),
        None => (
            false,
            reasons::POD_CONDITION_MISSING,
            "the launcher pod has no Ready condition".to_owned(),
        ),
        Some(ready) if ready.status == TRUE => (true, "", String::new()),
        Some(ready) if ready.reason.as_deref() == Some(reasons::GATES_NOT_READY) => (
            false,
            reasons::GATES_NOT_READY,
            ready.message.clone().unwrap_or_default(),
        ),
        Some(_) if asks_the_guest(pod) => (
            false,
            reasons::GUEST_NOT_ANSWERING,
            "the guest runs and does not answer its readiness probe".to_owned(),
        ),
        Some(ready) => {
            let message = ready.message.clone().filter(|text| !text.is_empty());
            (
                false,
                reasons::GUEST_NOT_RUNNING,
                message.unwrap_or_else(|| "the launcher pod is not ready".to_owned()),
            )
        }
    }
}

fn set_synchronized(all: &mut Vec<Condition>, seen: Seen<'_>, now: Timestamp) {
    if let Some(obstacle) = seen.obstacle {
        set(
            all,
            vmi_conditions::SYNCHRONIZED,
            FALSE,
            obstacle.reason(),
            &obstacle.to_string(),
            now,
        );
        return;
    }
    let Some(pod) = seen.pod else { return };
    let waiting = compute(pod).and_then(|container| container.state.as_ref()?.waiting.as_ref());
    let trouble = waiting.and_then(|waiting| {
        let reason = waiting.reason.as_deref()?;
        (!matches!(reason, "ContainerCreating" | "PodInitializing")).then_some((reason, waiting.message.as_deref()))
    });
    match trouble {
        Some((reason, message)) => {
            set(
                all,
                vmi_conditions::SYNCHRONIZED,
                FALSE,
                reason,
                message.unwrap_or_default(),
                now,
            );
        }
        None => set(all, vmi_conditions::SYNCHRONIZED, TRUE, "", "", now),
    }
}

fn set_emulation(all: &mut Vec<Condition>, pod: &Pod, emulation: Emulation, now: Timestamp) {
    if uses_kvm(pod) {
        let message = "the guest runs on the processor, through /dev/kvm";
        set(
            all,
            vmi_conditions::SOFTWARE_EMULATION,
            FALSE,
            reasons::KVM,
            message,
            now,
        );
    } else if emulation == Emulation::Always {
        let message = "the operator runs with --emulation=always";
        set(
            all,
            vmi_conditions::SOFTWARE_EMULATION,
            TRUE,
            reasons::EMULATION_ALWAYS,
            message,
            now,
        );
    } else {
        let message = "when the machine was started, no node that can take it offered devices.kubevirt.io/kvm: \
                       the guest's instructions are translated by qemu, which is many times slower";
        set(
            all,
            vmi_conditions::SOFTWARE_EMULATION,
            TRUE,
            reasons::NO_KVM,
            message,
            now,
        );
    }
}

/// Whether the pod asked for /dev/kvm when it was made.
fn uses_kvm(pod: &Pod) -> bool {
    let mut containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers.any(|container| {
        let limits = container
            .resources
            .as_ref()
            .and_then(|resources| resources.limits.as_ref());
        limits.is_some_and(|limits| limits.contains_key(labels::KVM_RESOURCE))
    })
}

fn active_pods(pod: Option<&Pod>) -> BTreeMap<String, String> {
    let entry = pod.and_then(|pod| Some((pod.uid()?, node_of(pod).unwrap_or_default().to_owned())));
    entry.into_iter().collect()
}

/// Whether the pod's addresses are its own: the network takes those of a pod that is over back, for the next one.
fn has_addresses(pod: &Pod) -> bool {
    !pod.status.as_ref().is_some_and(ending::is_over)
}

/// Nobody shall dial what may be another pod's by now; names and MAC addresses stay.
fn forget_addresses(interfaces: &mut [InterfaceStatus]) {
    for interface in interfaces {
        interface.ip_address = None;
        interface.ip_addresses.clear();
    }
}

/// What the guest agent told stays as kubernest-api wrote it: names, and addresses where the pod's are not the guest's.
fn with_the_agents_word(mut now: Vec<InterfaceStatus>, before: &[InterfaceStatus]) -> Vec<InterfaceStatus> {
    for interface in &mut now {
        let same = |known: &&InterfaceStatus| known.name == interface.name && known.is_told_by_agent();
        let Some(told) = before.iter().find(same) else { continue };
        interface.interface_name.clone_from(&told.interface_name);
        interface.set_told_by_agent(true);
        if interface.ip_addresses.is_empty() {
            interface.ip_address.clone_from(&told.ip_address);
            interface.ip_addresses.clone_from(&told.ip_addresses);
        }
    }
    now
}

/// Interfaces as far as they are known; `None` without a pod.
fn interfaces(instance: &VirtualMachineInstance, pod: Option<&Pod>) -> Option<Vec<InterfaceStatus>> {
    let pod = pod?;
    let attached = networks::attachments(pod.annotations().get(networks::STATUS_ANNOTATION));
    let status = pod.status.as_ref();
    let describe = |(index, nic): (usize, validate::Nic)| {
        let tap = networks::tap(index);
        let attachment = attached.iter().find(|attachment| attachment.interface == tap);
        let reported = attachment
            .map(|attachment| attachment.mac.clone())
            .filter(|mac| !mac.is_empty());
        let (addresses, mac) = match nic.binding {
            Binding::Masquerade { .. } => {
                let all = status.and_then(|status| status.pod_ips.clone()).unwrap_or_default();
                (all.into_iter().map(|address| address.ip).collect(), nic.mac)
            }
            // The plugin reports the port that the guest's own address goes through.
            Binding::Bridge(..) => (Vec::new(), reported.unwrap_or(nic.mac)),
        };
        InterfaceStatus {
            name: Some(nic.name),
            ip_address: addresses.first().cloned(),
            ip_addresses: addresses,
            mac: Some(mac),
            interface_name: None,
            info_source: Some(
                if attachment.is_some() {
                    "domain, multus-status"
                } else {
                    "domain"
                }
                .to_owned(),
            ),
        }
    };
    Some(
        validate::interfaces(instance)
            .into_iter()
            .enumerate()
            .map(describe)
            .collect(),
    )
}

/// Each volume with its device in the guest; volumes that are no disk have none.
fn volume_status(instance: &VirtualMachineInstance) -> Vec<VolumeStatus> {
    let mut used: BTreeMap<&str, u8> = BTreeMap::new();
    let disks = instance.spec.domain.devices.disks.iter().flatten();
    let targets: BTreeMap<&str, String> = disks
        .map(|disk| {
            let prefix = device_prefix(disk);
            let index = used.entry(prefix).or_insert(0);
            let letter = char::from(b'a' + (*index).min(25));
            *index += 1;
            (disk.name.as_str(), format!("{prefix}{letter}"))
        })
        .collect();
    let volumes = instance.spec.volumes.iter().flatten();
    volumes
        .map(|volume| VolumeStatus {
            name: volume.name.clone(),
            target: targets.get(volume.name.as_str()).cloned().unwrap_or_default(),
        })
        .collect()
}

fn device_prefix(disk: &Disk) -> &'static str {
    let bus = match (&disk.cdrom, &disk.disk) {
        (Some(cdrom), _) => cdrom.bus.as_deref(),
        (None, target) => target.as_ref().and_then(|target| target.bus.as_deref()),
    };
    if bus == Some("virtio") { "vd" } else { "sd" }
}

fn describe(over: &Ending) -> String {
    match over.serial.last().filter(|line| !line.trim().is_empty()) {
        Some(line) => format!("{}; the guest said last: {}", over.message, line.trim()),
        None => over.message.clone(),
    }
}

/// The guest's last lines, which outlive its pod.
fn last_words(over: &Ending, previous: Option<&ConsoleTail>) -> Option<ConsoleTail> {
    let lines = bounded(over.serial.iter().map(String::as_str));
    let request = previous.map(|tail| tail.request.clone()).unwrap_or_default();
    (!lines.is_empty()).then_some(ConsoleTail { request, lines })
}

/// The last [`TAIL_LINES`] lines, printable, each of at most [`TAIL_LINE_BYTES`] bytes.
pub fn bounded<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<String> {
    let clean = |line: &str| {
        let mut text: String = line.chars().filter(|c| !c.is_control() || *c == '\t').collect();
        text.truncate(text.floor_char_boundary(TAIL_LINE_BYTES));
        text.trim_end().to_owned()
    };
    let mut lines: Vec<String> = lines.map(clean).filter(|line| !line.is_empty()).collect();
    lines.drain(..lines.len().saturating_sub(TAIL_LINES));
    lines
}

/// The pod's condition `type_`.
pub fn pod_condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|condition| condition.type_ == type_)
}

/// The state of the launcher's container.
pub fn compute(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status
        .as_ref()?
        .container_statuses
        .as_ref()?
        .iter()
        .find(|container| container.name == CONTAINER)
}

fn is_running(container: &ContainerStatus) -> bool {
    container.state.as_ref().is_some_and(|state| state.running.is_some())
}
