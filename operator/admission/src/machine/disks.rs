//! Disks, CD-ROMs and filesystems, and the boot order that they share with interfaces.

use std::collections::BTreeMap;

use kubernest_crds::kubevirt::v1::{CustomBlockSize, Disk, VirtualMachineInstanceSpec, Volume};

use super::{check_serial, unsupported};
use crate::{decision::Report, names};

/// Longest name of a file system, as it is the virtiofs tag (virtio 1.2, 5.11.4).
const TAG_CHARACTERS: usize = 36;
/// Smallest and largest block.
const BLOCK_BYTES: [u64; 2] = [512, 2 << 20];
/// Largest sector of a FAT volume (Microsoft's FAT specification, 3.1), which disks of files are; KubeVirt's are ISO images.
const FAT_SECTOR_BYTES: u64 = 4096;

/// Checks `domain.devices.disks` and `filesystems`.
pub fn check(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let devices = &spec.domain.devices;
    let disks = devices.disks.as_deref().unwrap_or_default();
    let base = format!("{f}.domain.devices.disks");
    let mut names_seen: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, disk) in disks.iter().enumerate() {
        let at = format!("{base}[{index}]");
        if let Some(first) = names_seen.get(disk.name.as_str()) {
            report.invalid(
                format!("{at}.name"),
                format!("{at} and {base}[{first}] must not have the same Name."),
            );
        } else {
            names_seen.insert(&disk.name, index);
        }
        if volume_of(spec, disk).is_none() {
            report.invalid(format!("{at}.name"), format!("{at}.Name '{}' not found.", disk.name));
        }
        // KubeVirt repeats the base in these fields; clients know them so.
        let doubled = format!("{base}.domain.devices.disks[{index}]");
        if let Some(why) = names::dns_label(&disk.name) {
            report.invalid(format!("{doubled}.name"), why);
        }
        target(report, &at, disk);
        read_only_claim(report, &at, disk, spec);
        properties(report, &base, &at, &doubled, disk);
        files_sector(report, &at, disk, spec);
    }
    boot_order(report, f, spec);
    for (index, filesystem) in devices.filesystems.as_deref().unwrap_or_default().iter().enumerate() {
        let at = format!("{f}.domain.devices.filesystems[{index}]");
        if filesystem.virtiofs.is_none() {
            report.invalid(&at, format!("{at} must have virtiofs set"));
        }
        if filesystem.name.len() > TAG_CHARACTERS {
            let field = format!("{at}.name");
            let message = format!("{field}: more than {TAG_CHARACTERS} characters are not supported");
            report.not_supported(field, message);
        }
        let volume = spec
            .volumes
            .as_deref()
            .unwrap_or_default()
            .iter()
            .find(|volume| volume.name == filesystem.name);
        match volume {
            Some(volume) if volume.persistent_volume_claim.is_some() => report.invalid(
                format!("{f}.domain.devices.filesystems"),
                "virtiofs is not allowed: virtiofs feature gate is not enabled for PVC",
            ),
            // Only what the kubelet keeps as files can be shared.
            Some(volume)
                if volume.secret.is_none() && volume.config_map.is_none() && volume.service_account.is_none() =>
            {
                unsupported(report, at);
            }
            _ => {}
        }
    }
}

fn volume_of<'a>(spec: &'a VirtualMachineInstanceSpec, disk: &Disk) -> Option<&'a Volume> {
    let mut volumes = spec.volumes.iter().flatten();
    volumes.find(|volume| volume.name == disk.name)
}

/// What is no claim, image or empty disk is made of files, in a file system whose sectors are not smaller than the disk's.
fn files_sector(report: &mut Report, at: &str, disk: &Disk, spec: &VirtualMachineInstanceSpec) {
    let of_files = |volume: &&Volume| {
        volume.cloud_init_no_cloud.is_some()
            || volume.cloud_init_config_drive.is_some()
            || volume.secret.is_some()
            || volume.config_map.is_some()
            || volume.service_account.is_some()
    };
    let custom = disk.block_size.as_ref().and_then(|size| size.custom.as_ref());
    let volume = volume_of(spec, disk).filter(of_files);
    if volume.is_some() && custom.is_some_and(|size| size.logical > FAT_SECTOR_BYTES) {
        let field = format!("{at}.blockSize.custom.logical");
        let message = format!("{field}: more than {FAT_SECTOR_BYTES} is not supported of disks that are made of files");
        report.not_supported(field, message);
    }
}

/// libvirt knows no read-only SATA disk, and qemu can't open the disk of such a claim for writing.
fn read_only_claim(report: &mut Report, at: &str, disk: &Disk, spec: &VirtualMachineInstanceSpec) {
    let claim = volume_of(spec, disk).and_then(|volume| volume.persistent_volume_claim.as_ref());
    let bus = disk.disk.as_ref().and_then(|target| target.bus.as_deref());
    let on_sata = disk.cdrom.is_none() && matches!(bus, None | Some("" | "sata"));
    if on_sata && claim.is_some_and(|claim| claim.read_only == Some(true)) {
        let field = format!("{at}.disk.bus");
        let message = format!(
            "{field}: a claim that is readOnly is not supported on a SATA disk, which is what a disk is without a bus: \
             choose virtio, scsi or usb"
        );
        report.not_supported(field, message);
    }
}

