//! The launcher as it runs in its container (user 107, no capabilities, own network namespace), with a real libvirtd,
//! qemu, virtiofsd and guest. Needs root and the packages that it names when one is missing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "all of this is a test"
)]

mod support;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use kubernest_domain::TerminationReason;
use kubernest_domain::processors::CpuSet;
use nix::sys::signal::{Signal, kill};
use rstest::rstest;
use serde_json::json;
use support::pod::{CLAIM_BYTES, Pod};

#[test]
fn launcher_runs_a_guest_to_its_end() {
    let mut pod = Pod::start("poweroff", |_| {});
    let (termination, said) = pod.shut_down();
    for line in [
        "guest: vda starts from-the-image",
        "ro=0 serial=data",
        r#"guest: vdc meta-data {"instance-id":"vm-a.org-a","local-hostname":"vm-a"}"#,
        "guest: vdc user-data #cloud-config",
        r#"guest: share says {"hello":"guest"}"#,
        "guest: dhcp ip=10.0.2.2 mask=24 router=10.0.2.1 dns=10.96.0.10 hostname=vm-a mtu=1450 search=org-a.svc.cluster.local cluster.local",
        "guest: gateway answers",
    ] {
        assert!(said.contains(line), "{line}\n--- said\n{said}");
    }
    assert!(
        !said.contains("share is writable") && !said.contains("failed"),
        "{said}"
    );
    assert!(
        termination.serial.iter().any(|line| line.contains("guest: ready")),
        "{termination:?}"
    );
    let claim = pod.folder.path().join("run/pvcs/data/disk.img");
    let mut kept = [0; 16];
    File::open(&claim).unwrap().read_exact(&mut kept).unwrap();
    assert_eq!(&kept, b"written-by-guest");
    let size = claim.metadata().unwrap().len();
    assert!(size < CLAIM_BYTES && size > CLAIM_BYTES * 9 / 10, "{size}");
}

#[test]
fn launcher_serves_efi_config_drive_ephemeral_disks_dhcp_options_and_further_devices() {
    let firmware = Path::new(kubernest_domain::paths::EFI_CODE);
    assert!(
        firmware.exists(),
        "{} is missing: apt-get install ovmf",
        firmware.display()
    );
    let mut pod = Pod::start_on(Some(b"from-the-claim"), "poweroff", |launch| {
        let spec = &mut launch["vmi"]["spec"];
        spec["domain"]["firmware"]["bootloader"] = json!({ "efi": { "secureBoot": false } });
        spec["accessCredentials"] = json!([{ "sshPublicKey": {
            "source": { "secret": { "secretName": "keys" } }, "propagationMethod": { "configDrive": {} },
        } }]);
        spec["domain"]["cpu"] = json!({ "features": [{ "name": "aes", "policy": "require" }] });
        spec["domain"]["clock"] =
            json!({ "utc": {}, "timer": { "hpet": { "present": true }, "rtc": { "tickPolicy": "catchup" } } });
        spec["domain"]["devices"]["inputs"] = json!([
            { "name": "a", "type": "tablet", "bus": "virtio" },
            { "name": "b", "type": "tablet", "bus": "usb" },
        ]);
        spec["networks"] = json!([{ "name": "default", "pod": { "vmNetworkCIDR": "192.168.7.0/29" } }]);
        spec["domain"]["devices"]["interfaces"][0]["dhcpOptions"] = json!({
            "bootFileName": "boot.ipxe", "tftpServerName": "192.0.2.9", "ntpServers": ["192.0.2.1", "192.0.2.2"],
            "privateOptions": [{ "option": 240, "value": "ours" }],
        });
        let disks = &mut spec["domain"]["devices"]["disks"];
        disks[0]["blockSize"] = json!({ "custom": { "logical": 512, "physical": 4096 } });
        disks[1]["errorPolicy"] = json!("report");
        let disks = disks.as_array_mut().unwrap();
        disks.push(json!({ "name": "stick", "disk": { "bus": "usb" } }));
        spec["volumes"][1] = json!({ "name": "data", "ephemeral": { "persistentVolumeClaim": { "claimName": "c" } } });
        spec["volumes"][2] = json!({ "name": "seed", "cloudInitConfigDrive": { "userData": "#cloud-config\n" } });
        let volumes = spec["volumes"].as_array_mut().unwrap();
        volumes.push(json!({ "name": "stick", "emptyDisk": { "capacity": "1Mi" } }));
    });
    let (_, said) = pod.shut_down();
    for line in [
        "guest: started by EFI",
        "guest: cpu has aes",
        "guest: usb controller",
        "guest: disk vda blocks=512/4096",
        "guest: vdb starts from-the-claim",
        r#"guest: vdc openstack/latest/meta_data.json {"hostname":"vm-a""#,
        r#""public_keys":{"0":"ssh-ed25519 AAAA ops@example","1":"ssh-ed25519 BBBB"}"#,
        "guest: vdc openstack/latest/user_data #cloud-config",
        "guest: dhcp ip=192.168.7.2 mask=29 router=192.168.7.1",
        "guest: gateway answers",
        "guest: dhcp options bootfile=boot.ipxe tftp=192.0.2.9 next=192.0.2.9 ntp=192.0.2.1 192.0.2.2 240=6f757273",
    ] {
        assert!(said.contains(line), "{line}\n--- said\n{said}");
    }
    let mut kept = [0; 16];
    let claim = pod.folder.path().join("run/pvcs/data/disk.img");
    File::open(claim).unwrap().read_exact(&mut kept).unwrap();
    assert_eq!(&kept, b"from-the-claim\0\0", "an ephemeral disk wrote to its claim");
}

