//! [`Launch`] → [`Machine`]: every choice made, or the field named that can't be served.
//!
//! Admission has refused most of this before; the launcher checks again because it believes nobody. What libvirt or
//! qemu alone can know (does this CPU model exist) is left to them.

mod disks;
mod hardware;
mod networks;

use kubernest_crds::kubevirt::v1::{
    Clock as ClockSpec, Cpu as CpuSpec, DomainSpec, Firmware as FirmwareSpec, KernelBoot, start_strategy,
};
use kubernest_crds::labels;
use kubernest_crds::quantity::Quantity;

use crate::machine::{Clock, Cpu, Firmware, Kernel, Machine, Topology};
use crate::processors::{self, CpuSet, Pinning, Processors};
use crate::{Accelerator, Launch, emulation, paths, xml};

/// CPU model under TCG: the newest whose instructions TCG translates cheaply (measured against `max` and `qemu64`).
pub const TCG_CPU: &str = "Nehalem";
/// Seconds from power button to destruction when the VMI says nothing (KubeVirt's default).
pub const DEFAULT_GRACE_SECONDS: u64 = 30;
const MIB: u64 = 1 << 20;

/// Why a VirtualMachineInstance can't become a domain; each names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Known to KubeVirt, not to us.
    #[error("{field}: not supported")]
    Unsupported {
        /// Path from the VMI's root, or from the launch document's.
        field: String,
    },
    /// Refers to something that is not there.
    #[error("{field} '{name}' not found")]
    Missing {
        /// Path of the reference.
        field: String,
        /// What it names.
        name: String,
    },
    /// A value that can't be.
    #[error("{field}: {why}")]
    Invalid {
        /// Path of the value.
        field: String,
        /// A short sentence.
        why: &'static str,
    },
    /// The node gave the container no processors of its own.
    #[error(
        "spec.domain.cpu.dedicatedCpuPlacement: the container may use the processors {allowed} where {wanted} of its own \
         were asked for: the node's kubelet gives none away; it needs the CPU manager policy static"
    )]
    Shared {
        /// How many it needs.
        wanted: u32,
        /// Those that it may use, with others.
        allowed: CpuSet,
    },
}

pub(crate) fn unsupported(field: impl Into<String>) -> PlanError {
    PlanError::Unsupported { field: field.into() }
}

pub(crate) fn missing(field: impl Into<String>, name: &str) -> PlanError {
    PlanError::Missing {
        field: field.into(),
        name: name.to_owned(),
    }
}

pub(crate) fn invalid(field: impl Into<String>, why: &'static str) -> PlanError {
    PlanError::Invalid {
        field: field.into(),
        why,
    }
}

