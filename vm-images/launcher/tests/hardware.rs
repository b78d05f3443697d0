//! What guests boot from, with a real libvirtd, qemu and firmware.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "all of this is a test"
)]

mod support;

use rstest::rstest;
use serde_json::{Value, json};
use support::pod::{Pod, boot_disk_of_claim};

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
#[case::efi_cdrom(true, json!([
    { "name": "data", "disk": { "bus": "virtio" } },
    { "name": "boot", "cdrom": { "bus": "sata" }, "bootOrder": 1 },
]), "image")]
fn launcher_boots_a_disk(#[case] efi: bool, #[case] disks: Value, #[case] from: &str) {
    let mut pod = Pod::start_on(Some(&boot_disk_of_claim()), "", |launch| {
        let spec = &mut launch["vmi"]["spec"];
        let bootloader = if efi {
            json!({ "efi": { "secureBoot": false } })
        } else {
            json!({ "bios": {} })
        };
        spec["domain"]["firmware"] = json!({ "bootloader": bootloader });
        spec["volumes"] = json!([{ "name": "boot", "containerDisk": { "image": "i" } }]);
        if disks[1].is_object() {
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

fn push(list: &mut Value, value: Value) {
    list.as_array_mut().unwrap().push(value);
}