#[test]
fn launcher_is_ready_then_stops_as_asked() {
    let mut pod = Pod::start("wait", |_| {});
    pod.says("guest: up");
    assert!(pod.health("/livez").contains("200"), "{}", pod.health("/livez"));
    assert!(pod.health("/readyz").contains("200"), "{}", pod.health("/readyz"));
    let metrics = pod.ask("/metrics");
    let figure = |series: &str| -> f64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix(series));
        line.unwrap_or_else(|| panic!("no {series} in\n{metrics}"))
            .trim()
            .parse()
            .unwrap()
    };
    let machine = r#"namespace="org-a",name="vm-a""#;
    assert!(figure(&format!("kubevirt_vmi_cpu_usage_seconds_total{{{machine}}}")) > 0.0);
    assert!(figure(&format!("kubevirt_vmi_memory_resident_bytes{{{machine}}}")) > 1e6);
    assert!(
        figure(&format!(
            r#"kubevirt_vmi_storage_read_traffic_bytes_total{{{machine},drive="root"}}"#
        )) > 0.0
    );
    figure(&format!(
        r#"kubevirt_vmi_network_transmit_packets_total{{{machine},interface="default"}}"#
    ));
    pod.says("guest: ready");
    kill(pod.init().unwrap(), Signal::SIGTERM).unwrap();
    let (code, termination) = pod.end();
    assert_eq!(
        (code, termination.reason),
        (0, TerminationReason::Stopped),
        "{termination:?}"
    );
    assert!(termination.message.contains("as asked"), "{termination:?}");
    assert!(pod.read("stdout").contains("guest: button"), "{}", pod.read("stdout"));
}

#[test]
fn launcher_ends_a_guest_that_does_not_listen() {
    let mut pod = Pod::start("wait", |launch| {
        launch["vmi"]["spec"]["terminationGracePeriodSeconds"] = 1.into();
    });
    // Before its kernel listens to the power button.
    pod.until("readiness", |pod| pod.health("/readyz").contains("200").then_some(()));
    kill(pod.init().unwrap(), Signal::SIGTERM).unwrap();
    let (code, termination) = pod.end();
    assert_eq!(
        (code, termination.reason),
        (0, TerminationReason::Stopped),
        "{termination:?}"
    );
    assert!(termination.message.contains("did not shut down"), "{termination:?}");
}

#[test]
fn launcher_tells_that_qemu_died() {
    let mut pod = Pod::start("wait", |_| {});
    pod.says("guest: up");
    kill(pod.process("qemu-system"), Signal::SIGKILL).unwrap();
    let (code, termination) = pod.end();
    assert_eq!(
        (code, termination.reason),
        (1, TerminationReason::GuestCrashed),
        "{termination:?}"
    );
    assert!(
        termination.message.starts_with("qemu ended unexpectedly"),
        "{termination:?}"
    );
    assert!(
        termination.serial.iter().any(|line| line == "guest: up"),
        "{termination:?}"
    );
}

#[test]
fn launcher_tells_that_the_guest_stands_still() {
    let mut pod = Pod::start("wait", |_| {});
    pod.says("guest: up");
    // As qemu does it itself when KVM or a disk fails under it.
    pod.virsh(&["suspend"]);
    let (code, termination) = pod.end();
    assert_eq!(
        (code, termination.reason),
        (2, TerminationReason::GuestPaused),
        "{termination:?}"
    );
    assert!(
        termination.message.starts_with("qemu paused the guest"),
        "{termination:?}"
    );
}

