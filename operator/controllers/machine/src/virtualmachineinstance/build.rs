//! The launcher pod of a [`Machine`]: one container under Pod Security `restricted`, told everything in one variable.
//!
//! Pure: the same machine, accelerator and name of a key pair give the same pod. Paths, ports and names are the contract with
//! `kubernest-domain` and the CNI plugin. No host path, no host namespace, and a token
//! only where the guest is to have it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, Container, EnvVar, ExecAction, HTTPGetAction, LocalObjectReference, Pod, PodSecurityContext, PodSpec,
    Probe, SeccompProfile, SecurityContext, TCPSocketAction,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};
use kubernest_crds::kubevirt::v1::{self as kubevirt, VirtualMachineInstance, VirtualMachineInstanceSpec};
use kubernest_crds::labels;
use kubernest_domain::{Accelerator, LAUNCH_ENV, Launch, paths, probe as asked};

use super::validate::Machine;
use super::{gate, networks, resources, validate, volumes};
use crate::names;

/// Name of the only container (KubeVirt's name).
pub const CONTAINER: &str = "compute";
/// Grace period of an instance that names none, in seconds (KubeVirt's default).
const DEFAULT_GRACE_SECONDS: i64 = 30;
/// What the launcher has beyond the guest's grace period to take the domain down, in seconds.
const LAUNCHER_GRACE_SECONDS: i64 = 15;
/// Seconds between two looks at the launcher's readiness.
const PROBE_PERIOD_SECONDS: i32 = 2;
/// Seconds that an answer may take on a busy node.
const PROBE_TIMEOUT_SECONDS: i32 = 5;

/// Seconds that the guest of this instance is given to shut down.
pub fn guest_grace_seconds(spec: &VirtualMachineInstanceSpec) -> i64 {
    spec.termination_grace_period_seconds
        .unwrap_or(DEFAULT_GRACE_SECONDS)
        .max(0)
}

/// Seconds that the pod of this instance is given to end.
pub fn pod_grace_seconds(spec: &VirtualMachineInstanceSpec) -> i64 {
    guest_grace_seconds(spec).saturating_add(LAUNCHER_GRACE_SECONDS)
}

/// Builds the pod; `pair` is the Secret of its control port.
///
/// # Errors
/// When the launch document cannot be written as JSON.
pub fn launcher_pod(
    machine: &Machine,
    accelerator: Accelerator,
    image: &str,
    pair: &str,
) -> Result<Pod, serde_json::Error> {
    let instance = &machine.instance;
    let spec = &instance.spec;
    let shares = spec.domain.devices.filesystems.as_ref().map_or(0, Vec::len) as u64;
    let overhead = resources::overhead_bytes(machine.guest_bytes, shares, accelerator);
    let launch = Launch {
        vmi: identity(instance),
        accelerator,
        volumes: machine.claims.clone(),
        interfaces: networks::taps(&machine.nics),
    };
    let mounted = volumes::mounted(machine, pair);
    let probed = spec.readiness_probe.is_some() || spec.liveness_probe.is_some();
    let container = Container {
        name: CONTAINER.to_owned(),
        image: Some(image.to_owned()),
        env: Some(vec![EnvVar {
            name: LAUNCH_ENV.to_owned(),
            value: Some(serde_json::to_string(&launch)?),
            ..EnvVar::default()
        }]),
        resources: Some(resources::requirements(machine, overhead, accelerator)),
        startup_probe: probed.then(startup),
        readiness_probe: Some(spec.readiness_probe.as_deref().map_or_else(readiness, probe)),
        liveness_probe: spec.liveness_probe.as_deref().map(probe),
        security_context: Some(container_security()),
        volume_mounts: Some(mounted.mounts),
        volume_devices: (!mounted.devices.is_empty()).then_some(mounted.devices),
        ..Container::default()
    };
    let id = i64::from(paths::LAUNCHER_ID);
    Ok(Pod {
        metadata: metadata(machine),
        spec: Some(PodSpec {
            containers: vec![container],
            readiness_gates: Some(gate::gates()),
            volumes: Some(mounted.volumes),
            image_pull_secrets: pull_secrets(spec),
            restart_policy: Some("Never".to_owned()),
            termination_grace_period_seconds: Some(pod_grace_seconds(spec)),
            // Only a pod of that account is given its token, and only where a volume asks for it.
            service_account_name: validate::service_accounts(spec).next().map(str::to_owned),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            security_context: Some(PodSecurityContext {
                run_as_user: Some(id),
                run_as_group: Some(id),
                fs_group: Some(id),
                // A claim of many files is not walked again at each start.
                fs_group_change_policy: Some("OnRootMismatch".to_owned()),
                run_as_non_root: Some(true),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".to_owned(),
                    localhost_profile: None,
                }),
                ..PodSecurityContext::default()
            }),
            hostname: host_name(instance),
            subdomain: spec.subdomain.clone(),
            dns_policy: spec.dns_policy.clone(),
            dns_config: spec.dns_config.clone(),
            node_selector: Some(resources::node_selector(spec)),
            affinity: spec.affinity.clone(),
            tolerations: spec.tolerations.clone(),
            topology_spread_constraints: spec.topology_spread_constraints.clone(),
            priority_class_name: spec.priority_class_name.clone(),
            scheduler_name: spec.scheduler_name.clone(),
            ..PodSpec::default()
        }),
        status: None,
    })
}

