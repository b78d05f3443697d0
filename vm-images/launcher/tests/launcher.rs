//! The launcher as it runs in its container (user 107, no capabilities, own network namespace), with a real libvirtd,
//! qemu, virtiofsd and guest. Needs root and the packages that it names when one is missing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "all of this is a test"
)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kubernest_domain::{Termination, TerminationReason};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const CLAIM_BYTES: u64 = 64 << 20;
/// A guest boots in about 10 s under TCG on an idle machine.
const LIMIT: Duration = Duration::from_secs(180);

/// A folder that `tests/guest/pod` makes a pod from, and the launcher in it.
struct Pod {
    folder: tempfile::TempDir,
    unshare: Child,
}

impl Pod {
    /// Starts the launcher with a guest that does `then` once it has said what it sees.
    fn start(then: &str, patch: impl FnOnce(&mut Value)) -> Self {
        Self::start_on(None, then, patch)
    }

    /// The same with something on its claim already.
    fn start_on(claim: Option<&[u8]>, then: &str, patch: impl FnOnce(&mut Value)) -> Self {
        for (program, package) in [
            ("/usr/sbin/libvirtd", "libvirt-daemon"),
            ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
            ("/usr/bin/virsh", "libvirt-clients"),
            ("/usr/bin/qemu-img", "qemu-utils"),
            ("/usr/bin/catatonit", "catatonit"),
            ("/usr/bin/setpriv", "util-linux"),
            ("/usr/sbin/ip", "iproute2"),
        ] {
            assert!(
                Path::new(program).exists(),
                "{program} is missing: apt-get install {package}"
            );
        }
        assert!(
            nix::unistd::geteuid().is_root(),
            "making a network namespace with a tap needs root"
        );
        let guest = guest();
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        for path in [
            "kernel-boot/boot",
            "container-disks/root/disk",
            "pvcs/data",
            "volumes/bootstrap",
            "access-credentials/0",
        ] {
            fs::create_dir_all(at("run").join(path)).unwrap();
        }
        fs::copy(guest.join("vmlinuz"), at("run/kernel-boot/boot/vmlinuz")).unwrap();
        fs::copy(guest.join("initrd.img"), at("run/kernel-boot/boot/initrd.img")).unwrap();
        std::os::unix::fs::chown(at("run/pvcs/data"), Some(107), Some(107)).unwrap();
        fs::write(at("run/volumes/bootstrap/node.json"), r#"{"hello":"guest"}"#).unwrap();
        fs::write(
            at("run/access-credentials/0/ops"),
            "# ours\nssh-ed25519 AAAA ops@example\nssh-ed25519 BBBB\n",
        )
        .unwrap();
        let mut raw = File::create(at("raw")).unwrap();
        raw.write_all(b"from-the-image").unwrap();
        raw.set_len(8 << 20).unwrap();
        let convert = Command::new("qemu-img")
            .args(["convert", "-O", "qcow2"])
            .args([at("raw"), at("run/container-disks/root/disk/node.qcow2")])
            .status();
        assert!(convert.unwrap().success());
        if let Some(content) = claim {
            let mut disk = File::create(at("run/pvcs/data/disk.img")).unwrap();
            disk.write_all(content).unwrap();
            disk.set_len(CLAIM_BYTES).unwrap();
        }
        let mut launch = launch(then);
        patch(&mut launch);
        fs::write(at("launch.json"), launch.to_string()).unwrap();
        let unshare = Command::new("unshare")
            .args(["--mount", "--net", "--pid", "--fork", "--kill-child"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/pod"))
            .args([
                folder.path(),
                Path::new(env!("CARGO_BIN_EXE_kubernest-launcher")),
                &guest,
            ])
            .stdin(Stdio::null())
            .stdout(File::create(at("stdout")).unwrap())
            .stderr(File::create(at("stderr")).unwrap())
            .spawn()
            .unwrap();
        Self { folder, unshare }
    }

    fn read(&self, name: &str) -> String {
        let mut bytes = Vec::new();
        File::open(self.folder.path().join(name))
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until a condition holds; says all there is when it never does.
    fn until<T>(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> Option<T>) -> T {
        let begin = Instant::now();
        loop {
            if let Some(value) = condition(self) {
                return value;
            }
            let (stdout, stderr) = (self.read("stdout"), self.read("stderr"));
            let ended = self.unshare.try_wait().unwrap();
            let late = begin.elapsed() > LIMIT;
            // Once more after the end: the condition may have come true in between.
            if let Some(value) = (ended.is_some() || late).then(|| condition(self)).flatten() {
                return value;
            }
            assert!(
                ended.is_none() && !late,
                "no {what} ({ended:?})\n--- stdout\n{stdout}\n--- stderr\n{stderr}"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn says(&mut self, line: &str) {
        self.until(line, |pod| pod.read("stdout").contains(line).then_some(()));
    }

    /// Exit code and termination message.
    fn end(&mut self) -> (i32, Termination) {
        let status = self.until("end", |pod| pod.unshare.try_wait().unwrap());
        let message = self.read("termination");
        let termination =
            Termination::from_json(&message).unwrap_or_else(|| panic!("{message}\n{}", self.read("stderr")));
        (status.code().unwrap(), termination)
    }

    /// Termination message and console of a guest that shut itself down.
    fn shut_down(&mut self) -> (Termination, String) {
        let (code, termination) = self.end();
        let said = self.read("stdout");
        assert_eq!(
            (code, termination.reason),
            (0, TerminationReason::GuestShutdown),
            "{termination:?}\n{said}"
        );
        (termination, said)
    }

    /// The pod's first process, as the host sees it.
    fn init(&self) -> Option<Pid> {
        let unshare = self.unshare.id();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).ok()?;
        children.trim().parse().ok().map(Pid::from_raw)
    }

    /// A process of the pod by name.
    fn process(&self, name: &str) -> Pid {
        let namespace = fs::read_link(format!("/proc/{}/ns/pid", self.init().unwrap())).unwrap();
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<i32>().ok())
            .find(|pid| {
                fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|ns| ns == namespace)
                    && fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with(name))
            })
            .map(Pid::from_raw)
            .unwrap_or_else(|| panic!("no process {name}"))
    }

    /// Status line of a GET of the health server; nothing while there is none.
    fn health(&self, path: &str) -> String {
        let Some(init) = self.init() else { return String::new() };
        let ask =
            format!("exec 3<>/dev/tcp/127.0.0.1/49080; printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3; head -n 1 <&3");
        let asked = Command::new("nsenter")
            .args(["-n", "-t", &init.to_string(), "bash", "-c", &ask])
            .output();
        String::from_utf8(asked.unwrap().stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // Its namespace goes with it.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// Kernel, initrd and virtiofsd for the tests, made once.
fn guest() -> PathBuf {
    let made = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/build"))
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(made.status.success(), "tests/guest/build failed");
    PathBuf::from(String::from_utf8(made.stdout).unwrap().trim())
}

fn launch(then: &str) -> Value {
    json!({
        "vmi": {
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
            "metadata": { "name": "vm-a", "namespace": "org-a", "uid": "3f0d5d1e-0000-4000-8000-000000000001" },
            "spec": {
                "terminationGracePeriodSeconds": 60,
                "domain": {
                    "memory": { "guest": "192Mi" },
                    "firmware": { "kernelBoot": {
                        "kernelArgs": format!("console=ttyS0 quiet then={then}"),
                        "container": { "image": "i", "kernelPath": "/boot/vmlinuz", "initrdPath": "/boot/initrd.img" },
                    } },
                    "devices": {
                        "autoattachGraphicsDevice": false,
                        "rng": {},
                        "disks": [
                            { "name": "root", "disk": { "bus": "virtio" } },
                            { "name": "data", "disk": { "bus": "virtio" }, "serial": "data" },
                            { "name": "seed", "disk": { "bus": "virtio" } },
                        ],
                        "filesystems": [{ "name": "bootstrap", "virtiofs": {} }],
                        "interfaces": [{ "name": "default", "masquerade": {} }],
                    },
                },
                "volumes": [
                    { "name": "root", "containerDisk": { "image": "i" } },
                    { "name": "data", "persistentVolumeClaim": { "claimName": "c" } },
                    { "name": "seed", "cloudInitNoCloud": { "userData": "#cloud-config\n" } },
                    { "name": "bootstrap", "secret": { "secretName": "s" } },
                ],
            },
        },
        "accelerator": "tcg",
        "volumes": { "data": { "mode": "Filesystem", "capacity": CLAIM_BYTES } },
        "interfaces": [
            { "name": "default", "kind": "masquerade", "tap": "tap0", "mac": "02:00:00:00:00:01", "mtu": 1450 },
        ],
        "overheadBytes": 256u64 << 20,
    })
}

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
fn launcher_serves_efi_config_drive_ephemeral_disks_and_further_devices() {
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
    let socket = pod.folder.path().join("run/kubernest/runtime/libvirt/libvirt-sock");
    let uri = format!("qemu+unix:///session?socket={}", socket.display());
    assert!(
        Command::new("virsh")
            .args(["-q", "-c", &uri, "suspend", "org-a_vm-a"])
            .status()
            .unwrap()
            .success()
    );
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
    // The kernel's sentence, or, where a long call trace has pushed it out of the last lines, its function in the trace.
    let tells = |line: &String| line.contains("Kernel panic") || line.contains("panic+0x");
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
