//! [`Machine`] → libvirt domain XML (<https://libvirt.org/formatdomain.html>).
//!
//! Everything a guest finds on its PCI bus sits on the root complex at an explicit slot: without hot-plug a root port a
//! device is only boot time. No sound, no default devices; USB where something is on it.

mod element;

use self::element::{Element, el};
use crate::Accelerator;
use crate::machine::{Backend, Bus, Clock, Cpu, Device, Disk, Firmware, Kernel, Machine, Nic, Share, Timer};
use crate::paths;

/// Socket on which the launcher awaits qemu's first serial port.
pub const SERIAL_SOCKET: &str = "/run/kubernest/serial.sock";
/// Socket on which qemu serves the screen.
pub const VNC_SOCKET: &str = "/run/kubernest/vnc.sock";

/// Socket through which libvirt speaks with the guest agent. Named here, as libvirt's own choice has the domain's name in
/// it and would be too long for a socket's address.
pub const AGENT_SOCKET: &str = "/run/kubernest/agent.sock";
/// The channel's name in the guest, which agents look for (libvirt emits events for this one only).
const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// The domain as libvirt reads it.
pub fn domain(machine: &Machine) -> String {
    let kind = match machine.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "qemu",
    };
    let mut domain = el("domain")
        .attr("type", kind)
        .attr("xmlns:qemu", "http://libvirt.org/schemas/domain/qemu/1.0");
    domain.push(el("name").text(&machine.name));
    if let Some(uuid) = &machine.uuid {
        domain.push(el("uuid").text(uuid));
    }
    domain.push(el("memory").attr("unit", "b").text(machine.memory));
    if !machine.shares.is_empty() {
        // vhost-user servers map the guest's memory: it must be a shared file.
        domain.push(
            el("memoryBacking")
                .with(el("source").attr("type", "memfd"))
                .with(el("access").attr("mode", "shared")),
        );
    }
    push_vcpus(&mut domain, machine);
    if let Some(serial) = &machine.system_serial {
        domain.push(
            el("sysinfo")
                .attr("type", "smbios")
                .with(el("system").with(el("entry").attr("name", "serial").text(serial))),
        );
    }
    domain.push(os(machine));
    domain.push(features(machine));
    domain.push(cpu(machine));
    domain.push(clock(machine));
    domain.push(el("on_poweroff").text("destroy"));
    domain.push(el("on_reboot").text("restart"));
    domain.push(el("on_crash").text("destroy"));
    domain.push(devices(machine));
    domain.push(el("seclabel").attr("type", "none"));
    domain.push(environment());
    domain.render()
}

/// How many virtual CPUs, and on which of the node's processors all of it runs.
///
/// Under TCG libvirt refuses to pin single virtual CPUs ("cpu affinity is not supported", qemuProcessSetupVcpus): the
/// launcher does it then.
fn push_vcpus(domain: &mut Element, machine: &Machine) {
    let mut vcpu = el("vcpu").attr("placement", "static");
    if let Some(pinning) = &machine.pinning {
        vcpu = vcpu.attr("cpuset", &pinning.all);
    }
    domain.push(vcpu.text(machine.topology.vcpus()));
    let Some(pinning) = &machine.pinning else { return };
    let mut tune = el("cputune");
    if machine.accelerator == Accelerator::Kvm {
        for (number, processor) in pinning.vcpus.iter().enumerate() {
            tune.push(el("vcpupin").attr("vcpu", number).attr("cpuset", processor));
        }
    }
    tune.push(el("emulatorpin").attr("cpuset", &pinning.emulator));
    domain.push(tune);
}

/// qemu frees and makes anew large tables all the time (the emulator's TLBs). glibc would keep what was freed; each in a
/// mapping of its own goes back to the node, 6 to 9 MiB of a control plane's 95 (mallopt(3)).
fn environment() -> Element {
    let tables = el("qemu:env")
        .attr("name", "MALLOC_MMAP_THRESHOLD_")
        .attr("value", 65536);
    el("qemu:commandline").with(tables)
}