fn metadata(machine: &Machine) -> ObjectMeta {
    let instance = &machine.instance;
    let (name, uid) = (instance.name_any(), instance.uid().unwrap_or_default());
    let mut pod_labels = instance.labels().clone();
    pod_labels.extend(
        [
            (labels::MANAGED_BY, labels::MANAGED_BY_VALUE),
            (labels::LAUNCHER_APP, labels::LAUNCHER_APP_VALUE),
            (labels::CREATED_BY, &uid),
            (labels::VM_NAME, &label_value(&name)),
            (labels::VMI_ID, &names::instance_id(&name)),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned())),
    );
    // The launcher tells Prometheus what the machine uses; where it is scraped by annotations, as here.
    let mut annotations = BTreeMap::from([
        (labels::DOMAIN.to_owned(), name.clone()),
        ("prometheus.io/scrape".to_owned(), "true".to_owned()),
        ("prometheus.io/port".to_owned(), paths::HEALTH_PORT.to_string()),
    ]);
    annotations.extend(networks::annotation(&machine.nics).map(|value| (networks::ANNOTATION.to_owned(), value)));
    ObjectMeta {
        name: Some(names::launcher_pod(&name, &uid)),
        namespace: instance.namespace(),
        labels: Some(pod_labels),
        annotations: Some(annotations),
        owner_references: instance.controller_owner_ref(&()).map(|mut owner| {
            owner.block_owner_deletion = Some(true);
            vec![owner]
        }),
        ..ObjectMeta::default()
    }
}

/// What the launcher may know of the instance: who it is, and its spec.
fn identity(instance: &VirtualMachineInstance) -> VirtualMachineInstance {
    let metadata = ObjectMeta {
        name: instance.metadata.name.clone(),
        namespace: instance.metadata.namespace.clone(),
        uid: instance.metadata.uid.clone(),
        labels: instance.metadata.labels.clone(),
        annotations: instance.metadata.annotations.clone(),
        ..ObjectMeta::default()
    };
    VirtualMachineInstance {
        metadata,
        spec: instance.spec.clone(),
        status: None,
    }
}

/// The guest's host name, if it can be a pod's as well (a DNS label, RFC 1123).
fn host_name(instance: &VirtualMachineInstance) -> Option<String> {
    let name = instance.spec.hostname.clone().unwrap_or_else(|| instance.name_any());
    let is_label = name.len() <= 63
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    is_label.then_some(name)
}

/// A label's value has at most 63 characters; names of objects may have 253.
fn label_value(name: &str) -> String {
    name.chars()
        .take(63)
        .collect::<String>()
        .trim_end_matches(['-', '.'])
        .to_owned()
}

fn pull_secrets(spec: &VirtualMachineInstanceSpec) -> Option<Vec<LocalObjectReference>> {
    let disks = spec
        .volumes
        .iter()
        .flatten()
        .filter_map(|volume| volume.container_disk.as_ref()?.image_pull_secret.as_ref());
    let kernel = spec
        .domain
        .firmware
        .as_ref()
        .and_then(|firmware| firmware.kernel_boot.as_ref());
    let kernel = kernel.and_then(|boot| boot.container.as_ref()?.image_pull_secret.as_ref());
    let mut secrets: Vec<&String> = disks.chain(kernel).collect();
    secrets.sort_unstable();
    secrets.dedup();
    let references = secrets
        .into_iter()
        .map(|name| LocalObjectReference { name: name.clone() });
    Some(references.collect::<Vec<_>>()).filter(|list| !list.is_empty())
}

fn readiness() -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some("/readyz".to_owned()),
            port: IntOrString::Int(i32::from(paths::HEALTH_PORT)),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(PROBE_PERIOD_SECONDS),
        timeout_seconds: Some(PROBE_TIMEOUT_SECONDS),
        ..Probe::default()
    }
}

/// The launcher's readiness again, before anything is asked of the guest; it takes as long as it takes.
fn startup() -> Probe {
    Probe {
        failure_threshold: Some(i32::MAX),
        ..readiness()
    }
}

/// Through the agent asks the launcher, by another process of its own; the others ask the guest at the pod's address.
fn probe(probe: &kubevirt::Probe) -> Probe {
    let asked = asked::command(probe);
    // What it takes to start that process is not the guest's time (KubeVirt's second).
    let timeout_seconds = match asked {
        Some(_) => i32::try_from(asked::seconds(probe))
            .ok()
            .map(|seconds| seconds.saturating_add(1)),
        None => probe.timeout_seconds,
    };
    Probe {
        exec: asked.map(|command| ExecAction { command: Some(command) }),
        // Never of another host: the kubelet asks from the node's own network.
        http_get: probe.http_get.clone().map(|get| HTTPGetAction { host: None, ..get }),
        tcp_socket: probe
            .tcp_socket
            .clone()
            .map(|socket| TCPSocketAction { host: None, ..socket }),
        initial_delay_seconds: probe.initial_delay_seconds,
        timeout_seconds,
        period_seconds: probe.period_seconds,
        success_threshold: probe.success_threshold,
        failure_threshold: probe.failure_threshold,
        ..Probe::default()
    }
}

fn container_security() -> SecurityContext {
    let id = i64::from(paths::LAUNCHER_ID);
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities {
            add: None,
            drop: Some(vec!["ALL".to_owned()]),
        }),
        privileged: Some(false),
        read_only_root_filesystem: Some(true),
        run_as_non_root: Some(true),
        run_as_user: Some(id),
        run_as_group: Some(id),
        ..SecurityContext::default()
    }
}
