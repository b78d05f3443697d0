//! What a launcher pod asks of its node: memory with the overhead of the processes around the guest, CPU, devices; and
//! whether it asks for KVM.
//!
//! Pure. The overhead is a formula over measured constants (proportional set sizes, with nobody on the node to share a file
//! with, rounded up by a quarter to a half): `tests/bench` measures them anew (`vm_overhead_mib`), and end-to-end stories
//! fail when a pod uses more than it requested.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use kubernest_crds::kubevirt::v1::{VirtualMachineInstance, VirtualMachineInstanceSpec};
use kubernest_crds::labels;
use kubernest_domain::{Accelerator, emulation};

use super::validate::Machine;
use crate::Emulation;

const MIB: u64 = 1 << 20;
/// libvirtd: 15 to 16 MiB.
const LIBVIRTD: u64 = 20 * MIB;
/// qemu beyond the guest's memory: 33 MiB with KVM, 24 of them its program and libraries, and the copy of a kernel that it
/// boots itself (14 MiB of Debian's), which it keeps as long as it runs.
const QEMU: u64 = 60 * MIB;
/// The launcher itself: 12 to 14 MiB; the pod's pause and init, 1 MiB.
const LAUNCHER: u64 = 20 * MIB;
/// virtiofsd, for each shared file system: 5 MiB.
const VIRTIOFSD: u64 = 8 * MIB;
/// Page tables take 8 bytes for each 4 KiB page of guest memory.
const PAGE_TABLE_SHARE: u64 = 512;
/// More for pods whose memory is limited: what the kernel counts as theirs and gives back late, or not at all, would have them
/// killed (KubeVirt's number).
const LIMITED: u64 = 100 * MIB;
/// CPU requested for a virtual CPU: a tenth, KubeVirt's default `cpuAllocationRatio`.
const MILLI_CPU_PER_VCPU: u64 = 1000 / 10;

/// Memory in bytes that a launcher pod needs beyond its guest's, rounded up to a MiB:
/// `libvirtd + qemu + launcher + virtiofsd × shares + guest / 512`; what [emulation] costs on top.
pub fn overhead_bytes(guest_bytes: u64, shares: u64, accelerator: Accelerator) -> u64 {
    let processes = LIBVIRTD + QEMU + LAUNCHER + VIRTIOFSD * shares + guest_bytes / PAGE_TABLE_SHARE;
    let bytes = match accelerator {
        Accelerator::Kvm => processes,
        Accelerator::Tcg => processes + emulation::overhead_bytes(guest_bytes),
    };
    bytes.next_multiple_of(MIB)
}

/// How many of a node's processors nobody else is to use, if any.
pub fn dedicated(spec: &VirtualMachineInstanceSpec) -> Option<u32> {
    spec.domain.cpu.as_ref()?.dedicated()
}

/// Whether the instance is to have processors of its own and no kubelet would give this pod any: some admission changed
/// its requests, or gave it another container.
pub fn shares_processors(spec: &VirtualMachineInstanceSpec, pod: &Pod) -> bool {
    let class = pod.status.as_ref().and_then(|status| status.qos_class.as_deref());
    dedicated(spec).is_some() && class.is_some_and(|class| class != "Guaranteed")
}

/// What the scheduler's words don't say of a pod that no node takes.
pub fn unscheduled(spec: &VirtualMachineInstanceSpec) -> &'static str {
    if dedicated(spec).is_some() {
        "; dedicated processors need a node with the label kubevirt.io/cpumanager=true, whose kubelet has the CPU manager \
         policy static, and as many whole processors free there"
    } else {
        ""
    }
}

/// Labels of the nodes that may take the instance.
pub fn node_selector(spec: &VirtualMachineInstanceSpec) -> BTreeMap<String, String> {
    let mut selector = spec.node_selector.clone().unwrap_or_default();
    selector.insert(labels::SCHEDULABLE.to_owned(), "true".to_owned());
    if dedicated(spec).is_some() {
        selector.insert(labels::CPU_MANAGER.to_owned(), "true".to_owned());
    }
    selector
}

