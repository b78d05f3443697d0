//! A pod without Kubernetes around a launcher and its guest.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kubernest_domain::paths::CONTROL_PORT;
use kubernest_domain::{Termination, TerminationReason, probe};
use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::client::{Authority, Client, Identity};

/// The instance's.
pub const UID: &str = "3f0d5d1e-0000-4000-8000-000000000001";
/// What the claim of the machine has.
pub const CLAIM_BYTES: u64 = 64 << 20;
/// A guest boots in about 10 s under TCG on an idle machine.
pub const LIMIT: Duration = Duration::from_secs(180);

/// What its pod mounts of ConfigMaps, Secrets and the account.
const MOUNTED: [(&str, &str); 7] = [
    ("volumes/bootstrap/node.json", r#"{"hello":"guest"}"#),
    ("volumes/config/app.conf", "on"),
    ("volumes/keys/tls.key", "of-a-secret"),
    ("volumes/token/token", "of-an-account"),
    ("cloud-init/seed/user/userdata", "#cloud-config of a secret"),
    ("cloud-init/drive/network/networkdata", r#"{"links":[]}"#),
    (
        "access-credentials/0/ops",
        "# ours\nssh-ed25519 AAAA ops@example\nssh-ed25519 BBBB\n",
    ),
];

/// A folder that `tests/guest/pod` makes a pod from, and the launcher in it.
pub struct Pod {
    pub folder: tempfile::TempDir,
    pub unshare: Child,
}

impl Pod {
    /// Starts the launcher with a guest that does `then` once it has said what it sees.
    pub fn start(then: &str, patch: impl FnOnce(&mut Value)) -> Self {
        Self::start_on(None, then, patch)
    }

    /// The same with something on its claim already.
    pub fn start_on(claim: Option<&[u8]>, then: &str, patch: impl FnOnce(&mut Value)) -> Self {
        Self::start_with(claim, None, then, patch)
    }

    /// The same on these of the node's processors only, as taskset(1) writes them.
    pub fn start_with(
        claim: Option<&[u8]>,
        processors: Option<&str>,
        then: &str,
        patch: impl FnOnce(&mut Value),
    ) -> Self {
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
        for path in ["kernel-boot/boot", "container-disks/root/disk", "pvcs/data"] {
            fs::create_dir_all(at("run").join(path)).unwrap();
        }
        for (path, content) in MOUNTED {
            let path = at("run").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        fs::copy(guest.join("vmlinuz"), at("run/kernel-boot/boot/vmlinuz")).unwrap();
        for initrd in ["initrd.img", "initrd-agent.img", "initrd-disks.img"] {
            fs::copy(guest.join(initrd), at("run/kernel-boot/boot").join(initrd)).unwrap();
        }
        std::os::unix::fs::chown(at("run/pvcs/data"), Some(107), Some(107)).unwrap();
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
            std::os::unix::fs::fchown(&disk, Some(107), Some(107)).unwrap();
            disk.write_all(content).unwrap();
            disk.set_len(CLAIM_BYTES).unwrap();
        }
        let mut launch = launch(then);
        patch(&mut launch);
        fs::write(at("launch.json"), launch.to_string()).unwrap();
        // Each program becomes the next one.
        let mut command = Command::new(if processors.is_some() { "taskset" } else { "unshare" });
        if let Some(processors) = processors {
            command.args(["--cpu-list", processors, "unshare"]);
        }
        let unshare = command
            .args(["--mount", "--net", "--pid", "--fork", "--kill-child"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/pod"))
            .args([
                folder.path(),
                Path::new(env!("CARGO_BIN_EXE_kubernest-launcher")),
                &guest,
            ])
            .arg(gateway(&launch))
            .args(taps(&launch))
            .stdin(Stdio::null())
            .stdout(File::create(at("stdout")).unwrap())
            .stderr(File::create(at("stderr")).unwrap())
            .spawn()
            .unwrap();
        Self { folder, unshare }
    }

    pub fn read(&self, name: &str) -> String {
        let mut bytes = Vec::new();
        File::open(self.folder.path().join(name))
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until a condition holds; says all there is when it never does.
    pub fn until<T>(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> Option<T>) -> T {
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

    pub fn says(&mut self, line: &str) {
        self.until(line, |pod| pod.read("stdout").contains(line).then_some(()));
    }

    /// Exit code and termination message.
    pub fn end(&mut self) -> (i32, Termination) {
        let status = self.until("end", |pod| pod.unshare.try_wait().unwrap());
        let message = self.read("termination");
        let termination =
            Termination::from_json(&message).unwrap_or_else(|| panic!("{message}\n{}", self.read("stderr")));
        (status.code().unwrap(), termination)
    }

    /// Termination message and console of a guest that shut itself down.
    pub fn shut_down(&mut self) -> (Termination, String) {
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
    pub fn init(&self) -> Option<Pid> {
        let unshare = self.unshare.id();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).ok()?;
        children.trim().parse().ok().map(Pid::from_raw)
    }

    /// A process of the pod by name.
    pub fn process(&self, name: &str) -> Pid {
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
    pub fn health(&self, path: &str) -> String {
        let answer = self.ask(path);
        answer.lines().next().unwrap_or_default().to_owned()
    }

    /// Answer to a GET of the health server; nothing while there is none.
    pub fn ask(&self, path: &str) -> String {
        let Some(init) = self.init() else { return String::new() };
        let ask = format!("exec 3<>/dev/tcp/127.0.0.1/49080; printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3");
        let asked = Command::new("nsenter")
            .args(["-n", "-t", &init.to_string(), "bash", "-c", &ask])
            .output();
        String::from_utf8(asked.unwrap().stdout).unwrap().trim().to_owned()
    }

    /// What a probe through the guest agent comes to: exit code and output of what the kubelet runs in the pod.
    pub fn probe(&self, arguments: &[&str]) -> (i32, String) {
        let user = ["setpriv", "--reuid", "107", "--regid", "107", "--clear-groups"];
        let asked = Command::new("nsenter")
            .args(["-m", "-n", "-p", "-t", &self.init().unwrap().to_string()])
            .args(user)
            .args(["/run/launcher", probe::SUBCOMMAND])
            .args(arguments)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&asked.stdout).trim_end().to_owned();
        (asked.status.code().unwrap(), said)
    }

    /// A client of its control port.
    pub fn client(&self, authority: &Authority, identity: Option<&Identity>) -> Client {
        let namespace = format!("/proc/{}/ns/net", self.init().unwrap());
        authority.client(identity, UID, move || {
            // A socket stays in the namespace that its thread was in.
            let namespace = File::open(&namespace)?;
            let dial = move || {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                TcpStream::connect(("127.0.0.1", CONTROL_PORT))
            };
            std::thread::spawn(dial).join().unwrap()
        })
    }

    /// What libvirt says of the domain.
    pub fn virsh(&self, command: &[&str]) -> String {
        let socket = self.folder.path().join("run/kubernest/runtime/libvirt/libvirt-sock");
        let uri = format!("qemu+unix:///session?socket={}", socket.display());
        let said = Command::new("virsh")
            .args(["-q", "-c", &uri])
            .args(command)
            .arg("org-a_vm-a")
            .output()
            .unwrap();
        assert!(said.status.success(), "{said:?}");
        String::from_utf8(said.stdout).unwrap().trim().to_owned()
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

/// The tap's address and prefix length, as the CNI plugin gives it.
fn gateway(launch: &Value) -> String {
    let chosen = launch.pointer("/vmi/spec/networks/0/pod/vmNetworkCIDR");
    let network = chosen.and_then(Value::as_str).unwrap_or("10.0.2.0/24");
    let (address, prefix) = network.split_once('/').unwrap();
    let address: Ipv4Addr = address.parse().unwrap();
    format!("{}/{prefix}", Ipv4Addr::from_bits(address.to_bits() + 1))
}

fn taps(launch: &Value) -> Vec<&str> {
    let interfaces = launch["interfaces"].as_array().unwrap();
    interfaces.iter().map(|one| one["tap"].as_str().unwrap()).collect()
}

/// The disk of the container disk `boot`, but that its guest says to be booted from the claim.
pub fn boot_disk_of_claim() -> Vec<u8> {
    const IMAGE: &[u8] = b"from=image";
    let mut disk = fs::read(guest().join("boot.img")).unwrap();
    let windows = disk.windows(IMAGE.len()).enumerate();
    let places: Vec<_> = windows
        .filter_map(|(place, bytes)| (bytes == IMAGE).then_some(place))
        .collect();
    // What BIOS reads, and what EFI does.
    assert_eq!(places.len(), 2);
    for place in places {
        disk[place..place + IMAGE.len()].copy_from_slice(b"from=claim");
    }
    disk
}

fn launch(then: &str) -> Value {
    json!({
        "vmi": {
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
            "metadata": { "name": "vm-a", "namespace": "org-a", "uid": UID },
            "spec": {
                "terminationGracePeriodSeconds": 60,
                "domain": {
                    "memory": { "guest": "192Mi" },
                    "firmware": { "kernelBoot": {
                        "kernelArgs": format!("console=ttyS0 quiet no_timer_check then={then}"),
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
    })
}