#[test]
fn launcher_tells_that_the_guest_panicked() {
    let mut pod = Pod::start("panic", |_| {});
    let (code, termination) = pod.end();
    assert_eq!(
        (code, termination.reason),
        (1, TerminationReason::GuestCrashed),
        "{termination:?}"
    );
    assert!(
        termination.message.starts_with("the guest's kernel panicked"),
        "{termination:?}"
    );
    // The kernel's sentence, or, where a long call trace has pushed it out of the last lines, a function in the trace: of the
    // panic, or of what led to it.
    let marks = ["Kernel panic", "panic+0x", "sysrq_handle_crash+0x"];
    let tells = |line: &String| marks.iter().any(|mark| line.contains(mark));
    assert!(termination.serial.iter().any(tells), "{termination:?}");
}

#[test]
fn launcher_names_what_it_can_not_do() {
    let mut pod = Pod::start("wait", |launch| {
        launch["vmi"]["spec"]["domain"]["devices"]["disks"][0]["disk"]["bus"] = "ide".into();
    });
    let (code, termination) = pod.end();
    assert_eq!(
        (code, termination.reason),
        (3, TerminationReason::LaunchFailed),
        "{termination:?}"
    );
    assert_eq!(
        termination.message,
        "spec.domain.devices.disks[0].disk.bus: not supported"
    );
    let mut pod = Pod::start("wait", |launch| {
        launch["vmi"]["spec"]["domain"]["cpu"] = json!({ "model": "NoSuchProcessor" });
    });
    let (code, termination) = pod.end();
    assert_eq!(
        (code, termination.reason),
        (3, TerminationReason::LaunchFailed),
        "{termination:?}"
    );
    assert!(termination.message.contains("NoSuchProcessor"), "{termination:?}");
}

/// What each thread of a process may run on, by the thread's name.
fn bound(process: nix::unistd::Pid) -> Vec<(String, String)> {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let thread = |entry: std::io::Result<std::fs::DirEntry>| {
        let read = |file| std::fs::read_to_string(entry.as_ref().unwrap().path().join(file)).ok();
        let status = read("status")?;
        let allowed = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some((read("comm")?.trim().to_owned(), allowed.trim().to_owned()))
    };
    threads.filter_map(thread).collect()
}

/// The first two processors that this test may use.
fn two() -> [String; 2] {
    let (_, allowed) = bound(nix::unistd::Pid::this()).swap_remove(0);
    let allowed: Vec<u32> = allowed.parse::<CpuSet>().unwrap().iter().collect();
    assert!(allowed.len() >= 2, "this test needs two processors");
    [allowed[0].to_string(), allowed[1].to_string()]
}

#[rstest]
#[case::one_each(2, false)]
#[case::emulator_apart(1, true)]
fn launcher_runs_a_guest_on_processors_of_its_own(#[case] cores: usize, #[case] isolated: bool) {
    let [first, second] = two();
    let mut pod = Pod::start_with(None, Some(&format!("{first},{second}")), "wait", |launch| {
        launch["vmi"]["spec"]["domain"]["cpu"] =
            json!({ "cores": cores, "dedicatedCpuPlacement": true, "isolateEmulatorThread": isolated });
    });
    pod.until("ready", |pod| pod.health("/readyz").contains("200").then_some(()));
    let both: CpuSet = format!("{first},{second}").parse().unwrap();
    let others = if isolated { second.clone() } else { both.to_string() };
    let threads = bound(pod.process("qemu-system"));
    let guests: Vec<_> = threads.iter().filter(|(name, _)| name.starts_with("CPU ")).collect();
    assert_eq!(guests.len(), cores, "{threads:?}");
    for (name, allowed) in &threads {
        let expected = match name.as_str() {
            "CPU 0/TCG" => &first,
            "CPU 1/TCG" => &second,
            _ => &others,
        };
        assert_eq!(allowed, expected, "{name} of {threads:?}");
    }
    for helper in ["libvirtd", "launcher"] {
        let threads = bound(pod.process(helper));
        assert!(
            threads.iter().all(|(_, allowed)| *allowed == others),
            "{helper}: {threads:?}"
        );
    }
    // The guest has been given what it asked for.
    assert!(pod.virsh(&["dominfo"]).contains(&format!("CPU(s):         {cores}")));
}

#[test]
fn launcher_runs_nothing_on_shared_processors() {
    let [first, second] = two();
    let mut pod = Pod::start_with(None, Some(&format!("{first},{second}")), "wait", |launch| {
        launch["vmi"]["spec"]["domain"]["cpu"] = json!({ "dedicatedCpuPlacement": true });
    });
    let (code, termination) = pod.end();
    assert_eq!((code, termination.reason), (3, TerminationReason::LaunchFailed));
    let why = "spec.domain.cpu.dedicatedCpuPlacement: the container may use the processors";
    assert!(termination.message.starts_with(why), "{}", termination.message);
    assert!(
        !pod.folder.path().join("run/kubernest/runtime").exists(),
        "libvirtd was started"
    );
}