/// KVM where a node that may take the instance offers it, unless the operator's flag decides otherwise.
pub fn accelerator(emulation: Emulation, instance: &VirtualMachineInstance, nodes: &[Arc<Node>]) -> Accelerator {
    let offers_kvm = |node: &Arc<Node>| {
        let wanted = node_selector(&instance.spec);
        let cordoned = node
            .spec
            .as_ref()
            .and_then(|spec| spec.unschedulable)
            .unwrap_or_default();
        let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        let devices = allocatable
            .and_then(|list| list.get(labels::KVM_RESOURCE))
            .map_or("0", |quantity| &quantity.0);
        !cordoned && devices != "0" && wanted.iter().all(|(key, value)| node.labels().get(key) == Some(value))
    };
    match emulation {
        Emulation::Never => Accelerator::Kvm,
        Emulation::Always => Accelerator::Tcg,
        Emulation::Auto if nodes.iter().any(offers_kvm) => Accelerator::Kvm,
        Emulation::Auto => Accelerator::Tcg,
    }
}

/// Requests and limits of the container `compute`.
///
/// Memory: what the instance requests (by default the guest's memory) and the overhead; a limit only where the instance
/// has one, since a machine killed for a few MiB too many is worse than a node that shares; or where it has processors of
/// its own, which kubelets give only to pods of class Guaranteed, whose limits are their requests.
pub fn requirements(machine: &Machine, overhead: u64, accelerator: Accelerator) -> ResourceRequirements {
    let asked = &machine.instance.spec.domain.resources;
    let with_overhead = |quantity: Option<u64>| quantity.map(|bytes| Quantity((bytes + overhead).to_string()));
    let bytes = |list: &BTreeMap<String, kubernest_crds::quantity::Quantity>| {
        u64::try_from(list.get("memory")?.value().ok()?)
            .ok()
            .filter(|bytes| *bytes > 0)
    };
    let pass = |list: &BTreeMap<String, kubernest_crds::quantity::Quantity>| -> BTreeMap<String, Quantity> {
        list.iter()
            .map(|(name, quantity)| (name.clone(), Quantity(quantity.0.clone())))
            .collect()
    };
    let (mut requests, mut limits) = (pass(&asked.requests), pass(&asked.limits));
    let memory = bytes(&asked.requests).unwrap_or(machine.guest_bytes);
    requests.extend(with_overhead(Some(memory)).map(|quantity| ("memory".to_owned(), quantity)));
    limits.extend(with_overhead(bytes(&asked.limits)).map(|quantity| ("memory".to_owned(), quantity)));
    if let Some(processors) = dedicated(&machine.instance.spec) {
        // The guest must fit, whatever less was requested: it would be killed otherwise, not swapped.
        let memory = bytes(&asked.limits).map_or(memory, |limit| limit.max(memory));
        let memory = memory.max(machine.guest_bytes) + LIMITED;
        for list in [&mut requests, &mut limits] {
            list.extend(with_overhead(Some(memory)).map(|quantity| ("memory".to_owned(), quantity)));
            list.insert("cpu".to_owned(), Quantity(processors.to_string()));
        }
    }
    if !requests.contains_key("cpu") && !limits.contains_key("cpu") {
        let milli = u64::from(machine.cpus) * MILLI_CPU_PER_VCPU;
        requests.insert("cpu".to_owned(), Quantity(format!("{milli}m")));
    }
    let mut device = |name: &str| {
        // Extended resources are never shared out beyond what is asked: request and limit are equal.
        requests.insert(name.to_owned(), Quantity("1".to_owned()));
        limits.insert(name.to_owned(), Quantity("1".to_owned()));
    };
    if !machine.nics.is_empty() {
        device(labels::TUN_RESOURCE);
    }
    if accelerator == Accelerator::Kvm {
        device(labels::KVM_RESOURCE);
    }
    ResourceRequirements {
        requests: Some(requests),
        limits: Some(limits),
        claims: None,
    }
}
