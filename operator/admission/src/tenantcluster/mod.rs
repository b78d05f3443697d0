//! Rules of a TenantCluster: one file a concern; this one puts them together.

mod machines;
mod naming;
mod network;
mod update;

use kubernest_crds::{Issuer, TenantClusterSpec};

use crate::{
    Decision, Installation, Review,
    decision::{Report, reasons, with_fields},
    parse::parse,
};

/// Decides upon a TenantCluster.
pub fn decide(installation: &Installation, review: Review<'_>) -> Decision {
    let mut report = Report::default();
    let parsed = parse::<TenantClusterSpec>(review.object, "spec");
    for path in parsed.unknown {
        report.add(
            reasons::NOT_SUPPORTED,
            path,
            "unknown field: a TenantCluster has no field of this name",
        );
    }
    let spec = match parsed.value {
        Ok(spec) => spec,
        Err((path, message)) => {
            report.invalid(path, message);
            return report.decide(with_fields);
        }
    };
    let old = review
        .old
        .and_then(|old| parse::<TenantClusterSpec>(old, "spec").value.ok());

    match &old {
        Some(old) => update::check(&mut report, &spec, old),
        None => naming::check_cluster(&mut report, installation, review.object, &spec),
    }
    version(&mut report, installation, &spec, old.as_ref());
    naming::check_slots(&mut report, review.object, &spec);
    machines::check(&mut report, &spec);
    network::check(&mut report, installation, &spec);
    if spec.pki.issuer == Issuer::Vault {
        report.not_supported("spec.pki.issuer", "Vault is not supported yet, use Embedded");
    }
    naming::check_hostname(&mut report, installation, review.object, &spec.access.hostname);
    report.decide(with_fields)
}

/// The version must have a node image; an object keeps the version it has even when its image is gone since.
fn version(
    report: &mut Report,
    installation: &Installation,
    spec: &TenantClusterSpec,
    old: Option<&TenantClusterSpec>,
) {
    let kept = old.is_some_and(|old| old.version == spec.version);
    if kept || installation.versions.contains(&spec.version) {
        return;
    }
    let known = match installation.versions.as_slice() {
        [] => "this installation has no node images; set them at the operator".to_owned(),
        known => format!("known versions are {}", known.join(", ")),
    };
    report.not_supported("spec.version", format!("unknown version {:?}: {known}", spec.version));
}
