//! The plan as a table: what becomes what, what is refused by which name.

use rstest::rstest;
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::processors::Processors;
use crate::{Launch, ParseLaunchError, fat, plan, xml};

/// A launch document with the given spec merged over a minimal one.
fn launch(accelerator: &str, patch: Value) -> Launch {
    let mut document = json!({
        "vmi": {
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
            "metadata": { "name": "vm-a", "namespace": "org-a", "uid": "3f0d5d1e-0000-4000-8000-000000000001" },
            "spec": { "domain": { "memory": { "guest": "512Mi" }, "devices": {} } },
        },
        "accelerator": accelerator,
    });
    merge(&mut document, patch);
    Launch::parse(&document.to_string()).unwrap()
}

/// The machine of a document whose container was given these processors.
fn planned_on(launch: &Launch, allowed: &str) -> Result<Machine, plan::PlanError> {
    plan::machine(launch, &Processors::new(allowed.parse().unwrap(), |_| None))
}

fn planned(launch: &Launch) -> Result<Machine, plan::PlanError> {
    planned_on(launch, "0-7")
}

fn merge(base: &mut Value, patch: Value) {
    match (base, patch) {
        (Value::Object(base), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, patch) => *base = patch,
    }
}

/// A tenant node as the tenant half writes it.
fn node() -> Value {
    json!({
        "vmi": { "metadata": { "annotations": { "kubernest.io/emulation-kernel-args": "mitigations=off" } }, "spec": {
            "hostname": "customera-cp-0",
            "terminationGracePeriodSeconds": 60,
            "domain": {
                "cpu": { "cores": 2, "model": "host-model" },
                "memory": { "guest": "2Gi" },
                "firmware": {
                    "uuid": "53D3C7F2-c0cd-4967-9d2e-201cd208f107", "serial": "sn-1",
                    "kernelBoot": {
                        "kernelArgs": "console=ttyS0 root=LABEL=kubernest-root \"quoted\" <&>",
                        "container": { "image": "i", "kernelPath": "/boot/vmlinuz", "initrdPath": "/boot/initrd.img" },
                    },
                },
                "devices": {
                    "autoattachGraphicsDevice": false,
                    "rng": {},
                    "disks": [
                        { "name": "root", "disk": { "bus": "virtio" }, "bootOrder": 1 },
                        { "name": "data", "disk": { "bus": "virtio" }, "serial": "data", "cache": "writeback" },
                    ],
                    "filesystems": [{ "name": "bootstrap", "virtiofs": {} }],
                    "interfaces": [
                        { "name": "default", "masquerade": {} },
                        { "name": "tenant", "bridge": {}, "macAddress": "02:00:10:01:00:0a" },
                    ],
                },
            },
            "volumes": [
                { "name": "root", "containerDisk": { "image": "i", "path": "/disk/node.qcow2" } },
                { "name": "data", "persistentVolumeClaim": { "claimName": "c" } },
                { "name": "bootstrap", "secret": { "secretName": "s" } },
            ],
            "networks": [{ "name": "default", "pod": {} }, { "name": "tenant", "multus": { "networkName": "n" } }],
        } },
        "volumes": { "data": { "mode": "Filesystem", "capacity": 8u64 << 30 } },
        "interfaces": [
            { "name": "default", "kind": "masquerade", "tap": "tap0", "mac": "02:00:00:00:00:01", "mtu": 1450 },
            { "name": "tenant", "kind": "bridge", "tap": "tap1", "mac": "02:00:10:01:00:0a", "mtu": 1400 },
        ],
    })
}