fn os(machine: &Machine) -> Element {
    let mut os = el("os").with(
        el("type")
            .attr("arch", "x86_64")
            .attr("machine", &machine.machine_type)
            .text("hvm"),
    );
    match machine.firmware {
        Firmware::Bios { serial: false } => {}
        Firmware::Bios { serial: true } => os.push(el("bios").attr("useserial", "yes")),
        Firmware::Efi => {
            os.push(
                el("loader")
                    .attr("readonly", "yes")
                    .attr("type", "pflash")
                    .text(paths::EFI_CODE),
            );
            os.push(el("nvram").attr("template", paths::EFI_VARS).text(paths::EFI_OWN_VARS));
        }
    }
    if let Some(Kernel { kernel, initrd, args }) = &machine.kernel {
        os.push(el("kernel").text(kernel.display()));
        if let Some(initrd) = initrd {
            os.push(el("initrd").text(initrd.display()));
        }
        if !args.is_empty() {
            os.push(el("cmdline").text(args));
        }
    }
    if machine.system_serial.is_some() {
        os.push(el("smbios").attr("mode", "sysinfo"));
    }
    os
}

fn features(machine: &Machine) -> Element {
    let mut features = el("features");
    if machine.acpi {
        features.push(el("acpi"));
    }
    features.push(el("apic"));
    if machine.accelerator == Accelerator::Kvm && machine.pinning.is_some() {
        // The guest may wait by spinning: nobody else wants the processor.
        let hint = el("hint-dedicated").attr("state", "on");
        features.push(el("kvm").with(hint));
    }
    if machine.accelerator == Accelerator::Tcg {
        let cache = el("tb-cache").attr("unit", "MiB").text(machine.translation_cache_mib);
        features.push(el("tcg").with(cache));
    }
    features
}

fn cpu(machine: &Machine) -> Element {
    let topology = el("topology")
        .attr("sockets", machine.topology.sockets)
        .attr("dies", 1)
        .attr("cores", machine.topology.cores)
        .attr("threads", machine.topology.threads);
    let mut cpu = match &machine.cpu {
        Cpu::HostPassthrough => el("cpu")
            .attr("mode", "host-passthrough")
            .attr("check", "none")
            .with(topology),
        Cpu::HostModel => el("cpu")
            .attr("mode", "host-model")
            .attr("check", "partial")
            .with(topology),
        Cpu::Named(model) => {
            // Under TCG libvirt would compare with the host's processor, which executes nothing of the guest.
            let check = if machine.accelerator == Accelerator::Tcg {
                "none"
            } else {
                "partial"
            };
            el("cpu")
                .attr("mode", "custom")
                .attr("match", "exact")
                .attr("check", check)
                .with(el("model").attr("fallback", "forbid").text(model))
                .with(topology)
        }
    };
    for (policy, name) in &machine.cpu_features {
        cpu.push(el("feature").attr("policy", policy).attr("name", name));
    }
    cpu
}

fn clock(machine: &Machine) -> Element {
    let clock = match &machine.clock {
        Clock::Utc(0) => el("clock").attr("offset", "utc"),
        Clock::Utc(seconds) => el("clock")
            .attr("offset", "variable")
            .attr("adjustment", seconds)
            .attr("basis", "utc"),
        Clock::Zone(zone) => el("clock").attr("offset", "timezone").attr("timezone", zone),
    };
    let defaults: &[(&str, &str, &str)] = match machine.accelerator {
        Accelerator::Kvm => &[
            ("rtc", "tickpolicy", "catchup"),
            ("pit", "tickpolicy", "delay"),
            ("hpet", "present", "no"),
        ],
        // Without KVM's clock the guest needs the HPET to calibrate its TSC.
        Accelerator::Tcg => &[],
    };
    let named = |name: &str| machine.timers.iter().any(|timer| timer.name == name);
    let defaults = defaults.iter().filter(|(name, ..)| !named(name));
    let defaults = defaults.map(|(name, attribute, value)| el("timer").attr("name", name).attr(attribute, value));
    let clock = defaults.fold(clock, Element::with);
    machine.timers.iter().map(timer).fold(clock, Element::with)
}

fn timer(timer: &Timer) -> Element {
    let mut element = el("timer").attr("name", timer.name);
    let present = timer.present.map(|present| if present { "yes" } else { "no" });
    let attributes = [
        ("present", present),
        ("tickpolicy", timer.tick_policy.as_deref()),
        ("track", timer.track.as_deref()),
    ];
    for (name, value) in attributes {
        if let Some(value) = value {
            element = element.attr(name, value);
        }
    }
    element
}

