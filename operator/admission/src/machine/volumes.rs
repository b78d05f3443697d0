//! Volumes: exactly one source each, unique names, and what each source needs.

use kubernest_crds::kubevirt::v1::{VirtualMachineInstanceSpec, Volume};

use super::cloudinit;
use crate::decision::Report;

const PULL_POLICIES: [&str; 3] = ["Always", "IfNotPresent", "Never"];
/// Most characters of a FAT volume's label, which these disks are; KubeVirt's are ISO images.
const LABEL_CHARACTERS: usize = 11;

/// Checks `volumes`.
pub fn check(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let volumes = spec.volumes.as_deref().unwrap_or_default();
    for (index, volume) in volumes.iter().enumerate() {
        let at = format!("{f}.volumes[{index}]");
        if let Some(first) = volumes[..index].iter().position(|other| other.name == volume.name) {
            report.invalid(
                format!("{at}.name"),
                format!("{at} and {f}.volumes[{first}] must not have the same Name."),
            );
        }
        check_source(report, &at, volume);
        let mut shared = spec.domain.devices.filesystems.iter().flatten();
        if !shared.any(|filesystem| filesystem.name == volume.name) {
            check_label(report, &at, volume);
        }
    }
    // A pod has one account, and the kubelet gives it no other's token.
    if volumes.iter().filter(|volume| volume.service_account.is_some()).count() > 1 {
        let field = format!("{f}.volumes");
        let message = format!("{field} must have max one serviceAccount volume set");
        report.invalid(field, message);
    }
}

fn check_label(report: &mut Report, at: &str, volume: &Volume) {
    let (secret, config_map) = (volume.secret.as_ref(), volume.config_map.as_ref());
    for (kind, label) in [
        ("secret", secret.and_then(|source| source.volume_label.as_deref())),
        (
            "configMap",
            config_map.and_then(|source| source.volume_label.as_deref()),
        ),
    ] {
        let fits = |label: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
            label.len() <= LABEL_CHARACTERS && label.bytes().all(allowed)
        };
        if label.is_some_and(|label| !fits(label)) {
            let field = format!("{at}.{kind}.volumeLabel");
            let message =
                format!("{field}: more than {LABEL_CHARACTERS} letters, digits, '-' and '_' are not supported");
            report.not_supported(field, message);
        }
    }
}

fn check_source(report: &mut Report, at: &str, volume: &Volume) {
    let sources = [
        volume.container_disk.is_some(),
        volume.cloud_init_no_cloud.is_some(),
        volume.cloud_init_config_drive.is_some(),
        volume.persistent_volume_claim.is_some(),
        volume.ephemeral.is_some(),
        volume.empty_disk.is_some(),
        volume.secret.is_some(),
        volume.config_map.is_some(),
        volume.service_account.is_some(),
    ];
    let set = sources.into_iter().filter(|set| *set).count();
    if set > 1 || set == 0 && !report.mentions_below(at) {
        report.invalid(at, format!("{at} must have exactly one source type set"));
    }
    if let Some(disk) = &volume.container_disk {
        if let Some(policy) = disk.image_pull_policy.as_deref()
            && !PULL_POLICIES.contains(&policy)
        {
            let message = format!("{at}.containerDisk.imagePullPolicy in body should be one of {PULL_POLICIES:?}");
            report.add("", "", message);
        }
        if let Some(file) = disk.path.as_deref().filter(|path| !path.is_empty()) {
            path(report, &format!("{at}.containerDisk"), file);
        }
    }
    for (kind, named) in [
        ("configMap.name", volume.config_map.as_ref().map(|source| &source.name)),
        (
            "secret.secretName",
            volume.secret.as_ref().map(|source| &source.secret_name),
        ),
        (
            "serviceAccount.serviceAccountName",
            volume
                .service_account
                .as_ref()
                .map(|source| &source.service_account_name),
        ),
    ] {
        if named.is_some_and(|name| name.as_deref().unwrap_or_default().is_empty()) {
            let field = format!("{at}.{kind}");
            let message = format!("{field} is a required field");
            report.invalid(field, message);
        }
    }
    if let Some(source) = &volume.ephemeral
        && source.persistent_volume_claim.is_none()
    {
        let field = format!("{at}.ephemeral.persistentVolumeClaim");
        let message = format!("{field} is a required field");
        report.invalid(field, message);
    }
    if let Some(source) = &volume.cloud_init_config_drive {
        let field = format!("{at}.cloudInitConfigDrive");
        cloudinit::check(report, &field, "cloudInitConfigDrive", source);
    }
    if let Some(source) = &volume.cloud_init_no_cloud {
        cloudinit::check(report, &format!("{at}.cloudInitNoCloud"), "cloudInitNoCloud", source);
    }
    if let Some(disk) = &volume.empty_disk {
        let field = format!("{at}.emptyDisk.capacity");
        match disk.capacity.value() {
            Ok(_) => {}
            Err(error) => report.invalid(&field, format!("{field} '{}': {error}", disk.capacity)),
        }
    }
}

/// A file's path as Go's filepath.Join would leave it, and not the root.
pub fn path(report: &mut Report, at: &str, path: &str) {
    if path == "/" {
        report.invalid(at, format!("{at} must not point to root"));
        return;
    }
    let file = path.strip_suffix('/').unwrap_or(path);
    let plain = |part: &str| !matches!(part, "" | "." | "..");
    if !file.strip_prefix('/').is_some_and(|below| below.split('/').all(plain)) {
        let message = format!("{at} must be an absolute path to a file without relative components");
        report.invalid(at, message);
    }
}