/// Every device and bus that is supported.
fn everything() -> Value {
    json!({
        "vmi": { "spec": {
            "domain": {
                "cpu": { "sockets": 2, "cores": 2, "threads": 2, "model": "Haswell", "features": [{ "name": "lahf_lm" }, { "name": "mpx", "policy": "disable" }] },
                "machine": { "type": "pc-q35-7.2" },
                "firmware": { "bootloader": { "bios": { "useSerial": true } } },
                "clock": { "utc": { "offsetSeconds": 3600 }, "timer": { "hpet": { "present": true }, "rtc": { "tickPolicy": "catchup", "track": "wall" } } },
                "features": { "acpi": { "enabled": false } },
                "devices": {
                    "inputs": [{ "name": "a", "type": "tablet", "bus": "virtio" }, { "name": "b", "type": "tablet" }],
                    "watchdog": { "name": "dog", "i6300esb": { "action": "poweroff" } },
                    "disks": [
                        { "name": "boot", "disk": { "bus": "sata" }, "bootOrder": 1 },
                        { "name": "cd", "cdrom": { "bus": "sata" } },
                        { "name": "scratch", "disk": { "bus": "scsi" }, "io": "threads" },
                        { "name": "block", "disk": { "bus": "virtio", "readonly": true }, "io": "native", "cache": "none" },
                        { "name": "seed", "disk": { "bus": "virtio" } },
                        { "name": "keys", "disk": { "bus": "virtio" } },
                        { "name": "drive", "cdrom": { "bus": "usb" } },
                        { "name": "copy", "disk": { "bus": "virtio" }, "errorPolicy": "report", "blockSize": { "custom": { "logical": 512, "physical": 4096 } } },
                    ],
                    "interfaces": [{ "name": "default", "masquerade": {}, "model": "e1000", "bootOrder": 2 }],
                },
            },
            "volumes": [
                { "name": "boot", "containerDisk": { "image": "i" } },
                { "name": "cd", "containerDisk": { "image": "j", "path": "/x.iso" } },
                { "name": "scratch", "emptyDisk": { "capacity": "1G" } },
                { "name": "block", "persistentVolumeClaim": { "claimName": "c" } },
                { "name": "seed", "cloudInitNoCloud": { "userDataBase64": "I2Nsb3VkLWNvbmZpZwo=", "networkDataSecretRef": { "name": "n" } } },
                { "name": "keys", "secret": { "secretName": "s", "volumeLabel": "keys" } },
                { "name": "drive", "cloudInitConfigDrive": { "userData": "x" } },
                { "name": "copy", "ephemeral": { "persistentVolumeClaim": { "claimName": "d" } } },
            ],
        } },
        "volumes": {
            "block": { "mode": "Block", "capacity": 1u64 << 30 },
            "copy": { "mode": "Filesystem", "capacity": 1u64 << 30 },
        },
        "interfaces": [
            { "name": "default", "kind": "masquerade", "tap": "tap0", "mac": "02:00:00:00:00:01", "mtu": 1500 },
        ],
    })
}

#[rstest]
#[case::minimal_tcg("minimal_tcg", "tcg", json!({}))]
#[case::node_tcg("node_tcg", "tcg", node())]
#[case::node_kvm("node_kvm", "kvm", node())]
#[case::everything_kvm("everything_kvm", "kvm", everything())]
#[case::efi_tcg("efi_tcg", "tcg", json!({ "vmi": { "spec": { "domain": {
    "firmware": { "bootloader": { "efi": { "secureBoot": false } } } } } } }))]
fn plan_domain_xml(#[case] name: &str, #[case] accelerator: &str, #[case] patch: Value) {
    let machine = planned(&launch(accelerator, patch)).unwrap();
    insta::assert_snapshot!(name, xml::domain(&machine));
}

#[rstest]
#[case::kvm("kvm", true, "4-6", &[
    r#"<vcpu placement="static" cpuset="4-6">2</vcpu>"#, r#"<vcpupin vcpu="0" cpuset="4"/>"#, r#"<vcpupin vcpu="1" cpuset="5"/>"#,
    r#"<emulatorpin cpuset="6"/>"#, r#"<hint-dedicated state="on"/>"#, r#"sockets="1" dies="1" cores="2" threads="1""#])]