fn devices(machine: &Machine) -> Element {
    let mut devices = el("devices");
    let mut slots = Slots::default();
    let usb_disk = machine.disks.iter().any(|disk| disk.bus == Bus::Usb);
    let usb = el("controller").attr("type", "usb").attr("index", 0);
    if usb_disk || machine.tablets.contains(&Bus::Usb) {
        devices.push(usb.attr("model", "qemu-xhci").with(slots.next()));
    } else {
        devices.push(usb.attr("model", "none"));
    }
    if machine.disks.iter().any(|disk| disk.bus == Bus::Scsi) {
        let controller = el("controller")
            .attr("type", "scsi")
            .attr("index", 0)
            .attr("model", "virtio-non-transitional");
        devices.push(controller.with(slots.next()));
    }
    for (disk, target) in machine.disks.iter().zip(disk_targets(&machine.disks)) {
        devices.push(block(disk, target, &mut slots));
    }
    for share in &machine.shares {
        devices.push(filesystem(share).with(slots.next()));
    }
    for nic in &machine.nics {
        devices.push(interface(nic).with(slots.next()));
    }
    if machine.serial_console {
        devices.push(
            el("serial")
                .attr("type", "unix")
                .with(el("source").attr("mode", "connect").attr("path", SERIAL_SOCKET))
                .with(el("target").attr("type", "isa-serial").attr("port", 0)),
        );
    }
    devices.push(el("input").attr("type", "mouse").attr("bus", "ps2"));
    for bus in &machine.tablets {
        let tablet = el("input").attr("type", "tablet");
        devices.push(match bus {
            Bus::Virtio => tablet.attr("bus", "virtio").with(slots.next()),
            _ => tablet.attr("bus", "usb"),
        });
    }
    if machine.graphics {
        devices.push(el("graphics").attr("type", "vnc").attr("socket", VNC_SOCKET));
        let model = el("model").attr("type", "vga").attr("vram", 16384).attr("heads", 1);
        devices.push(el("video").with(model).with(slots.next()));
    } else {
        devices.push(el("video").with(el("model").attr("type", "none")));
    }
    if let Some(action) = machine.watchdog {
        devices.push(
            el("watchdog")
                .attr("model", "i6300esb")
                .attr("action", action)
                .with(slots.next()),
        );
    }
    if machine.rng {
        let backend = el("backend").attr("model", "random").text("/dev/urandom");
        devices.push(
            el("rng")
                .attr("model", "virtio-non-transitional")
                .with(backend)
                .with(slots.next()),
        );
    }
    if machine.balloon {
        let balloon = el("memballoon").attr("model", "virtio-non-transitional").attr(
            "freePageReporting",
            if machine.free_page_reporting { "on" } else { "off" },
        );
        devices.push(balloon.with(slots.next()));
    } else {
        devices.push(el("memballoon").attr("model", "none"));
    }
    devices.push(el("panic").attr("model", "isa"));
    // The last: who had a slot before there were agents keeps it.
    let ports = el("controller")
        .attr("type", "virtio-serial")
        .attr("index", 0)
        .attr("model", "virtio-non-transitional");
    devices.push(ports.with(slots.next()));
    devices.push(
        el("channel")
            .attr("type", "unix")
            .with(el("source").attr("mode", "bind").attr("path", AGENT_SOCKET))
            .with(el("target").attr("type", "virtio").attr("name", AGENT_CHANNEL)),
    );
    devices
}

/// libvirt's names of disks (`vda`, `vdb` …, `sda` …), in the order of the disks.
pub fn disk_targets(disks: &[Disk]) -> Vec<String> {
    let mut letters = Letters::default();
    let target = |disk: &Disk| match disk.bus {
        Bus::Virtio => letters.next("vd"),
        Bus::Sata | Bus::Scsi | Bus::Usb => letters.next("sd"),
    };
    disks.iter().map(target).collect()
}

