//! What guests boot from, and what hardware they find, with a real libvirtd, qemu and firmware.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "all of this is a test"
)]

mod support;

use rstest::rstest;
use serde_json::{Value, json};
use support::pod::{Pod, UID, boot_disk_of_claim};

/// No kernel is given: the firmware finds one on a disk. Each of them would boot.
#[rstest]
#[case::bios(false, json!([{ "name": "boot", "disk": { "bus": "virtio" } }]), "image")]
#[case::efi(true, json!([{ "name": "boot", "disk": { "bus": "virtio" } }]), "image")]
#[case::sata_by_order(false, json!([
    { "name": "boot", "disk": { "bus": "virtio" }, "bootOrder": 2 },
    { "name": "data", "disk": { "bus": "sata" }, "bootOrder": 1 },
]), "claim")]
#[case::scsi_by_order(false, json!([
    { "name": "boot", "disk": { "bus": "sata" } },
    { "name": "data", "disk": { "bus": "scsi" }, "bootOrder": 1 },
]), "claim")]
#[case::cdrom(false, json!([
    { "name": "data", "disk": { "bus": "virtio" } },
    { "name": "boot", "cdrom": { "bus": "sata" }, "bootOrder": 1 },
]), "image")]
fn launcher_boots_a_disk(#[case] efi: bool, #[case] disks: Value, #[case] from: &str) {
    let claim = disks[1].is_object().then(boot_disk_of_claim);
    let mut pod = Pod::start_on(claim.as_deref(), "", |launch| {
        let spec = &mut launch["vmi"]["spec"];
        let bootloader = if efi {
            json!({ "efi": { "secureBoot": false } })
        } else {
            json!({ "bios": {} })
        };
        spec["domain"]["firmware"] = json!({ "bootloader": bootloader });
        spec["volumes"] = json!([{ "name": "boot", "containerDisk": { "image": "i" } }]);
        if claim.is_some() {
            let claim = json!({ "name": "data", "persistentVolumeClaim": { "claimName": "c" } });
            push(&mut spec["volumes"], claim);
        }
        let devices = &mut spec["domain"]["devices"];
        *devices = json!({ "disks": disks, "interfaces": devices["interfaces"] });
    });
    let (_, said) = pod.shut_down();
    assert!(said.contains(&format!("guest: booted from {from}")), "{said}");
    assert_eq!(said.contains("guest: started by EFI"), efi, "{said}");
}

#[test]
fn launcher_gives_a_guest_the_hardware_that_it_asks_for() {
    let mut pod = Pod::start("poweroff", |launch| {
        let spec = &mut launch["vmi"]["spec"];
        let domain = &mut spec["domain"];
        let boot = &mut domain["firmware"]["kernelBoot"];
        boot["container"]["initrdPath"] = json!("/boot/initrd-disks.img");
        let arguments = &mut boot["kernelArgs"];
        *arguments = format!("{} disks=4", arguments.as_str().unwrap()).into();
        domain["firmware"]["uuid"] = json!(UID);
        domain["firmware"]["serial"] = json!("serial-of-ours");
        domain["machine"] = json!({ "type": "pc-q35-6.2" });
        domain["cpu"] = json!({ "sockets": 2, "cores": 1, "threads": 2 });
        domain["devices"]["watchdog"] = json!({ "name": "dog", "i6300esb": { "action": "poweroff" } });
        domain["devices"]["interfaces"][0]["model"] = json!("e1000");
        spec["volumes"][2]["cloudInitNoCloud"] =
            json!({ "secretRef": { "name": "user" }, "networkData": "version: 2\n" });
        for (disk, mut volume) in further_disks() {
            volume["name"] = disk["name"].clone();
            push(&mut spec["volumes"], volume);
            push(&mut spec["domain"]["devices"]["disks"], disk);
        }
        for (number, model) in ["e1000e", "rtl8139", "ne2k_pci", "pcnet"].into_iter().enumerate() {
            let (name, tap) = (format!("net{number}"), format!("tap{}", number + 1));
            let mac = format!("02:00:00:00:01:0{number}");
            let interface = json!({ "name": name, "bridge": {}, "model": model });
            push(&mut launch["vmi"]["spec"]["domain"]["devices"]["interfaces"], interface);
            let interface = json!({ "name": name, "kind": "bridge", "tap": tap, "mac": mac, "mtu": 1450 });
            push(&mut launch["interfaces"], interface);
        }
    });
    let (_, said) = pod.shut_down();
    for line in [
        "guest: pci 8086:100e", // e1000
        "guest: pci 8086:10d3", // e1000e
        "guest: pci 10ec:8139", // rtl8139
        "guest: pci 10ec:8029", // ne2k_pci
        "guest: pci 1022:2000", // pcnet
        "guest: pci 8086:25ab", // i6300esb
        "guest: pci 8086:2922", // SATA
        "guest: processors 4 cores 2 sockets 2",
        "guest: machine pc-q35-6.2 serial=serial-of-ours uuid=3f0d5d1e-0000-4000-8000-000000000001",
        "guest: random numbers of virtio_rng.0",
        "guest: disk scsi-two sectors=8192 ro=0",
        "guest: scsi-keys tls.key of-a-secret",
        "guest: vdd token of-an-account",
        "guest: vdc user-data #cloud-config of a secret",
        "guest: vdc network-config version: 2",
        "guest: scsi-drive openstack/latest/user_data #cloud-config",
        r#"guest: scsi-drive openstack/latest/network_data.json {"links":[]}"#,
        "guest: sr0 user-data #cloud-config on a CD",
    ] {
        assert!(said.contains(line), "{line}\n--- said\n{said}");
    }
    assert!(!said.contains("failed"), "{said}");
}

/// Disks beside virtio's, and what is on each.
fn further_disks() -> [(Value, Value); 7] {
    let drive = json!({ "userData": "#cloud-config", "networkDataSecretRef": { "name": "network" } });
    [
        (
            json!({ "name": "one", "serial": "one", "disk": { "bus": "sata" } }),
            json!({ "emptyDisk": { "capacity": "2Mi" } }),
        ),
        (
            json!({ "name": "two", "serial": "two", "disk": { "bus": "scsi" } }),
            json!({ "emptyDisk": { "capacity": "4Mi" } }),
        ),
        (
            json!({ "name": "config", "serial": "config", "disk": { "bus": "sata" } }),
            json!({ "configMap": { "name": "config" } }),
        ),
        (
            json!({ "name": "keys", "serial": "keys", "disk": { "bus": "scsi" } }),
            json!({ "secret": { "secretName": "keys" } }),
        ),
        (
            json!({ "name": "token", "disk": { "bus": "virtio" } }),
            json!({ "serviceAccount": { "serviceAccountName": "default" } }),
        ),
        (
            json!({ "name": "drive", "serial": "drive", "disk": { "bus": "scsi" } }),
            json!({ "cloudInitConfigDrive": drive }),
        ),
        (
            json!({ "name": "cd", "cdrom": { "bus": "scsi" } }),
            json!({ "cloudInitNoCloud": { "userData": "#cloud-config on a CD" } }),
        ),
    ]
}

fn push(list: &mut Value, value: Value) {
    list.as_array_mut().unwrap().push(value);
}
