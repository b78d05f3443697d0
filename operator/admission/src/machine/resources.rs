//! Memory and CPU: quantities, limits, topology.

use kubernest_crds::{kubevirt::v1::VirtualMachineInstanceSpec, quantity::Quantity};

use super::unsupported;
use crate::decision::{Report, reasons};

const MEGABYTE: i128 = 1_000_000;

/// Checks `domain.resources`, `domain.memory` and `domain.cpu`.
pub fn check(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let domain = &spec.domain;
    let base = format!("{f}.domain.resources");
    let (requests, limits) = (&domain.resources.requests, &domain.resources.limits);
    for (part, quantities) in [("requests", requests), ("limits", limits)] {
        for resource in quantities
            .keys()
            .filter(|resource| !matches!(resource.as_str(), "cpu" | "memory"))
        {
            unsupported(report, format!("{base}.{part}.{resource}"));
        }
    }
    for resource in ["memory", "cpu"] {
        let (request, limit) = (requests.get(resource), limits.get(resource));
        let names = (
            format!("{base}.requests.{resource}"),
            format!("{base}.limits.{resource}"),
        );
        let request_ok = quantity(report, &names.0, request);
        let limit_ok = quantity(report, &names.1, limit);
        if let (Some(request), Some(limit)) = (request_ok, limit_ok)
            && limit > 0
            && request > limit
            && let (Some(request), Some(limit)) = (requests.get(resource), limits.get(resource))
        {
            let message = format!("{} '{request}' is greater than {} '{limit}'", names.0, names.1);
            report.invalid(names.0, message);
        }
    }
    memory(report, f, spec);
    sockets(report, f, spec);
    dedicated(report, f, spec);
}

/// KubeVirt's rules of dedicated processors: whole ones, as many as the guest has, and memory that is limited to what is
/// requested, as the kubelet gives processors away to such pods only.
fn dedicated(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let Some(cpu) = &spec.domain.cpu else { return };
    let dedicated = cpu.dedicated_cpu_placement == Some(true);
    let at = format!("{f}.domain.cpu.dedicatedCpuPlacement");
    if cpu.isolate_emulator_thread == Some(true) && !dedicated {
        report.invalid(
            format!("{f}.domain.cpu.isolateEmulatorThread"),
            "IsolateEmulatorThread should be only set in combination with DedicatedCPUPlacement",
        );
    }
    if !dedicated {
        return;
    }
    let resources = &spec.domain.resources;
    let milli = |list: &std::collections::BTreeMap<String, Quantity>, name: &str| {
        list.get(name).and_then(|quantity| quantity.milli().ok()).unwrap_or(0)
    };
    let base = format!("{f}.domain.resources");
    let (least, most) = (milli(&resources.requests, "memory"), milli(&resources.limits, "memory"));
    let guest = spec.domain.memory.as_ref().and_then(|memory| memory.guest.as_ref());
    if least == 0 && most == 0 && guest.is_none() {
        let field = format!("{base}.limits.memory");
        let message = format!(
            "{base}.requests.memory, {field}, {f}.domain.memory.hugepages or {f}.domain.memory.guest should be provided"
        );
        report.invalid(field, message);
    }
    // Requests default to limits before KubeVirt looks.
    let limit = milli(&resources.limits, "cpu");
    let request = match milli(&resources.requests, "cpu") {
        0 => limit,
        request => request,
    };
    for (part, value) in [("requests", request), ("limits", limit)] {
        if value % 1000 != 0 {
            let message = format!("provided resources CPU {part} must be an interger");
            report.invalid(format!("{base}.{part}.cpu"), message);
        }
    }
    if least > 0 && most > 0 && least != most {
        let field = format!("{base}.requests.memory");
        let message = format!("{field} must be equal to {base}.limits.memory");
        report.invalid(field, message);
    }
    let whole = |value: i128| (value + 999) / 1000;
    if request > 0 && limit > 0 && whole(request) != whole(limit) {
        let message =
            format!("{base}.requests.cpu or {base}.limits.cpu must be equal when DedicatedCPUPlacement is true ");
        report.invalid(&at, message);
    }
    let vcpus = i128::from(cpu.count());
    if (request > 0 || limit > 0) && whole(request) != vcpus && whole(limit) != vcpus {
        let message = format!(
            "{base}.requests.cpu or {base}.limits.cpu must not be provided at the same time with {f}.domain.cpu.cores when \
             DedicatedCPUPlacement is true "
        );
        report.invalid(&at, message);
    }
    if cpu.threads.unwrap_or(1) > 2 {
        let message = format!(
            "Not more than two threads must be provided at {f}.domain.cpu.threads (got {}) when DedicatedCPUPlacement is true",
            cpu.threads.unwrap_or(1)
        );
        report.invalid(at, message);
    }
}

/// The value in thousandths, when there is one and it is sound; else reported.
fn quantity(report: &mut Report, field: &str, quantity: Option<&Quantity>) -> Option<i128> {
    let quantity = quantity?;
    match quantity.milli() {
        Err(error) => report.invalid(field, format!("{field} '{quantity}': {error}")),
        Ok(value) if value < 0 => {
            report.invalid(
                field,
                format!("{field} '{quantity}': must be greater than or equal to 0."),
            );
        }
        Ok(value) => return Some(value),
    }
    None
}

fn sockets(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let Some(cpu) = &spec.domain.cpu else { return };
    if cpu
        .max_sockets
        .is_some_and(|max| max != 0 && cpu.sockets.unwrap_or_default() > max)
    {
        let message = "Number of sockets in CPU topology is greater than the maximum sockets allowed";
        report.invalid(format!("{f}.domain.cpu.sockets"), message);
    }
}

fn memory(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let request = format!("{f}.domain.resources.requests.memory");
    let guest = format!("{f}.domain.memory.guest");
    let requested = spec.domain.resources.requests.get("memory");
    let limited = spec.domain.resources.limits.get("memory");
    let asked = spec.domain.memory.as_ref().and_then(|memory| memory.guest.as_ref());
    let some = |quantity: Option<&Quantity>| quantity.is_some_and(|quantity| quantity.value() != Ok(0));
    if !some(requested) && !some(asked) && !some(limited) {
        report.add(
            reasons::REQUIRED,
            "",
            format!(
                "no memory requested, at least one of '{guest}', '{f}.domain.memory.hugepages.pageSize' or '{request}' \
                 must be set"
            ),
        );
    }
    if let Some(Err(error)) = asked.map(Quantity::value)
        && let Some(asked) = asked
    {
        report.invalid(&guest, format!("{guest} '{asked}': {error}"));
    }
    if let Some(requested) = requested
        && requested.value().is_ok_and(|bytes| bytes > 0 && bytes < MEGABYTE)
    {
        report.invalid(
            &request,
            format!("{request} '{requested}': must be greater than or equal to 1M."),
        );
    }
}