#[case::tcg("tcg", false, "4,6", &[r#"<vcpu placement="static" cpuset="4,6">2</vcpu>"#, r#"<emulatorpin cpuset="4,6"/>"#])]
fn plan_dedicated_processors(
    #[case] accelerator: &str,
    #[case] isolated: bool,
    #[case] allowed: &str,
    #[case] expected: &[&str],
) {
    let cpu = json!({ "cores": 2, "dedicatedCpuPlacement": true, "isolateEmulatorThread": isolated });
    let launch = launch(accelerator, json!({ "vmi": { "spec": { "domain": { "cpu": cpu } } } }));
    let xml = xml::domain(&planned_on(&launch, allowed).unwrap());
    for part in expected {
        assert!(xml.contains(part), "{part}\n{xml}");
    }
    // libvirt would refuse them.
    assert_eq!(xml.contains("vcpupin"), accelerator == "kvm");
}

#[test]
fn plan_sources_of_disks() {
    let machine = planned(&launch("tcg", everything())).unwrap();
    let sources: Vec<_> = machine.disks.iter().map(|disk| (&disk.name, &disk.source)).collect();
    insta::assert_debug_snapshot!("sources", sources);
}

#[test]
fn plan_claims_leave_room_for_the_file_system() {
    let machine = planned(&launch("tcg", node())).unwrap();
    let crate::machine::Source::Keep { size } = machine.disks[1].source else {
        panic!("{:?}", machine.disks[1])
    };
    let share = size as f64 / (8u64 << 30) as f64;
    assert!(share < 0.9451 && share > 0.944 && size % (1 << 20) == 0, "{size}");
}

#[rstest]
#[case(json!({ "spec": { "domain": { "memory": { "guest": "12" } } } }), "spec.domain.memory.guest: must be at least 1M")]
#[case(json!({ "spec": { "domain": { "memory": null } } }), "spec.domain.memory.guest: must be set")]
#[case(json!({ "spec": { "architecture": "arm64" } }), "spec.architecture: not supported")]
#[case(json!({ "spec": { "domain": { "machine": { "type": "pc" } } } }), "spec.domain.machine.type: not supported")]
#[case(json!({ "spec": { "hostname": "-a" } }),
    "spec.hostname: must be at most 63 lower-case letters, digits, '-' and '.'")]
#[case(json!({ "spec": { "domain": { "firmware": { "kernelBoot": { "container": { "image": "i", "kernelPath": "/../x" } } } } } }),
    "spec.domain.firmware.kernelBoot.container.kernelPath: must name a file inside the image")]
#[case(json!({ "spec": { "domain": { "firmware": { "kernelBoot": { "kernelArgs": "a\nb" } } } } }),
    "spec.domain.firmware.kernelBoot.kernelArgs: must not hold control characters")]
#[case(json!({ "metadata": { "annotations": { "kubernest.io/emulation-kernel-args": "quiet" } } }),
    "metadata.annotations[kubernest.io/emulation-kernel-args]: need a kernel")]
#[case(json!({ "spec": { "domain": { "devices": { "disks": [{ "name": "a" }] } } } }),
    "spec.domain.devices.disks[0].name 'a' not found")]
#[case(json!({ "spec": { "volumes": [{ "name": "a", "emptyDisk": { "capacity": "1Gi" } }] } }), "spec.volumes[0].name 'a' not found")]
#[case(disk(json!({ "disk": { "bus": "ide" } }), json!({ "emptyDisk": { "capacity": "1Gi" } })),
    "spec.domain.devices.disks[0].disk.bus: not supported")]
#[case(disk(json!({ "cdrom": { "bus": "virtio" } }), json!({ "emptyDisk": { "capacity": "1Gi" } })),
    "spec.domain.devices.disks[0].cdrom.bus: not supported")]
#[case(disk(json!({ "disk": {}, "cdrom": {} }), json!({ "emptyDisk": { "capacity": "1Gi" } })),
    "spec.domain.devices.disks[0]: can only have a single target type defined")]
#[case(disk(json!({ "bootOrder": 0 }), json!({ "emptyDisk": { "capacity": "1Gi" } })),
    "spec.domain.devices.disks[0].bootOrder: must be greater than 0")]
#[case(disk(json!({ "errorPolicy": "x" }), json!({ "emptyDisk": { "capacity": "1Gi" } })),
    "spec.domain.devices.disks[0].errorPolicy: not supported")]
