//! Firmware, processor features and pointing devices.

use kubernest_crds::kubevirt::v1::{Bootloader, Firmware, KernelBoot, VirtualMachineInstanceSpec};

use super::{unsupported, volumes::path};
use crate::decision::{Report, reasons};

const FEATURE_POLICIES: [&str; 6] = ["", "force", "require", "optional", "disable", "forbid"];

/// Disks, interfaces, file systems and inputs together that a machine has room for.
pub const MAX_DEVICES: usize = 22;
const WATCHDOG_ACTIONS: [&str; 4] = ["", "reset", "poweroff", "shutdown"];

/// Checks `domain.firmware`, `domain.cpu.features`, `domain.devices.inputs` and `watchdog`, and how many devices there are.
pub fn check(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let domain = &spec.domain;
    if let Some(firmware) = &domain.firmware {
        check_firmware(report, &format!("{f}.domain"), firmware);
    }
    let bootloader = domain
        .firmware
        .as_ref()
        .and_then(|firmware| firmware.bootloader.as_ref());
    let acpi = domain.features.as_ref().and_then(|features| features.acpi.as_ref());
    if bootloader.is_some_and(|one| one.efi.is_some()) && acpi.is_some_and(|acpi| acpi.enabled == Some(false)) {
        let field = format!("{f}.domain.features.acpi.enabled");
        let message = format!("{field}: false is not supported with EFI");
        report.not_supported(field, message);
    }
    let features = domain.cpu.iter().flat_map(|cpu| cpu.features.iter().flatten());
    for (index, feature) in features.enumerate() {
        let policy = feature.policy.as_deref().unwrap_or_default();
        if !FEATURE_POLICIES.contains(&policy) {
            report.not_supported(
                format!("{f}.domain.cpu.features[{index}].policy"),
                format!(
                    "CPU feature {} uses policy {policy} that is not supported.",
                    feature.name
                ),
            );
        }
    }
    for (index, input) in domain.devices.inputs.iter().flatten().enumerate() {
        let at = format!("{f}.domain.devices.inputs[{index}]");
        if !matches!(input.bus.as_deref().unwrap_or_default(), "" | "virtio" | "usb") {
            report.invalid(format!("{at}.bus"), "Input device can have only virtio or usb bus.");
        }
        if input.type_ != "tablet" {
            report.invalid(format!("{at}.type"), "Input device can have only tablet type.");
        }
    }
    let watchdog = domain
        .devices
        .watchdog
        .as_ref()
        .and_then(|watchdog| watchdog.i6300esb.as_ref());
    let action = watchdog.and_then(|device| device.action.as_deref());
    if action.is_some_and(|action| !WATCHDOG_ACTIONS.contains(&action)) {
        unsupported(report, format!("{f}.domain.devices.watchdog.i6300esb.action"));
    }
    room(report, f, spec);
}

/// There is one PCI bus without bridges.
fn room(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let devices = &spec.domain.devices;
    let interfaces = devices.interfaces.as_ref().map_or(0, Vec::len);
    let given = interfaces + spec.networks.as_ref().map_or(0, Vec::len);
    let by_default = usize::from(given == 0 && devices.autoattach_pod_interface != Some(false));
    let others = [
        devices.disks.as_ref().map_or(0, Vec::len),
        devices.filesystems.as_ref().map_or(0, Vec::len),
        devices.inputs.as_ref().map_or(0, Vec::len),
    ];
    let count = interfaces + by_default + others.iter().sum::<usize>();
    if count > MAX_DEVICES {
        let field = format!("{f}.domain.devices");
        let message = format!(
            "{field}: {count} disks, interfaces, filesystems and inputs are not supported, at most {MAX_DEVICES} fit"
        );
        report.not_supported(field, message);
    }
}

/// Checks a firmware below `domain`.
pub fn check_firmware(report: &mut Report, domain: &str, firmware: &Firmware) {
    let at = format!("{domain}.firmware");
    if let Some(bootloader) = &firmware.bootloader {
        check_bootloader(report, domain, &format!("{at}.bootloader"), bootloader);
    }
    if let Some(boot) = &firmware.kernel_boot {
        check_kernel_boot(report, &format!("{at}.kernelBoot"), boot);
    }
}

fn check_bootloader(report: &mut Report, domain: &str, at: &str, bootloader: &Bootloader) {
    let Some(efi) = &bootloader.efi else { return };
    if bootloader.bios.is_some() {
        let message = format!("{at} has both EFI and BIOS configured, but they are mutually exclusive.");
        report.invalid(at, message);
    }
    if efi.secure_boot.unwrap_or(true) {
        let message =
            format!("{domain} has EFI SecureBoot enabled. SecureBoot requires SMM, which is currently disabled.");
        report.invalid(domain, message);
    }
}

fn check_kernel_boot(report: &mut Report, at: &str, boot: &KernelBoot) {
    let text = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    let Some(container) = &boot.container else {
        if text(&boot.kernel_args).is_some() {
            report.invalid(
                format!("{at}.kernelArgs"),
                "kernel arguments cannot be provided without an external kernel",
            );
        }
        return;
    };
    let at = format!("{at}.container");
    if container.image.is_empty() {
        let message = format!("{at} must be defined with an image");
        report.add(reasons::REQUIRED, format!("{at}.image"), message);
    }
    let paths = [
        ("kernelPath", text(&container.kernel_path)),
        ("initrdPath", text(&container.initrd_path)),
    ];
    if paths.iter().all(|(_, path)| path.is_none()) {
        let message = format!("{at} must be defined with at least one of the following: kernelPath, initrdPath");
        report.add(reasons::REQUIRED, &at, message);
    }
    for (name, file) in paths {
        if let Some(file) = file {
            path(report, &format!("{at}.{name}"), &file);
        }
    }
}
