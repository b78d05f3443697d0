//! Numbers and sizes of machines, labels and taints of pools.

use std::collections::BTreeSet;

use kubernest_crds::{NodePool, Storage, TenantClusterSpec, quantity::Quantity};

use crate::{
    decision::{Report, reasons},
    names,
};

const MIB: i128 = 1 << 20;
/// Least memory of a control-plane machine: its working set is 476 MiB at rest, and must grow with its objects.
const CONTROL_PLANE_MEMORY: (i128, &str) = (1024 * MIB, "1Gi");
/// Least memory of a worker: its working set is 240 MiB at rest.
const WORKER_MEMORY: (i128, &str) = (512 * MIB, "512Mi");
/// Least data disk: the preloaded images alone take some hundred MiB.
const DISK: (i128, &str) = (1024 * MIB, "1Gi");
/// Most virtual CPUs that q35 machines take without more settings.
const MOST_CPUS: i32 = 255;
/// Workers that fit a tenant's node range: a /24 whose first 20 addresses are kept for the control plane.
const MOST_WORKERS: i64 = 235;

/// Checks the control plane and all pools.
pub fn check(report: &mut Report, spec: &TenantClusterSpec) {
    let plane = &spec.control_plane;
    match plane.replicas {
        1 => {}
        replicas if replicas < 1 => {
            report.invalid("spec.controlPlane.replicas", format!("{replicas} must be at least 1"));
        }
        replicas if replicas % 2 == 0 => report.invalid(
            "spec.controlPlane.replicas",
            format!("{replicas} is even: etcd needs a majority, so the number must be odd"),
        ),
        replicas => report.not_supported(
            "spec.controlPlane.replicas",
            format!("{replicas}: more than 1 is not supported yet"),
        ),
    }
    cpus(report, "spec.controlPlane.cpu", plane.cpu);
    size(report, "spec.controlPlane.memory", &plane.memory, CONTROL_PLANE_MEMORY);
    storage(report, "spec.controlPlane.storage", &plane.storage);
    for (index, pool) in spec.node_pools.iter().enumerate() {
        check_pool(report, &format!("spec.nodePools[{index}]"), pool);
    }
    let workers: i64 = spec.node_pools.iter().map(|pool| i64::from(pool.replicas.max(0))).sum();
    if workers > MOST_WORKERS {
        report.invalid(
            "spec.nodePools",
            format!("{workers} workers are asked for; a tenant has at most {MOST_WORKERS}"),
        );
    }
}

fn check_pool(report: &mut Report, field: &str, pool: &NodePool) {
    if pool.replicas < 0 {
        report.invalid(
            format!("{field}.replicas"),
            format!("{} must be 0 or more", pool.replicas),
        );
    }
    cpus(report, &format!("{field}.cpu"), pool.cpu);
    size(report, &format!("{field}.memory"), &pool.memory, WORKER_MEMORY);
    storage(report, &format!("{field}.storage"), &pool.storage);
    for (key, value) in &pool.labels {
        let at = format!("{field}.labels[{key}]");
        if let Some(why) = names::label_key(key) {
            report.invalid(&at, format!("{key:?} is not a label key: {why}"));
        } else if !names::kubelet_may_set(key) {
            report.add(
                reasons::FORBIDDEN,
                &at,
                "is reserved for Kubernetes: use a prefix of your own or node.kubernetes.io",
            );
        }
        if let Some(why) = names::label_value(value) {
            report.invalid(&at, format!("{value:?} is not a label value: {why}"));
        }
    }
    let mut seen = BTreeSet::new();
    for (index, taint) in pool.taints.iter().enumerate() {
        let at = format!("{field}.taints[{index}]");
        if let Some(why) = names::label_key(&taint.key) {
            report.invalid(
                format!("{at}.key"),
                format!("{:?} is not a taint key: {why}", taint.key),
            );
        }
        if let Some(why) = names::label_value(&taint.value) {
            report.invalid(
                format!("{at}.value"),
                format!("{:?} is not a taint value: {why}", taint.value),
            );
        }
        let effect = format!("{:?}", taint.effect);
        if !seen.insert((taint.key.as_str(), effect.clone())) {
            report.add(
                reasons::DUPLICATE,
                at,
                format!("taint {}:{effect} stands there twice", taint.key),
            );
        }
    }
}

fn storage(report: &mut Report, field: &str, storage: &Storage) {
    size(report, &format!("{field}.size"), &storage.size, DISK);
    if let Some(class) = &storage.storage_class_name
        && let Some(why) = names::dns_name(class)
    {
        report.invalid(
            format!("{field}.storageClassName"),
            format!("{class:?} is not a StorageClass name: {why}"),
        );
    }
}

fn cpus(report: &mut Report, field: &str, cpus: i32) {
    if cpus < 1 {
        report.invalid(field, format!("{cpus} must be at least 1"));
    } else if cpus > MOST_CPUS {
        report.invalid(field, format!("{cpus} must be at most {MOST_CPUS}"));
    }
}

fn size(report: &mut Report, field: &str, size: &Quantity, (least, least_text): (i128, &str)) {
    match size.value() {
        Err(error) => report.invalid(field, format!("\"{size}\" is not a quantity: {error}")),
        Ok(bytes) if bytes <= 0 => report.invalid(field, format!("\"{size}\" must be greater than zero")),
        Ok(bytes) if bytes < least => {
            report.invalid(
                field,
                format!("\"{size}\" is {bytes} bytes; at least {least_text} is needed"),
            );
        }
        Ok(_) => {}
    }
}
