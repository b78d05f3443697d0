//! What of a TenantCluster may not change, now or ever.

use kubernest_crds::{Storage, TenantClusterSpec};

use crate::decision::{Report, reasons};

const IMMUTABLE: &str = "is immutable: make a new TenantCluster to change it";

/// Compares the spec with the one before.
pub fn check(report: &mut Report, new: &TenantClusterSpec, old: &TenantClusterSpec) {
    let mut immutable = |field: &str, changed: bool| {
        if changed {
            report.add(reasons::FORBIDDEN, field, IMMUTABLE);
        }
    };
    immutable("spec.network.cni", new.network.cni != old.network.cni);
    immutable("spec.network.podCIDR", new.network.pod_cidr != old.network.pod_cidr);
    immutable(
        "spec.network.serviceCIDR",
        new.network.service_cidr != old.network.service_cidr,
    );
    // Certificates and kubeconfigs that users hold name it, and whoever could take a name later could take over another's.
    immutable("spec.access.hostname", new.access.hostname != old.access.hostname);
    immutable("spec.pki.issuer", new.pki.issuer != old.pki.issuer);
    if new.version != old.version {
        report.add(
            reasons::FORBIDDEN,
            "spec.version",
            format!(
                "cannot change from {} to {}: upgrades are not supported yet",
                old.version, new.version
            ),
        );
    }
    storage(
        report,
        "spec.controlPlane.storage",
        &new.control_plane.storage,
        &old.control_plane.storage,
    );
    for (index, pool) in new.node_pools.iter().enumerate() {
        if let Some(before) = old.node_pools.iter().find(|before| before.name == pool.name) {
            storage(
                report,
                &format!("spec.nodePools[{index}].storage"),
                &pool.storage,
                &before.storage,
            );
        }
    }
}

fn storage(report: &mut Report, field: &str, new: &Storage, old: &Storage) {
    if new.storage_class_name != old.storage_class_name {
        report.add(reasons::FORBIDDEN, format!("{field}.storageClassName"), IMMUTABLE);
    }
    let (Ok(bytes), Ok(before)) = (new.size.value(), old.size.value()) else {
        return;
    };
    let at = format!("{field}.size");
    if bytes < before {
        report.add(
            reasons::FORBIDDEN,
            at,
            format!("cannot shrink from {} to {}", old.size, new.size),
        );
    } else if bytes > before {
        report.add(
            reasons::FORBIDDEN,
            at,
            format!(
                "cannot grow from {} to {}: this is not supported yet",
                old.size, new.size
            ),
        );
    }
}
