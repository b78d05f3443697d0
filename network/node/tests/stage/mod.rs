//! A stage for the network tests: an "outside" with the nodes' network, nodes, pods and guests, each a network namespace
//! of this machine, taken down when dropped. The agent's own code runs unchanged; only who owns a VNI is told to it here.

#![allow(
    unsafe_code,
    reason = "guests open their tap as an unprivileged user in a thread, and wait for two descriptors"
)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a stage of tests")]

mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use kubernest_node::attach::{AttachError, Attacher, Owner, Owners};
use kubernest_node::netns::Netns;
use kubernest_node::overlay::{Nodes, Overlay};
use kubernest_node::records::Records;
use kubernest_node::{device, tap};
use kubernest_plan::cni::WireCall;
use kubernest_plan::{Call, LAUNCHER_UID, Vni};
use nix::libc;
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use tokio::sync::watch;

/// What must have happened by then; the kernel takes namespaces away in batches.
const PATIENCE: Duration = Duration::from_secs(60);

/// The address inside forged VXLAN packets.
pub const FORGED_SENDER: &str = "02:00:00:00:00:66";

pub struct Stage {
    id: String,
    pub nodes: Vec<Node>,
    namespaces: Vec<String>,
    api: watch::Sender<Option<BTreeSet<SocketAddrV4>>>,
    folder: tempfile::TempDir,
    pub told: Told,
}

pub struct Node {
    pub netns: String,
    pub ip: Ipv4Addr,
    pub attacher: Attacher,
    records: Records,
    pods: u8,
}

pub struct Pod {
    pub netns: String,
    pub ip: Ipv4Addr,
    node: usize,
    container: String,
}

/// A guest's network stack behind a tap; it goes with this.
pub struct Guest {
    pub netns: String,
    stop: Arc<AtomicBool>,
    shuttle: Option<JoinHandle<()>>,
}

/// Something that goes on in a namespace until this is dropped.
pub struct Running {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    child: Option<Child>,
}

/// Who holds which VNI: namespace and UID.
#[derive(Clone, Default)]
pub struct Told(Arc<Mutex<Holders>>);

#[derive(Default)]
struct Holders {
    now: BTreeMap<Vni, Owner>,
    /// True from the next question's answer on.
    soon: BTreeMap<Vni, Owner>,
}

impl Told {
    pub fn gives(&self, vni: u32, namespace: &str, uid: &str) {
        let (vni, owner) = holder(vni, namespace, uid);
        self.0.lock().unwrap().now.insert(vni, owner);
    }

    /// Gives it away right after somebody has asked whose it is.
    pub fn gives_once_asked(&self, vni: u32, namespace: &str, uid: &str) {
        let (vni, owner) = holder(vni, namespace, uid);
        self.0.lock().unwrap().soon.insert(vni, owner);
    }

    pub fn all(&self) -> BTreeMap<Vni, Owner> {
        self.0.lock().unwrap().now.clone()
    }
}

fn holder(vni: u32, namespace: &str, uid: &str) -> (Vni, Owner) {
    let (namespace, uid) = (namespace.into(), uid.into());
    (vni.try_into().unwrap(), Owner { namespace, uid })
}

impl Owners for Told {
    fn owner(&self, vni: Vni) -> BoxFuture<'_, Result<Option<Owner>, Box<dyn std::error::Error + Send + Sync>>> {
        let mut holders = self.0.lock().unwrap();
        let owner = holders.now.get(&vni).cloned();
        let soon = std::mem::take(&mut holders.soon);
        holders.now.extend(soon);
        async move { Ok(owner) }.boxed()
    }
}

pub fn l2(vni: u32, mac: &str, mtu: u32) -> Value {
    json!({"cniVersion": "1.0.0", "mode": "l2", "vni": vni, "mtu": mtu, "runtimeConfig": {"mac": mac}})
}

fn sh(command: &str) -> Result<String, String> {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{command}: {}", String::from_utf8_lossy(&output.stderr)))
    }
}