#[case(disk(json!({ "blockSize": { "custom": { "logical": 513, "physical": 4096 } } }), json!({ "emptyDisk": { "capacity": "1Gi" } })),
    "spec.domain.devices.disks[0].blockSize.custom: must be powers of two from 512 to 2097152, logical not above physical")]
#[case(json!({ "spec": { "domain": { "firmware": { "bootloader": { "efi": {} } } } } }),
    "spec.domain.firmware.bootloader.efi.secureBoot: not supported")]
#[case(json!({ "spec": { "domain": { "firmware": { "bootloader": { "efi": { "secureBoot": false } } },
    "features": { "acpi": { "enabled": false } } } } }), "spec.domain.features.acpi.enabled: false with EFI: not supported")]
#[case(json!({ "spec": { "domain": { "cpu": { "cores": 2, "dedicatedCpuPlacement": true } } } }),
    "spec.domain.cpu.dedicatedCpuPlacement: the container may use the processors 0-7 where 2 of its own were asked for: \
     the node's kubelet gives none away; it needs the CPU manager policy static")]
#[case(json!({ "spec": { "domain": { "cpu": { "isolateEmulatorThread": true } } } }),
    "spec.domain.cpu.isolateEmulatorThread: only together with dedicatedCpuPlacement")]
#[case(json!({ "spec": { "startStrategy": "Later" } }), "spec.startStrategy: not supported")]
#[case(json!({ "spec": { "domain": { "devices": { "inputs": [{ "name": "a", "type": "keyboard" }] } } } }),
    "spec.domain.devices.inputs[0].type: not supported")]
#[case(disk(json!({}), json!({})), "spec.volumes[0]: must have exactly one source type set")]
#[case(disk(json!({}), json!({ "emptyDisk": { "capacity": "1Gi" }, "secret": {} })),
    "spec.volumes[0]: must have exactly one source type set")]
#[case(disk(json!({}), json!({ "secret": {}, "serviceAccount": {} })),
    "spec.volumes[0]: must have exactly one source type set")]
#[case(disk(json!({}), json!({ "persistentVolumeClaim": { "claimName": "c" } })), "volumes 'd' not found")]
#[case(disk(json!({}), json!({ "cloudInitNoCloud": { "userData": "a", "userDataBase64": "YQ==" } })),
    "spec.volumes[0].cloudInitNoCloud.userData: must have only one source")]
#[case(disk(json!({ "serial": "a,b=c" }), json!({ "emptyDisk": { "capacity": "1Gi" } })),
    "spec.domain.devices.disks[0].serial: must be letters, digits, '-', '_', '.', '+' and blanks")]
#[case(json!({ "spec": { "domain": { "devices": { "interfaces": [{ "name": "x", "bridge": {} }] } } } }),
    "spec.domain.devices.interfaces[0].name 'x' not found")]
fn plan_refuses_by_field(#[case] vmi: Value, #[case] message: &str) {
    let refused = planned(&launch("tcg", json!({ "vmi": vmi }))).unwrap_err();
    assert_eq!(refused.to_string(), message);
}

#[test]
fn plan_service_account_is_files_for_disk_and_share() {
    let account = json!({ "name": "d", "serviceAccount": { "serviceAccountName": "robot" } });
    let spec =
        |devices: Value| json!({ "vmi": { "spec": { "domain": { "devices": devices }, "volumes": [account] } } });
    let disks = json!({ "disks": [{ "name": "d", "disk": { "bus": "virtio" } }] });
    let disk = planned(&launch("tcg", spec(disks))).unwrap();
    let files = crate::machine::Source::Files {
        directory: "/run/volumes/d".into(),
        label: "cfgdata".into(),
    };
    assert_eq!((&disk.disks[0].source, disk.disks[0].read_only), (&files, true));
    let shared = json!({ "filesystems": [{ "name": "d", "virtiofs": {} }] });
    let shared = planned(&launch("tcg", spec(shared))).unwrap();
    assert_eq!(shared.shares[0].directory, std::path::Path::new("/run/volumes/d"));
}

