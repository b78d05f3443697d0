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
    if let Some(asked) = asked {
        match asked.value() {
            Err(error) => report.invalid(&guest, format!("{guest} '{asked}': {error}")),
            Ok(bytes) if bytes < MEGABYTE => {
                report.invalid(
                    &guest,
                    format!("{guest} '{asked}': must be greater than or equal to 1M."),
                );
            }
            Ok(_) => {}
        }
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