/// The machine that a launch document asks for, on the `processors` that the container got; they matter only to one that
/// asks for [its own](Launch::dedicated).
pub fn machine(launch: &Launch, processors: &Processors) -> Result<Machine, PlanError> {
    let (metadata, spec) = (&launch.vmi.metadata, &launch.vmi.spec);
    let name = metadata
        .name
        .as_deref()
        .ok_or_else(|| invalid("metadata.name", "must be set"))?;
    let namespace = metadata
        .namespace
        .as_deref()
        .ok_or_else(|| invalid("metadata.namespace", "must be set"))?;
    if spec
        .architecture
        .as_deref()
        .is_some_and(|architecture| architecture != "amd64")
    {
        return Err(unsupported("spec.architecture"));
    }
    let hostname = spec.hostname.as_deref().unwrap_or(name);
    let hostname = label(
        "spec.hostname",
        hostname.get(..63).unwrap_or(hostname).trim_end_matches(['-', '.']),
    )?;
    let domain = &spec.domain;
    let devices = &domain.devices;
    let firmware = domain.firmware.clone().unwrap_or_default();
    let topology = topology(domain.cpu.as_ref())?;
    let memory = memory(domain)?;
    let machine = Machine {
        name: format!("{namespace}_{name}"),
        uuid: uuid(&firmware)?,
        system_serial: firmware
            .serial
            .as_deref()
            .map(|s| plain("spec.domain.firmware.serial", s))
            .transpose()?,
        accelerator: launch.accelerator,
        machine_type: machine_type(domain)?,
        memory,
        topology,
        pinning: pinning(launch, topology, processors)?,
        cpu: cpu(launch.accelerator, domain.cpu.as_ref())?,
        cpu_features: hardware::cpu_features(domain.cpu.as_ref())?,
        translation_cache_mib: emulation::translation_cache_bytes(memory) / MIB,
        acpi: domain
            .features
            .as_ref()
            .and_then(|f| f.acpi.as_ref())
            .and_then(|acpi| acpi.enabled)
            .unwrap_or(true),
        firmware: hardware::firmware(&firmware)?,
        kernel: kernel(launch, firmware.kernel_boot.as_ref())?,
        clock: clock(domain.clock.as_ref())?,
        timers: hardware::timers(domain.clock.as_ref())?,
        disks: disks::disks(launch, &hostname)?,
        nics: networks::nics(launch)?,
        shares: disks::shares(launch)?,
        serial_console: devices.autoattach_serial_console.unwrap_or(true),
        graphics: devices.autoattach_graphics_device.unwrap_or(true),
        tablets: hardware::tablets(devices)?,
        rng: devices.rng.is_some(),
        balloon: devices.autoattach_mem_balloon.unwrap_or(true),
        // A guest with processors of its own is spared all work that it was not asked for.
        free_page_reporting: launch.dedicated().is_none()
            && annotation(launch, labels::FREE_PAGE_REPORTING_DISABLED) != Some("true"),
        watchdog: watchdog(domain)?,
        grace_seconds: match spec.termination_grace_period_seconds {
            None => DEFAULT_GRACE_SECONDS,
            Some(seconds) => u64::try_from(seconds)
                .map_err(|_| invalid("spec.terminationGracePeriodSeconds", "must not be negative"))?,
        },
        start_paused: start_paused(spec.start_strategy.as_deref())?,
        hostname,
    };
    if machine.firmware == Firmware::Efi && !machine.acpi {
        return Err(unsupported("spec.domain.features.acpi.enabled: false with EFI"));
    }
    if machine.disks.len() + machine.nics.len() + machine.shares.len() + machine.tablets.len() > xml::MAX_PCI_DEVICES {
        return Err(invalid(
            "spec.domain.devices",
            "more disks, interfaces, filesystems and inputs than fit on the PCI bus",
        ));
    }
    Ok(machine)
}

/// There is one strategy; without it a guest moves at once.
fn start_paused(strategy: Option<&str>) -> Result<bool, PlanError> {
    match strategy {
        None => Ok(false),
        Some(start_strategy::PAUSED) => Ok(true),
        Some(_) => Err(unsupported("spec.startStrategy")),
    }
}

fn uuid(firmware: &FirmwareSpec) -> Result<Option<String>, PlanError> {
    let Some(uuid) = &firmware.uuid else { return Ok(None) };
    let groups: Vec<usize> = uuid.split('-').map(str::len).collect();
    if !matches!(groups[..], [8, 4, 4, 4, 12] | [32]) || !uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') {
        return Err(invalid("spec.domain.firmware.uuid", "must be a UUID"));
    }
    Ok(Some(uuid.to_ascii_lowercase()))
}

fn machine_type(domain: &DomainSpec) -> Result<String, PlanError> {
    match domain
        .machine
        .as_ref()
        .and_then(|machine| machine.type_.as_deref())
        .unwrap_or("q35")
    {
        "" | "q35" => Ok("q35".to_owned()),
        // Whether qemu has it, libvirt will say.
        other if other.starts_with("q35") || other.starts_with("pc-q35") => plain("spec.domain.machine.type", other),
        _ => Err(unsupported("spec.domain.machine.type")),
    }
}