/// One interface behind masquerade with these options.
fn dhcp(options: Value) -> Result<crate::machine::Dhcp, plan::PlanError> {
    let interface = json!({ "name": "default", "masquerade": {}, "dhcpOptions": options });
    let tap =
        json!({ "name": "default", "kind": "masquerade", "tap": "tap0", "mac": "02:00:00:00:00:01", "mtu": 1450 });
    let spec = json!({ "domain": { "devices": { "interfaces": [interface] } } });
    let machine = planned(&launch("tcg", json!({ "vmi": { "spec": spec }, "interfaces": [tap] })))?;
    Ok(machine.nics[0].dhcp.clone().unwrap())
}

#[test]
fn plan_dhcp_options() {
    let told = dhcp(json!({
        "bootFileName": "boot.ipxe", "tftpServerName": "192.0.2.9", "ntpServers": ["192.0.2.1", "192.0.2.2"],
        "privateOptions": [{ "option": 240, "value": "x" }, { "option": 241, "value": "" }],
    }));
    let told = told.unwrap();
    let expected = [
        (66, b"192.0.2.9".to_vec()),
        (67, b"boot.ipxe".to_vec()),
        (42, vec![192, 0, 2, 1, 192, 0, 2, 2]),
        (240, b"x".to_vec()),
    ];
    assert_eq!(told.options, expected);
    assert_eq!(told.boot_server, Some([192, 0, 2, 9].into()));
    let named = dhcp(json!({ "tftpServerName": "tftp.example" })).unwrap();
    assert_eq!(named.boot_server, None);
}

#[rstest]
#[case(json!({ "ntpServers": ["::1"] }), "ntpServers[0]: is no IPv4 address")]
#[case(json!({ "privateOptions": [{ "option": 53, "value": "x" }] }), "privateOptions[0].option: must be in range 224 to 254")]
#[case(json!({ "privateOptions": [{ "option": 240, "value": "x" }, { "option": 240, "value": "y" }] }),
    "privateOptions[1].option: is used twice")]
#[case(json!({ "bootFileName": "x".repeat(256) }), "bootFileName: must not have more than 255 bytes")]
fn plan_dhcp_options_that_cannot_be_told(#[case] options: Value, #[case] message: &str) {
    let field = "spec.domain.devices.interfaces[0].dhcpOptions";
    assert_eq!(dhcp(options).unwrap_err().to_string(), format!("{field}.{message}"));
}

#[test]
fn plan_guest_network() {
    let on = |pod: Value| {
        let mut document = node();
        document["vmi"]["spec"]["networks"][0]["pod"] = pod;
        planned(&launch("tcg", document)).map(|machine| machine.nics[0].dhcp.clone().unwrap().network.guest())
    };
    assert_eq!(on(json!({})).unwrap(), std::net::Ipv4Addr::new(10, 0, 2, 2));
    let chosen = on(json!({ "vmNetworkCIDR": "192.168.7.0/29" })).unwrap();
    assert_eq!(chosen, std::net::Ipv4Addr::new(192, 168, 7, 2));
    let refused = on(json!({ "vmNetworkCIDR": "127.0.0.0/8" })).unwrap_err().to_string();
    let field = "spec.networks[0].pod.vmNetworkCIDR";
    assert_eq!(refused, format!("{field}: is no IPv4 network that a guest can be on"));
}

#[test]
fn plan_serves_dhcp_behind_masquerade_only() {
    let machine = planned(&launch("tcg", node())).unwrap();
    let served: Vec<_> = machine.nics.iter().map(|nic| nic.dhcp.is_some()).collect();
    assert_eq!(served, [true, false]);
    let mut bridged = node();
    let interfaces = "/vmi/spec/domain/devices/interfaces/1/dhcpOptions";
    let (parent, key) = interfaces.rsplit_once('/').unwrap();
    bridged.pointer_mut(parent).unwrap()[key] = json!({ "bootFileName": "a" });
    let refused = planned(&launch("tcg", bridged)).unwrap_err();
    let message = "spec.domain.devices.interfaces[1].dhcpOptions: not supported";
    assert_eq!(refused.to_string(), message);
}

#[rstest]
#[case(json!({}), false)]
#[case(json!({ "startStrategy": "Paused" }), true)]
fn plan_start_strategy(#[case] spec: Value, #[case] paused: bool) {
    let machine = planned(&launch("tcg", json!({ "vmi": { "spec": spec } }))).unwrap();
    assert_eq!(machine.start_paused, paused);
}

