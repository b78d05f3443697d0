//! Volumes: exactly one source each, unique names, and what each source needs.

use kubernest_crds::kubevirt::v1::{VirtualMachineInstanceSpec, Volume};

use super::cloudinit;
use crate::decision::Report;

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
    }
    if let Some(container) = spec
        .domain
        .firmware
        .as_ref()
        .and_then(|firmware| firmware.kernel_boot.as_ref())
        .and_then(|boot| boot.container.as_ref())
    {
        let at = format!("{f}.domain.firmware.kernelBoot.container");
        if container.image.is_empty() {
            report.invalid(&at, format!("{at} must be defined with an image"));
        }
        if container.kernel_path.is_none() && container.initrd_path.is_none() {
            report.invalid(
                &at,
                format!("{at} must be defined with at least one of the following: kernelPath, initrdPath"),
            );
        }
    }
}

fn check_source(report: &mut Report, at: &str, volume: &Volume) {
    let sources = [
        volume.container_disk.is_some(),
        volume.cloud_init_no_cloud.is_some(),
        volume.persistent_volume_claim.is_some(),
        volume.empty_disk.is_some(),
        volume.secret.is_some(),
        volume.config_map.is_some(),
    ];
    let set = sources.into_iter().filter(|set| *set).count();
    if set > 1 || set == 0 && !report.mentions_below(at) {
        report.invalid(at, format!("{at} must have exactly one source type set"));
    }
    if let Some(disk) = &volume.container_disk {
        if disk.image.is_empty() {
            report.invalid(
                format!("{at}.containerDisk"),
                format!("{at}.containerDisk must have an image set"),
            );
        }
        let path = disk.path.as_deref().unwrap_or("/");
        if !path.is_empty() && (!path.starts_with('/') || path.split('/').any(|part| part == "." || part == "..")) {
            report.invalid(
                format!("{at}.containerDisk"),
                format!("{at}.containerDisk must be an absolute path to a file without relative components"),
            );
        }
    }
    if let Some(source) = &volume.cloud_init_no_cloud {
        cloudinit::check(report, &format!("{at}.cloudInitNoCloud"), "cloudInitNoCloud", source);
    }
    if let Some(disk) = &volume.empty_disk {
        let field = format!("{at}.emptyDisk.capacity");
        match disk.capacity.value() {
            Ok(bytes) if bytes > 0 => {}
            Ok(_) => report.invalid(&field, format!("{field} '{}': must be greater than 0.", disk.capacity)),
            Err(error) => report.invalid(&field, format!("{field} '{}': {error}", disk.capacity)),
        }
    }
}