fn memory(domain: &DomainSpec) -> Result<u64, PlanError> {
    let guest = domain.memory.as_ref().and_then(|memory| memory.guest.as_ref());
    let (field, quantity) = match (
        guest,
        domain.resources.requests.get("memory"),
        domain.resources.limits.get("memory"),
    ) {
        (Some(guest), _, _) => ("spec.domain.memory.guest", guest),
        (None, Some(request), _) => ("spec.domain.resources.requests.memory", request),
        (None, None, Some(limit)) => ("spec.domain.resources.limits.memory", limit),
        (None, None, None) => return Err(invalid("spec.domain.memory.guest", "must be set")),
    };
    match bytes(field, quantity)? {
        0..1_000_000 => Err(invalid(field, "must be at least 1M")),
        bytes => Ok(bytes),
    }
}

/// A quantity as bytes.
pub(crate) fn bytes(field: &str, quantity: &Quantity) -> Result<u64, PlanError> {
    quantity
        .value()
        .ok()
        .and_then(|value| u64::try_from(value).ok())
        .ok_or_else(|| invalid(field, "must be a size in bytes"))
}

fn topology(cpu: Option<&CpuSpec>) -> Result<Topology, PlanError> {
    let count = |field: &str, value: Option<u32>| match value.unwrap_or(1) {
        0 => Ok(1),
        n @ 1..=256 => Ok(n),
        _ => Err(invalid(format!("spec.domain.cpu.{field}"), "must be at most 256")),
    };
    let cpu = cpu.cloned().unwrap_or_default();
    let topology = Topology {
        sockets: count("sockets", cpu.sockets)?,
        cores: count("cores", cpu.cores)?,
        threads: count("threads", cpu.threads)?,
    };
    match topology.vcpus() {
        // qemu 7.2's limit of q35 without an IOMMU that remaps interrupts.
        1..=255 => Ok(topology),
        _ => Err(invalid(
            "spec.domain.cpu",
            "sockets × cores × threads must be at most 255",
        )),
    }
}

fn pinning(launch: &Launch, topology: Topology, processors: &Processors) -> Result<Option<Pinning>, PlanError> {
    let cpu = launch.vmi.spec.domain.cpu.as_ref();
    let isolated = cpu.is_some_and(|cpu| cpu.isolate_emulator_thread == Some(true));
    let Some(wanted) = launch.dedicated() else {
        return if isolated {
            let why = "only together with dedicatedCpuPlacement";
            Err(invalid("spec.domain.cpu.isolateEmulatorThread", why))
        } else {
            Ok(None)
        };
    };
    let allowed = processors.allowed().clone();
    let pinning = processors::pin(topology, isolated, processors).ok_or(PlanError::Shared { wanted, allowed })?;
    Ok(Some(pinning))
}

fn cpu(accelerator: Accelerator, cpu: Option<&CpuSpec>) -> Result<Cpu, PlanError> {
    let model = cpu.and_then(|cpu| cpu.model.as_deref()).unwrap_or("host-model");
    Ok(match (accelerator, model) {
        // Emulation has no host processor to pass through or to resemble.
        (Accelerator::Tcg, "" | "host-model" | "host-passthrough") => Cpu::Named(TCG_CPU.to_owned()),
        (Accelerator::Kvm, "" | "host-model") => Cpu::HostModel,
        (Accelerator::Kvm, "host-passthrough") => Cpu::HostPassthrough,
        (_, named) => Cpu::Named(plain("spec.domain.cpu.model", named)?),
    })
}

fn annotation<'a>(launch: &'a Launch, name: &str) -> Option<&'a str> {
    let annotations = launch.vmi.metadata.annotations.as_ref()?;
    annotations.get(name).map(String::as_str)
}