fn block(disk: &Disk, target: String, slots: &mut Slots) -> Element {
    let (kind, source, format) = match &disk.backend {
        Backend::Raw(path) => ("file", el("source").attr("file", path.display()), "raw"),
        Backend::Qcow2(path) => ("file", el("source").attr("file", path.display()), "qcow2"),
        Backend::Block(path) => ("block", el("source").attr("dev", path.display()), "raw"),
    };
    let device = match disk.device {
        Device::Disk => "disk",
        Device::Cdrom => "cdrom",
    };
    let bus = match disk.bus {
        Bus::Virtio => "virtio",
        Bus::Sata => "sata",
        Bus::Scsi => "scsi",
        Bus::Usb => "usb",
    };
    let mut driver = el("driver").attr("name", "qemu").attr("type", format);
    if let Some(cache) = &disk.cache {
        driver = driver.attr("cache", cache);
    }
    if let Some(io) = &disk.io {
        driver = driver.attr("io", io);
    }
    driver = driver.attr("error_policy", &disk.error_policy);
    if disk.device == Device::Disk && !disk.read_only {
        driver = driver.attr("discard", "unmap");
    }
    let mut element = el("disk").attr("type", kind).attr("device", device);
    if disk.bus == Bus::Virtio {
        element = element.attr("model", "virtio-non-transitional");
    }
    element.push(driver);
    element.push(source);
    element.push(el("target").attr("dev", target).attr("bus", bus));
    if let Some((logical, physical)) = disk.block_size {
        element.push(
            el("blockio")
                .attr("logical_block_size", logical)
                .attr("physical_block_size", physical),
        );
    }
    if disk.read_only {
        element.push(el("readonly"));
    }
    if let Some(serial) = &disk.serial {
        element.push(el("serial").text(serial));
    }
    if let Some(order) = disk.boot_order {
        element.push(el("boot").attr("order", order));
    }
    element.push(el("alias").attr("name", format!("ua-disk-{}", disk.name)));
    if disk.bus == Bus::Virtio {
        element.push(slots.next());
    }
    element
}

fn filesystem(share: &Share) -> Element {
    el("filesystem")
        .attr("type", "mount")
        .with(el("driver").attr("type", "virtiofs").attr("queue", 1024))
        .with(el("source").attr("socket", share.socket.display()))
        .with(el("target").attr("dir", &share.tag))
}

fn interface(nic: &Nic) -> Element {
    let model = if nic.model == "virtio" {
        "virtio-non-transitional"
    } else {
        &nic.model
    };
    let mut interface = el("interface")
        .attr("type", "ethernet")
        .with(el("mac").attr("address", nic.mac_text()))
        .with(el("target").attr("dev", &nic.tap).attr("managed", "no"))
        .with(el("model").attr("type", model));
    if nic.model == "virtio" {
        interface.push(el("mtu").attr("size", nic.mtu));
    }
    match nic.boot_order {
        Some(order) => interface.push(el("boot").attr("order", order)),
        // An option ROM is only good for booting, and costs memory and start time.
        None => interface.push(el("rom").attr("enabled", "no")),
    }
    interface.push(el("alias").attr("name", format!("ua-nic-{}", nic.name)));
    interface
}

/// Free slots of the root complex: 0 is the host bridge, 1 is libvirt's choice for video, 31 the chip set's.
struct Slots(u8);

impl Default for Slots {
    fn default() -> Self {
        Self(1)
    }
}

impl Slots {
    /// Device slots that a machine can use.
    const COUNT: usize = 29;

    fn next(&mut self) -> Element {
        self.0 += 1;
        el("address")
            .attr("type", "pci")
            .attr("domain", "0x0000")
            .attr("bus", "0x00")
            .attr("slot", format!("{:#04x}", self.0))
            .attr("function", "0x0")
    }
}

/// Most disks, shares and interfaces together that fit beside the fixed devices (scsi, usb, video, watchdog, rng, balloon,
/// agent).
pub const MAX_PCI_DEVICES: usize = Slots::COUNT - 7;

/// Device names in the order of disks: `vda`, `vdb` … `sda`, `sdb` …
#[derive(Default)]
struct Letters {
    virtio: u8,
    other: u8,
}

impl Letters {
    fn next(&mut self, prefix: &str) -> String {
        let counter = if prefix == "vd" {
            &mut self.virtio
        } else {
            &mut self.other
        };
        let letter = char::from(b'a' + *counter % 26);
        *counter += 1;
        format!("{prefix}{letter}")
    }
}

/// Directory in which sockets of shares lie.
pub(crate) fn share_socket(tag: &str) -> std::path::PathBuf {
    format!("{}/share-{tag}.sock", paths::RUN).into()
}