#[test]
fn plan_guest_keeps_what_it_frees_where_it_is_asked_to() {
    let reports = |value: &str| {
        let annotations = json!({ "kubevirt.io/free-page-reporting-disabled": value });
        let patch = json!({ "vmi": { "metadata": { "annotations": annotations } } });
        let mut asked = node();
        merge(&mut asked, patch);
        planned(&launch("tcg", asked)).unwrap().free_page_reporting
    };
    assert_eq!((reports("true"), reports("false")), (false, true));
}

/// A spec with one disk `d` and its volume.
fn disk(mut disk: Value, mut volume: Value) -> Value {
    disk["name"] = "d".into();
    volume["name"] = "d".into();
    json!({ "spec": { "domain": { "devices": { "disks": [disk] } }, "volumes": [volume] } })
}

/// What becomes of one disk with an empty volume.
fn planned_disk(asked: Value) -> crate::machine::Disk {
    let spec = disk(asked, json!({ "emptyDisk": { "capacity": "1Gi" } }));
    planned(&launch("tcg", json!({ "vmi": spec }))).unwrap().disks.remove(0)
}

#[rstest]
#[case::virtio(json!({ "disk": { "bus": "virtio" } }), "3f0d5d1e-0000-4000-8")]
#[case::sata(json!({ "disk": {} }), "3f0d5d1e-0000-4000-8")]
#[case::usb(json!({ "disk": { "bus": "usb" } }), "3f0d5d1e-0000-4000-8")]
#[case::scsi(json!({ "disk": { "bus": "scsi" } }), "3f0d5d1e-0000-4000-8000-00000000000a")]
fn plan_serial_is_what_the_bus_shows_of_it(#[case] mut disk: Value, #[case] shown: &str) {
    disk["serial"] = "3f0d5d1e-0000-4000-8000-00000000000a-and-more".into();
    assert_eq!(planned_disk(disk).serial.as_deref(), Some(shown));
}

#[rstest]
#[case::alone(json!({ "io": "native" }), Some("none"), Some("native"))]
#[case::uncached(json!({ "io": "native", "cache": "none" }), Some("none"), Some("native"))]
#[case::cached(json!({ "io": "native", "cache": "writeback" }), Some("writeback"), Some("threads"))]
#[case::threads(json!({ "io": "threads" }), Some("unsafe"), Some("threads"))]
#[case::neither(json!({}), Some("unsafe"), None)]
fn plan_native_io_goes_past_caches(#[case] disk: Value, #[case] cache: Option<&str>, #[case] io: Option<&str>) {
    let disk = planned_disk(disk);
    assert_eq!((disk.cache.as_deref(), disk.io.as_deref()), (cache, io));
}

/// libvirt refuses `readonly` there.
#[test]
fn plan_sata_disk_is_writable() {
    let of = |disk: Value, volume: Value| {
        let mut asked = json!({ "vmi": self::disk(disk, volume) });
        asked["volumes"] = json!({ "d": { "mode": "Filesystem", "capacity": 1u64 << 30 } });
        planned(&launch("tcg", asked)).map(|machine| machine.disks[0].read_only)
    };
    let secret = json!({ "secret": { "secretName": "s" } });
    let claim = json!({ "persistentVolumeClaim": { "claimName": "c", "readOnly": true } });
    assert_eq!(of(json!({}), secret.clone()), Ok(false));
    assert_eq!(of(json!({ "cdrom": {} }), secret.clone()), Ok(true));
    assert_eq!(of(json!({ "disk": { "bus": "scsi" } }), secret), Ok(true));
    assert_eq!(of(json!({ "disk": { "bus": "virtio" } }), claim.clone()), Ok(true));
    assert_eq!(
        of(json!({}), claim).unwrap_err().to_string(),
        "spec.domain.devices.disks[0]: a SATA disk can't be read-only: choose the bus virtio, scsi or usb"
    );
}