fn inside<T: Send + 'static>(netns: &str, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let file = File::open(Path::new("/run/netns").join(netns)).unwrap();
    std::thread::spawn(move || {
        setns(file, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
}

impl Stage {
    /// `id` tells stages of one test process apart.
    pub async fn new(id: &str, nodes: usize) -> Self {
        let (api, api_seen) = watch::channel(Some(BTreeSet::new()));
        let id = format!("kn{}{id}", std::process::id());
        let folder = tempfile::tempdir().unwrap();
        let mut stage = Self {
            id,
            nodes: Vec::new(),
            namespaces: Vec::new(),
            api,
            folder,
            told: Told::default(),
        };
        stage.told.gives(4097, "org-acme", "acme-uid");
        stage.told.gives(4098, "org-bmce", "bmce-uid");
        let out = stage.namespace("out");
        let on = format!("ip -n {out}");
        sh(&format!(
            "{on} link add br0 type bridge; {on} link set br0 up; {on} addr add 198.51.100.254/24 dev br0
             {on} addr add 203.0.113.5/32 dev lo; {on} addr add 169.254.169.254/32 dev lo
             ip netns exec {out} sysctl -qw net.ipv4.ip_forward=1"
        ))
        .unwrap();
        for index in 0..nodes {
            let netns = stage.namespace(&format!("n{index}"));
            let ip = Ipv4Addr::new(198, 51, 100, u8::try_from(index + 1).unwrap());
            sh(&format!(
                "{on} link add n{index} type veth peer name eth0 netns {netns}; {on} link set n{index} master br0 up
                 ip -n {netns} link set eth0 up; ip -n {netns} addr add {ip}/24 dev eth0
                 ip -n {netns} route add default via 198.51.100.254
                 {on} route add 10.244.{index}.0/24 via {ip}
                 ip netns exec {netns} sysctl -qw net.ipv4.ip_forward=1"
            ))
            .unwrap();
            let overlay = Overlay::new(Netns::open(Path::new("/run/netns").join(&netns)).unwrap());
            let records = Records::at(stage.folder.path().join(format!("records-{index}")));
            let attacher = Attacher::new(overlay, Box::new(stage.told.clone()), api_seen.clone(), records.clone());
            stage.nodes.push(Node {
                netns,
                ip,
                attacher,
                records,
                pods: 0,
            });
        }
        let all: Vec<_> = (0..nodes).collect();
        for index in 0..nodes {
            stage.set_nodes(index, &all).await;
        }
        stage
    }

    fn namespace(&mut self, name: &str) -> String {
        let netns = format!("{}{name}", self.id);
        self.namespaces.push(netns.clone());
        sh(&format!("ip netns add {netns}; ip -n {netns} link set lo up")).unwrap();
        netns
    }

    pub fn outside(&self) -> String {
        format!("{}out", self.id)
    }

    pub async fn set_nodes(&self, at: usize, present: &[usize]) {
        let all = present.iter().map(|index| self.nodes[*index].ip).collect();
        self.nodes[at]
            .attacher
            .overlay()
            .set_nodes(Nodes {
                own: self.nodes[at].ip,
                all,
            })
            .await
            .unwrap();
    }

    pub fn api(&self, addresses: &[&str]) {
        self.api
            .send_replace(Some(addresses.iter().map(|address| address.parse().unwrap()).collect()));
    }

    /// A pod with a pod network as most plugins make it: a cable to its node, which routes.
    pub fn pod(&mut self, node: usize, name: &str) -> Pod {
        let netns = self.namespace(name);
        self.nodes[node].pods += 1;
        let ip = Ipv4Addr::new(10, 244, u8::try_from(node).unwrap(), self.nodes[node].pods + 1);
        let at = &self.nodes[node].netns;
        sh(&format!(
            "ip -n {at} link add pod-{name} type veth peer name eth0 netns {netns}
             ip -n {at} link set pod-{name} up; ip -n {at} route add {ip}/32 dev pod-{name}
             ip -n {at} addr add 169.254.1.1/32 dev pod-{name}
             ip -n {netns} link set eth0 up; ip -n {netns} addr add {ip}/32 dev eth0
             ip -n {netns} route add 169.254.1.1 dev eth0; ip -n {netns} route add default via 169.254.1.1"
        ))
        .unwrap();
        Pod {
            container: netns.clone(),
            netns,
            ip,
            node,
        }
    }

    fn call(&self, command: &str, pod: &Pod, tap: &str, config: Value, namespace: &str) -> Result<Call, AttachError> {
        let args = [("K8S_POD_NAMESPACE", namespace), ("K8S_POD_NAME", "virt-launcher-a")];
        let wire = WireCall {
            command: command.into(),
            container_id: pod.container.clone(),
            netns: format!("/run/netns/{}", pod.netns),
            ifname: tap.into(),
            args: args.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            config,
        };
        Ok(Call::parse(wire)?)
    }

    pub async fn add(&self, pod: &Pod, tap: &str, config: Value, namespace: &str) -> Result<Value, AttachError> {
        let Call::Add(request) = self.call("ADD", pod, tap, config, namespace)? else {
            unreachable!()
        };
        let attacher = &self.nodes[pod.node].attacher;
        let netns = Netns::open(&request.netns)?;
        let result = attacher.add(&request, netns.clone()).await?;
        attacher.check(&request, netns).await?;
        Ok(result)
    }

    pub async fn add_l2(
        &self,
        pod: &Pod,
        tap: &str,
        vni: u32,
        mac: &str,
        namespace: &str,
    ) -> Result<Value, AttachError> {
        self.add(pod, tap, l2(vni, mac, 1450), namespace).await
    }

    pub async fn del(&self, pod: &Pod, tap: &str) -> Result<(), AttachError> {
        let Call::Del(Some(removal)) = self.call("DEL", pod, tap, Value::Null, "org-acme")? else {
            unreachable!()
        };
        let netns = removal.netns.as_deref().and_then(|path| Netns::open(path).ok());
        self.nodes[pod.node].attacher.del(&removal, netns).await
    }

    pub async fn del_without_netns(&self, pod: &Pod, tap: &str) -> Result<(), AttachError> {
        let Call::Del(Some(removal)) = self.call("DEL", pod, tap, Value::Null, "org-acme")? else {
            unreachable!()
        };
        self.nodes[pod.node].attacher.del(&removal, None).await
    }

    pub fn drop_netns(&self, netns: &str) {
        sh(&format!("ip netns del {netns}")).unwrap();
    }

    pub fn records(&self, node: usize) -> usize {
        self.nodes[node].records.list().unwrap().len()
    }

    /// Opens the pod's tap as the launcher does, as user 107 without capabilities and with a device node as the device
    /// plugin hands out, and puts a network stack behind it.
    pub fn guest(&mut self, pod: &Pod, name: &str, mac: &str, ip: Ipv4Addr) -> Guest {
        let netns = self.namespace(&format!("g{}", self.namespaces.len()));
        let folder = self.folder.path().join("devices");
        let node = device::make(&folder, "tun").unwrap();
        sh(&format!(
            "chmod 755 {} {}",
            self.folder.path().display(),
            folder.display()
        ))
        .unwrap();
        let tap = name.parse().unwrap();
        let in_pod = inside(&pod.netns, move || {
            let id = libc::c_long::from(LAUNCHER_UID);
            // SAFETY: plain system calls on this thread alone, which ends right after; the C library's own functions
            // would change all threads.
            unsafe {
                assert_eq!(libc::syscall(libc::SYS_setgroups, 0, 0), 0);
                assert_eq!(libc::syscall(libc::SYS_setresgid, id, id, id), 0);
                assert_eq!(libc::syscall(libc::SYS_setresuid, id, id, id), 0);
            }
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
            let other = tap::open(&node, &"tap77".parse().unwrap());
            assert!(other.is_err(), "the launcher's user must not make taps");
            tap::open(&node, &tap).unwrap()
        });
        let in_pod = in_pod.join().unwrap();
        let in_guest = inside(&netns, || {
            tap::open(Path::new("/dev/net/tun"), &"tap0".parse().unwrap()).unwrap()
        });
        let in_guest = in_guest.join().unwrap();
        let mtu = self.in_pod(pod, &format!("cat /sys/class/net/{name}/mtu")).unwrap();
        let router = Ipv4Addr::from(u32::from(ip) & !0xff | 1);
        sh(&format!(
            "ip -n {netns} link set tap0 address {mac} mtu {mtu}
             ip -n {netns} link set tap0 up; ip -n {netns} addr add {ip}/24 dev tap0
             ip -n {netns} route add default via {router}",
            mtu = mtu.trim()
        ))
        .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let shuttle = std::thread::spawn(move || wire::carry(in_pod, in_guest, &stopped));
        Guest {
            netns,
            stop,
            shuttle: Some(shuttle),
        }
    }

    pub fn ping(&self, from: &Guest, to: Ipv4Addr) -> bool {
        self.ping_bytes(from, to, 56)
    }

    /// Three echo requests with so many bytes each, not to be fragmented: whether one is answered.
    pub fn ping_bytes(&self, from: &Guest, to: Ipv4Addr, bytes: usize) -> bool {
        inside(&from.netns, move || {
            (1..=3).any(|sequence| wire::echo(to, sequence, bytes))
        })
        .join()
        .unwrap()
    }

    /// Serves one line that says where, to whoever connects.
    pub fn listen(&self, netns: &str, ip: Ipv4Addr, port: u16) -> Running {
        let listener = inside(netns, move || TcpListener::bind((ip, port)).unwrap())
            .join()
            .unwrap();
        listener.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((mut stream, _)) => drop(write!(stream, "listener {ip}:{port}")),
                    Err(_) => std::thread::sleep(Duration::from_millis(10)),
                }
            }
        });
        Running {
            stop,
            thread: Some(thread),
            child: None,
        }
    }

    pub fn process_in(&self, netns: &str) -> Running {
        let child = Command::new("ip")
            .args(["netns", "exec", netns, "sleep", "300"])
            .spawn()
            .unwrap();
        let (pid, netns) = (child.id(), netns.to_owned());
        self.until("the process to be in its namespace", move |_| {
            let inode = |path: &str| {
                std::fs::metadata(path)
                    .map(|meta| std::os::unix::fs::MetadataExt::ino(&meta))
                    .ok()
            };
            inode(&format!("/proc/{pid}/ns/net")) == inode(&format!("/run/netns/{netns}"))
        });
        Running {
            stop: Arc::default(),
            thread: None,
            child: Some(child),
        }
    }

    /// What answers there, once it does: a packet may be late on a busy machine.
    pub fn reaches(&self, netns: &str, ip: Ipv4Addr, port: u16) -> String {
        let started = Instant::now();
        loop {
            match self.connect(netns, ip, port) {
                Ok(text) => return text,
                Err(error) => assert!(started.elapsed() < PATIENCE, "{ip}:{port}: {error}"),
            }
        }
    }

    pub fn connect(&self, netns: &str, ip: Ipv4Addr, port: u16) -> Result<String, String> {
        let connect = move || {
            let address = SocketAddr::new(IpAddr::V4(ip), port);
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_millis(700))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut text = String::new();
            stream.read_to_string(&mut text).map(|_| text)
        };
        inside(netns, connect)
            .join()
            .unwrap()
            .map_err(|error: std::io::Error| error.to_string())
    }

    pub fn forge_vxlan(&self, netns: &str, to: Ipv4Addr, vni: u32) {
        self.forge_vxlan_from(netns, Ipv4Addr::UNSPECIFIED, to, vni);
    }

    /// A frame to all, from nobody, in VXLAN (RFC 7348, section 5).
    pub fn forge_vxlan_from(&self, netns: &str, from: Ipv4Addr, to: Ipv4Addr, vni: u32) {
        let mut packet = vec![8, 0, 0, 0];
        packet.extend((vni << 8).to_be_bytes());
        packet.extend([0xff; 6]);
        packet.extend([2, 0, 0, 0, 0, 0x66, 8, 6]);
        packet.extend([0; 46]);
        inside(netns, move || {
            let socket = UdpSocket::bind((from, 0)).unwrap();
            for _ in 0..3 {
                socket.send_to(&packet, (to, kubernest_plan::VXLAN_PORT)).unwrap();
            }
        })
        .join()
        .unwrap();
        // Packets on this machine arrive within microseconds; there is no event for one that does not.
        std::thread::sleep(Duration::from_millis(100));
    }

    pub fn in_pod(&self, pod: &Pod, command: &str) -> Result<String, String> {
        sh(&format!("ip netns exec {} {command}", pod.netns))
    }

    pub fn in_node(&self, node: usize, command: &str) -> Result<String, String> {
        sh(&format!("ip netns exec {} {command}", self.nodes[node].netns))
    }

    /// Devices of a namespace, but for the nodes' cables of pod networks.
    pub fn devices_of(&self, netns: &str) -> Vec<String> {
        let listed = sh(&format!("ip netns exec {netns} ls /sys/class/net")).unwrap();
        let mut names: Vec<_> = listed.split_whitespace().map(str::to_owned).collect();
        names.retain(|name| !name.starts_with("pod-") && name != "bonding_masters");
        names.sort();
        names
    }

    pub fn ports_of(&self, node: usize, bridge: &str) -> usize {
        let listed = self.in_node(node, &format!("ls /sys/class/net/{bridge}/brif"));
        listed.map_or(0, |listed| listed.split_whitespace().count())
    }

    pub fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !is_so(self) {
            assert!(started.elapsed() < PATIENCE, "waited for {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.shuttle.take().map(JoinHandle::join);
        let _ = sh(&format!("ip netns del {}", self.netns));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for netns in &self.namespaces {
            let _ = sh(&format!("ip netns del {netns}"));
        }
    }
}