fn target(report: &mut Report, at: &str, disk: &Disk) {
    if disk.disk.is_some() && disk.cdrom.is_some() {
        report.invalid(at, format!("{at} can only have a single target type defined"));
    }
    let (kind, bus) = match (&disk.disk, &disk.cdrom) {
        (Some(target), _) => ("disk", target.bus.as_deref()),
        (None, Some(target)) => ("cdrom", target.bus.as_deref()),
        (None, None) => return,
    };
    let tray = disk.cdrom.as_ref().and_then(|cdrom| cdrom.tray.as_deref());
    if !matches!(tray, None | Some("" | "closed")) {
        unsupported(report, format!("{at}.cdrom.tray"));
    }
    let field = format!("{at}.{kind}.bus");
    match bus {
        None | Some("" | "scsi" | "usb") => {}
        Some("virtio") if kind == "disk" => {}
        Some("virtio") => report.invalid(field, "Bus type virtio is invalid for CD-ROM device"),
        Some("sata") => {
            if disk.disk.as_ref().is_some_and(|target| target.read_only == Some(true)) {
                report.invalid(field, "sata hard-disks do not support read-only.");
            }
        }
        Some("ide") => report.invalid(field, "IDE bus is not supported"),
        Some(other) => report.invalid(
            field,
            format!("{at} is set with an unrecognized bus {other}, must be one of: [virtio scsi sata usb]"),
        ),
    }
}

fn properties(report: &mut Report, base: &str, at: &str, doubled: &str, disk: &Disk) {
    if let Some(serial) = &disk.serial {
        check_serial(report, &format!("{at}.serial"), at, serial);
    }
    match disk.cache.as_deref() {
        None | Some("" | "none" | "writethrough" | "writeback") => {}
        Some(other) => report.invalid(format!("{at}.cache"), format!("{at}.cache has invalid value {other}")),
    }
    match disk.io.as_deref() {
        None | Some("" | "native" | "threads") => {}
        Some(_) => report.not_supported(
            format!("{doubled}.io"),
            format!("Disk IO mode for {base} is not supported. Supported modes are: native, threads."),
        ),
    }
    if let Some(policy) = &disk.error_policy
        && !["stop", "ignore", "report", "enospace"].contains(&policy.as_str())
    {
        let field = format!("{at}.errorPolicy");
        let message = format!("{field} has invalid value \"{policy}\"");
        report.invalid(field, message);
    }
    if let Some(custom) = disk.block_size.as_ref().and_then(|size| size.custom.as_ref()) {
        let on_sata = disk
            .disk
            .as_ref()
            .is_some_and(|target| target.bus.as_deref() == Some("sata"))
            || disk
                .cdrom
                .as_ref()
                .is_some_and(|target| target.bus.as_deref() == Some("sata"));
        block_size(report, &format!("{at}.blockSize.custom"), custom, on_sata);
    }
}

fn block_size(report: &mut Report, at: &str, size: &CustomBlockSize, on_sata: bool) {
    if size.logical > size.physical {
        let message = format!(
            "Logical size {} must be the same or less than the physical size of {}",
            size.logical, size.physical
        );
        report.invalid(format!("{at}.logical"), message);
        return;
    }
    // qemu's controllers know no other.
    if on_sata && size.logical != BLOCK_BYTES[0] {
        let message = format!(
            "Logical size {} must be {} for SATA devices",
            size.logical, BLOCK_BYTES[0]
        );
        report.invalid(format!("{at}.logical"), message);
        return;
    }
    for (name, size) in [("logical", size.logical), ("physical", size.physical)] {
        let [smallest, largest] = BLOCK_BYTES;
        let message = if size < smallest {
            format!("Provided size of {size} is less than the supported minimum size of {smallest}")
        } else if size > largest {
            format!("Provided size of {size} is greater than the supported maximum size of {largest}")
        } else if !size.is_power_of_two() {
            format!("Provided size of {size} is not a power of 2")
        } else {
            continue;
        };
        report.invalid(format!("{at}.{name}"), message);
    }
}

fn boot_order(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let devices = &spec.domain.devices;
    let disks = devices.disks.iter().flatten().enumerate();
    let disks = disks.map(|(index, disk)| (format!("{f}.domain.devices.disks[{index}]"), disk.boot_order));
    let interfaces = devices.interfaces.iter().flatten().enumerate();
    let interfaces = interfaces.map(|(index, nic)| {
        // KubeVirt's short path of an order that is too small; clients know it so.
        let short = format!("{f}[{index}]");
        (short, format!("{f}.domain.devices.interfaces[{index}]"), nic.boot_order)
    });
    let mut seen = Vec::new();
    let disks = disks.map(|(at, order)| (at.clone(), at, order));
    for (small, at, order) in disks.chain(interfaces) {
        let Some(order) = order else { continue };
        let field = format!("{at}.bootOrder");
        if order < 1 {
            let message = format!("{small} must have a boot order > 0, if supplied");
            report.invalid(format!("{small}.bootOrder"), message);
        } else if seen.contains(&order) {
            let message = format!("Boot order for {field} already set for a different device.");
            report.invalid(field, message);
        } else {
            seen.push(order);
        }
    }
}