#[test]
fn plan_cdrom_is_read_only_whatever_it_says() {
    assert!(planned_disk(json!({ "cdrom": { "readonly": false } })).read_only);
}

#[rstest]
#[case("Storage_Net-1", true)]
#[case("a.b", false)]
#[case("a'b", false)]
fn plan_interface_names(#[case] name: &str, #[case] allowed: bool) {
    let spec = json!({ "domain": { "devices": { "interfaces": [{ "name": name, "bridge": {} }] } } });
    let tap = json!({ "name": name, "kind": "bridge", "tap": "tap0", "mac": "02:00:00:00:00:01", "mtu": 1450 });
    let machine = planned(&launch("tcg", json!({ "vmi": { "spec": spec }, "interfaces": [tap] })));
    assert_eq!(machine.is_ok(), allowed, "{machine:?}");
}

#[test]
fn plan_leaves_machine_types_to_libvirt() {
    for kind in ["q35", "pc-q35-7.2", "q35-x"] {
        let spec = json!({ "spec": { "domain": { "machine": { "type": kind } } } });
        let machine = planned(&launch("tcg", json!({ "vmi": spec }))).unwrap();
        assert_eq!(machine.machine_type, kind);
    }
}

#[test]
fn plan_reads_what_text_tools_write() {
    let spec = json!({
        "domain": {
            "devices": { "disks": [{ "name": "seed" }] },
            "firmware": { "kernelBoot": { "kernelArgs": "quiet\n", "container": { "image": "i", "kernelPath": "/k" } } },
        },
        "volumes": [{ "name": "seed", "cloudInitNoCloud": { "userDataBase64": "I2Ns\nb3VkLWNvbmZpZwp=\n" } }],
    });
    let machine = planned(&launch("tcg", json!({ "vmi": { "spec": spec } }))).unwrap();
    assert_eq!(machine.kernel.unwrap().args, "quiet");
    let crate::machine::Source::CloudInit(data) = &machine.disks[0].source else {
        panic!()
    };
    let text = crate::machine::Text::Inline(b"#cloud-config\n".to_vec());
    assert_eq!(data.user_data, text);
}

#[test]
fn plan_reads_uuids_and_clocks_as_kubevirt() {
    let domain = json!({
        "firmware": { "uuid": "3F0D5D1E000040008000000000000001" },
        "clock": { "utc": { "offsetSeconds": 3 }, "timezone": "Europe/Paris" },
    });
    let machine = planned(&launch("tcg", json!({ "vmi": { "spec": { "domain": domain } } }))).unwrap();
    assert_eq!(machine.uuid.as_deref(), Some("3f0d5d1e000040008000000000000001"));
    assert_eq!(machine.clock, crate::machine::Clock::Utc(3));
}

#[test]
fn plan_refuses_fields_it_does_not_know() {
    let mut document = serde_json::to_value(launch("kvm", json!({}))).unwrap();
    merge(
        &mut document,
        json!({ "vmi": { "spec": { "domain": { "devices": { "gpus": [{ "name": "g" }] } } } } }),
    );
    let refused = Launch::parse(&document.to_string()).unwrap_err();
    assert!(
        matches!(&refused, ParseLaunchError::Unsupported(path) if path == "vmi.spec.domain.devices.gpus"),
        "{refused:?}"
    );
    let refused = Launch::parse(r#"{"vmi": {"spec": 1}}"#).unwrap_err();
    assert!(matches!(refused, ParseLaunchError::Shape(_)), "{refused:?}");
}

#[test]
fn plan_cloud_init_image_holds_what_cloud_init_reads() {
    let machine = planned(&launch("tcg", everything())).unwrap();
    let crate::machine::Source::CloudInit(data) = &machine.disks[4].source else {
        panic!()
    };
    assert_eq!(
        serde_json::to_string(&data.meta_data).unwrap(),
        r#"{"instance-id":"vm-a.org-a","local-hostname":"vm-a"}"#
    );
    assert_eq!(
        data.user_data,
        crate::machine::Text::Inline(b"#cloud-config\n".to_vec())
    );
    assert!(fat::image(fat::CLOUD_INIT_LABEL, 512, &[]).is_ok());
}
