//! Firmware, processor features, timers and pointing devices of a VMI, in libvirt's words.

use kubernest_crds::kubevirt::v1::{Clock, Cpu, Devices, Firmware as FirmwareSpec};

use super::{PlanError, disks, invalid, plain, unsupported};
use crate::machine::{Bus, Firmware, Timer};

pub(super) fn firmware(firmware: &FirmwareSpec) -> Result<Firmware, PlanError> {
    let field = "spec.domain.firmware.bootloader";
    let Some(bootloader) = &firmware.bootloader else {
        return Ok(Firmware::Bios { serial: false });
    };
    match (&bootloader.bios, &bootloader.efi) {
        (Some(_), Some(_)) => Err(invalid(field, "bios and efi are mutually exclusive")),
        (_, Some(efi)) if efi.secure_boot == Some(false) => Ok(Firmware::Efi),
        (_, Some(_)) => Err(unsupported(format!("{field}.efi.secureBoot"))),
        (bios, None) => Ok(Firmware::Bios {
            serial: bios.as_ref().and_then(|bios| bios.use_serial).unwrap_or(false),
        }),
    }
}

pub(super) fn cpu_features(cpu: Option<&Cpu>) -> Result<Vec<(String, String)>, PlanError> {
    let features = cpu.iter().flat_map(|cpu| cpu.features.iter().flatten());
    let feature = |(index, feature): (usize, &kubernest_crds::kubevirt::v1::CpuFeature)| {
        let field = format!("spec.domain.cpu.features[{index}]");
        let policy = match feature.policy.as_deref().unwrap_or_default() {
            "" => "require",
            policy @ ("force" | "require" | "optional" | "disable" | "forbid") => policy,
            _ => return Err(unsupported(format!("{field}.policy"))),
        };
        Ok((policy.to_owned(), plain(&format!("{field}.name"), &feature.name)?))
    };
    features.enumerate().map(feature).collect()
}

pub(super) fn timers(clock: Option<&Clock>) -> Result<Vec<Timer>, PlanError> {
    let Some(timer) = clock.and_then(|clock| clock.timer.as_ref()) else {
        return Ok(Vec::new());
    };
    let one_of = |name: &str, value: &Option<String>, known: &[&str]| {
        disks::one_of(&format!("spec.domain.clock.timer.{name}"), value.as_deref(), known)
    };
    let mut timers = Vec::new();
    if let Some(hpet) = &timer.hpet {
        timers.push(Timer {
            name: "hpet",
            present: hpet.present,
            tick_policy: one_of(
                "hpet.tickPolicy",
                &hpet.tick_policy,
                &["delay", "catchup", "merge", "discard"],
            )?,
            track: None,
        });
    }
    if let Some(kvm) = &timer.kvm {
        timers.push(Timer {
            name: "kvmclock",
            present: kvm.present,
            ..Timer::default()
        });
    }
    if let Some(pit) = &timer.pit {
        timers.push(Timer {
            name: "pit",
            present: pit.present,
            tick_policy: one_of("pit.tickPolicy", &pit.tick_policy, &["delay", "catchup", "discard"])?,
            track: None,
        });
    }
    if let Some(rtc) = &timer.rtc {
        timers.push(Timer {
            name: "rtc",
            present: rtc.present,
            tick_policy: one_of("rtc.tickPolicy", &rtc.tick_policy, &["delay", "catchup"])?,
            track: one_of("rtc.track", &rtc.track, &["guest", "wall"])?,
        });
    }
    Ok(timers)
}

pub(super) fn tablets(devices: &Devices) -> Result<Vec<Bus>, PlanError> {
    let inputs = devices.inputs.iter().flatten().enumerate();
    inputs
        .map(|(index, input)| {
            let field = format!("spec.domain.devices.inputs[{index}]");
            if input.type_ != "tablet" {
                return Err(unsupported(format!("{field}.type")));
            }
            match input.bus.as_deref().unwrap_or_default() {
                "" | "usb" => Ok(Bus::Usb),
                "virtio" => Ok(Bus::Virtio),
                _ => Err(unsupported(format!("{field}.bus"))),
            }
        })
        .collect()
}