/// Kernel arguments that the instance wants under emulation only.
fn emulation_args(launch: &Launch) -> Result<String, PlanError> {
    let args = annotation(launch, labels::EMULATION_KERNEL_ARGS);
    let field = format!("metadata.annotations[{}]", labels::EMULATION_KERNEL_ARGS);
    let args = plain(&field, args.unwrap_or_default())?;
    let kernel_boot = launch
        .vmi
        .spec
        .domain
        .firmware
        .as_ref()
        .and_then(|firmware| firmware.kernel_boot.as_ref());
    if !args.is_empty() && kernel_boot.is_none_or(|boot| boot.container.is_none()) {
        return Err(invalid(field, "need a kernel"));
    }
    Ok(args)
}

fn kernel(launch: &Launch, boot: Option<&KernelBoot>) -> Result<Option<Kernel>, PlanError> {
    let emulation = emulation_args(launch)?;
    let Some(boot) = boot else { return Ok(None) };
    let field = "spec.domain.firmware.kernelBoot";
    // A text block of YAML ends in a line break.
    let args = boot.kernel_args.as_deref().unwrap_or_default().trim_end();
    let mut args = plain(&format!("{field}.kernelArgs"), args)?;
    let Some(container) = &boot.container else {
        return if args.is_empty() {
            Ok(None)
        } else {
            Err(invalid(format!("{field}.kernelArgs"), "need a kernel"))
        };
    };
    let below = |name: &str, path: &str| {
        disks::image_path(&format!("{field}.container.{name}"), path)
            .map(|path| std::path::Path::new(paths::KERNEL_BOOT).join(path))
    };
    let Some(kernel) = &container.kernel_path else {
        // KubeVirt allows an initrd alone; no firmware of ours could load it.
        return Err(invalid(format!("{field}.container.kernelPath"), "must be set"));
    };
    if launch.accelerator == Accelerator::Tcg && !emulation.is_empty() {
        args = format!("{args} {emulation}").trim_start().to_owned();
    }
    Ok(Some(Kernel {
        kernel: below("kernelPath", kernel)?,
        initrd: container
            .initrd_path
            .as_deref()
            .map(|path| below("initrdPath", path))
            .transpose()?,
        args,
    }))
}

fn clock(clock: Option<&ClockSpec>) -> Result<Clock, PlanError> {
    let Some(clock) = clock else { return Ok(Clock::Utc(0)) };
    match (&clock.utc, &clock.timezone) {
        (None, Some(zone)) => Ok(Clock::Zone(plain("spec.domain.clock.timezone", zone)?)),
        // KubeVirt takes UTC where both are given.
        (utc, _) => Ok(Clock::Utc(utc.as_ref().and_then(|utc| utc.offset_seconds).unwrap_or(0))),
    }
}

fn watchdog(domain: &DomainSpec) -> Result<Option<&'static str>, PlanError> {
    let Some(watchdog) = &domain.devices.watchdog else {
        return Ok(None);
    };
    let Some(i6300esb) = &watchdog.i6300esb else {
        return Err(invalid("spec.domain.devices.watchdog", "needs i6300esb"));
    };
    match i6300esb.action.as_deref().unwrap_or("reset") {
        "" | "reset" => Ok(Some("reset")),
        "poweroff" => Ok(Some("poweroff")),
        "shutdown" => Ok(Some("shutdown")),
        _ => Err(unsupported("spec.domain.devices.watchdog.i6300esb.action")),
    }
}

/// Text without control characters: XML 1.0 can't carry them.
pub(crate) fn plain(field: &str, text: &str) -> Result<String, PlanError> {
    if text.chars().any(char::is_control) {
        return Err(invalid(field, "must not hold control characters"));
    }
    Ok(text.to_owned())
}

/// A DNS label (RFC 1123): safe as a file name, an XML attribute and a host name.
pub(crate) fn label(field: &str, text: &str) -> Result<String, PlanError> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    let (Some(first), Some(last)) = (text.bytes().next(), text.bytes().last()) else {
        return Err(invalid(field, "must not be empty"));
    };
    if text.len() > 63 || !text.bytes().all(inner) || matches!(first, b'-' | b'.') || matches!(last, b'-' | b'.') {
        return Err(invalid(
            field,
            "must be at most 63 lower-case letters, digits, '-' and '.'",
        ));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests;
