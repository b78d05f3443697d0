//! The configuration of every process of a bed, as text and [`Spec`]s: pure functions of the plan and of paths.
//!
//! It deliberately fits machines without a registry, with v1 or v2 cgroups and without
//! CAP_SYS_RESOURCE; whatever differs from upstream defaults says why.

use std::path::Path;

use serde_json::json;

use crate::{
    components::Components,
    plan::{Group, Plan, cgroup},
    spec::{After, Spec, Task},
    state::Dir,
};

/// containerd's socket inside a node.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
/// The image of the pause container.
pub const PAUSE_IMAGE: &str = "localhost/testbed-pause:1";
/// The image of the cluster's DNS server.
pub const COREDNS_IMAGE: &str = "localhost/testbed-coredns:1";

/// A file of a node: its path below the node's directory and its text.
pub type NodeFile = (&'static str, String);

/// The control plane's processes. They share a network namespace with nothing else, so etcd on its loopback needs no TLS.
pub fn control(plan: &Plan, dir: &Dir, components: &Components) -> Spec {
    let pki = |file: &str| dir.pki().join(file).display().to_string();
    let task = |name: &str, program: std::path::PathBuf, args: Vec<String>, after| Task {
        name: name.into(),
        argv: std::iter::once(program.display().to_string()).chain(args).collect(),
        log: dir.logs().join(format!("{name}.log")),
        after,
    };
    let api = After::Tcp((plan.control_ip(), 6443).into());
    let etcd = vec![
        "--name=testbed".into(),
        format!("--data-dir={}", dir.group(Group::Control).join("etcd").display()),
        // A bed's data may be lost with the machine's power.
        "--unsafe-no-fsync".into(),
        "--auto-compaction-retention=1h".into(),
        "--logger=zap".into(),
        "--log-level=warn".into(),
    ];
    let api_server = vec![
        format!("--advertise-address={}", plan.control_ip()),
        "--secure-port=6443".into(),
        "--etcd-servers=http://127.0.0.1:2379".into(),
        "--allow-privileged=true".into(),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        // No kube-proxy runs beside the API server: webhooks and aggregated APIs are reached at their pods' addresses.
        "--enable-aggregator-routing=true".into(),
        format!("--service-cluster-ip-range={}", plan.service_cidr()),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
        format!("--service-account-key-file={}", pki("sa.pub")),
        format!("--service-account-signing-key-file={}", pki("sa.key")),
        format!("--client-ca-file={}", pki("ca.crt")),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        format!("--kubelet-certificate-authority={}", pki("ca.crt")),
        format!("--kubelet-client-certificate={}", pki("apiserver-kubelet-client.crt")),
        format!("--kubelet-client-key={}", pki("apiserver-kubelet-client.key")),
        "--kubelet-preferred-address-types=InternalIP".into(),
        format!("--proxy-client-cert-file={}", pki("front-proxy-client.crt")),
        format!("--proxy-client-key-file={}", pki("front-proxy-client.key")),
        format!("--requestheader-client-ca-file={}", pki("front-proxy-ca.crt")),
        "--requestheader-allowed-names=front-proxy-client".into(),
        "--requestheader-username-headers=X-Remote-User".into(),
        "--requestheader-group-headers=X-Remote-Group".into(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
        format!("--audit-policy-file={}", dir.audit_policy().display()),
        format!("--audit-log-path={}", dir.audit_log().display()),
        // Tests of lost nodes shall not wait upstream's five minutes.
        "--default-not-ready-toleration-seconds=30".into(),
        "--default-unreachable-toleration-seconds=30".into(),
    ];
    let controllers = vec![
        format!("--kubeconfig={}", pki("controller-manager.kubeconfig")),
        format!("--authentication-kubeconfig={}", pki("controller-manager.kubeconfig")),
        format!("--authorization-kubeconfig={}", pki("controller-manager.kubeconfig")),
        "--bind-address=127.0.0.1".into(),
        "--leader-elect=false".into(),
        // Its metrics are read on this loopback only; else it ends when it starts before the API server's first roles.
        "--authentication-tolerate-lookup-failure=true".into(),
        "--use-service-account-credentials=true".into(),
        format!("--service-account-private-key-file={}", pki("sa.key")),
        format!("--root-ca-file={}", pki("ca.crt")),
        format!("--cluster-signing-cert-file={}", pki("ca.crt")),
        format!("--cluster-signing-key-file={}", pki("ca.key")),
        // Upstream 50 s; the kubelets renew their leases every 5 s (see `kubelet`).
        "--node-monitor-grace-period=25s".into(),
    ];
    let scheduler = vec![
        format!("--kubeconfig={}", pki("scheduler.kubeconfig")),
        format!("--authentication-kubeconfig={}", pki("scheduler.kubeconfig")),
        format!("--authorization-kubeconfig={}", pki("scheduler.kubeconfig")),
        "--bind-address=127.0.0.1".into(),
        "--leader-elect=false".into(),
    ];
    Spec {
        hostname: format!("{}-hub", plan.name()),
        bed: dir.path().into(),
        root: None,
        path: components.search_path(),
        tasks: vec![
            task("etcd", components.path("etcd", "etcd"), etcd, None),
            task(
                "kube-apiserver",
                components.kubernetes("kube-apiserver"),
                api_server,
                Some(After::Tcp(([127, 0, 0, 1], 2379).into())),
            ),
            task(
                "kube-controller-manager",
                components.kubernetes("kube-controller-manager"),
                controllers,
                Some(api.clone()),
            ),
            task(
                "kube-scheduler",
                components.kubernetes("kube-scheduler"),
                scheduler,
                Some(api),
            ),
        ],
        recycler: Some(dir.pki().join("admin.kubeconfig")),
    }
}

/// What the API server's audit log keeps: which service account wrote what, without what it wrote.
pub fn audit_policy() -> String {
    pretty(&json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            {"level": "None", "verbs": ["get", "list", "watch"]},
            {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
        ],
    }))
}

/// The processes of node `i`.
pub fn node(plan: &Plan, dir: &Dir, components: &Components, i: usize) -> Spec {
    let root = dir.group(Group::Node(i));
    let conf = |file: &str| root.join("conf").join(file).display().to_string();
    let task = |name: &str, argv: Vec<String>, after| Task {
        name: name.into(),
        argv,
        log: dir.logs().join(format!("n{i}-{name}.log")),
        after,
    };
    let program = |path: std::path::PathBuf| path.display().to_string();
    Spec {
        hostname: plan.node_name(i),
        bed: dir.path().into(),
        path: components.search_path(),
        recycler: None,
        tasks: vec![
            task(
                "containerd",
                vec![
                    program(components.path("containerd", "containerd")),
                    "--config".into(),
                    conf("containerd.toml"),
                ],
                None,
            ),
            task(
                "kubelet",
                vec![
                    program(components.kubernetes("kubelet")),
                    format!("--config={}", conf("kubelet.json")),
                    format!(
                        "--kubeconfig={}",
                        dir.pki().join(format!("kubelet-{i}.kubeconfig")).display()
                    ),
                    format!("--hostname-override={}", plan.node_name(i)),
                    format!("--node-ip={}", plan.node_ip(i)),
                ],
                Some(After::Unix(CONTAINERD_SOCKET.into())),
            ),
            task(
                "kube-proxy",
                vec![
                    program(components.kubernetes("kube-proxy")),
                    format!("--config={}", conf("kube-proxy.json")),
                ],
                Some(After::Tcp((plan.control_ip(), 6443).into())),
            ),
        ],
        root: Some(root),
    }
}

/// The files that node `i` needs, in `conf/` and in the upper layer of its /etc.
pub fn node_files(plan: &Plan, dir: &Dir, i: usize, multus_kubeconfig: String) -> Vec<NodeFile> {
    vec![
        ("conf/containerd.toml", containerd()),
        ("conf/kubelet.json", kubelet(plan, dir, i)),
        ("conf/kube-proxy.json", kube_proxy(plan, dir, i)),
        // Without a name server of its own the node asks nobody outside the bed.
        ("conf/resolv.conf", "# this bed resolves no names outside\n".into()),
        ("etc/cni/net.d/00-multus.conflist", multus(plan, i)),
        ("etc/cni/net.d/multus.d/multus.kubeconfig", multus_kubeconfig),
    ]
}

/// The cgroup below which the kubelet makes its own.
pub fn pods_cgroup(plan: &Plan, i: usize) -> String {
    format!("/{}/{}/pods", cgroup(plan.name()), Group::Node(i).dir())
}

fn containerd() -> String {
    // restrict_oom_score_adj: without CAP_SYS_RESOURCE a sandbox's -998 is refused and runc dies.
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "{CONTAINERD_SOCKET}"

[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "{PAUSE_IMAGE}"

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = "runc"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
        BinaryName = "runc"
        SystemdCgroup = false
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/opt/cni/bin"]
    conf_dir = "/etc/cni/net.d"
"#
    )
}

fn kubelet(plan: &Plan, dir: &Dir, i: usize) -> String {
    let pki = |file: String| dir.pki().join(file).display().to_string();
    let mut config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": plan.node_ip(i),
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki("ca.crt".into())},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki(format!("kubelet-serving-{i}.crt")),
        "tlsPrivateKeyFile": pki(format!("kubelet-serving-{i}.key")),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": pods_cgroup(plan, i),
        "failCgroupV1": false,
        "failSwapOn": false,
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD_SOCKET}"),
        "clusterDNS": [plan.dns_ip()],
        "clusterDomain": "cluster.local",
        "resolvConf": dir.group(Group::Node(i)).join("conf/resolv.conf"),
        "podLogsDir": "/var/log/pods",
        "healthzBindAddress": "127.0.0.1",
        "readOnlyPort": 0,
        // All nodes see the machine's whole disk and memory: evict and collect only when nothing is left.
        "evictionHard": {"memory.available": "64Mi", "nodefs.available": "512Mi", "imagefs.available": "512Mi", "nodefs.inodesFree": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        // Renewed every quarter of it: a dead node is seen within the controller manager's 25 s, at little cost.
        "nodeLeaseDurationSeconds": 20,
        "serializeImagePulls": false,
        "logging": {"verbosity": 1},
    });
    if plan.static_cpus() == Some(i) {
        config["cpuManagerPolicy"] = json!("static");
        // It keeps one whole processor for itself and for what shares processors, however little is reserved; reserved
        // whole, a machine of two would have none left that other pods' requests don't cut into.
        config["kubeReserved"] = json!({"cpu": "10m"});
    }
    pretty(&config)
}

fn kube_proxy(plan: &Plan, dir: &Dir, i: usize) -> String {
    pretty(&json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": plan.node_name(i),
        "bindAddress": plan.node_ip(i),
        "healthzBindAddress": format!("{}:10256", plan.node_ip(i)),
        "metricsBindAddress": "127.0.0.1:10249",
        "clusterCIDR": plan.cluster_cidr(),
        "detectLocalMode": "ClusterCIDR",
        "clientConnection": {"kubeconfig": dir.pki().join("kube-proxy.kubeconfig")},
        // Only the machine's own network namespace may set the table's size.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }))
}

/// Multus as the primary plugin, its delegates inline: named by file, DEL would lose their fields and pods would hang.
/// ptp routes every pod, so Services work without br_netfilter. Addresses are kept on /run, which a power-off empties.
fn multus(plan: &Plan, i: usize) -> String {
    pretty(&json!({
        "cniVersion": "1.0.0",
        "name": "multus-cni-network",
        "plugins": [{
            "type": "multus",
            "capabilities": {"portMappings": true},
            "kubeconfig": "/etc/cni/net.d/multus.d/multus.kubeconfig",
            "logLevel": "error",
            "logFile": "/var/log/multus.log",
            "delegates": [{
                "cniVersion": "1.0.0",
                "name": "testbed",
                "plugins": [
                    {
                        "type": "ptp",
                        "mtu": 1500,
                        "ipMasq": false,
                        "ipam": {
                            "type": "host-local",
                            "dataDir": "/run/cni-addresses",
                            "ranges": [[{"subnet": plan.pod_cidr(i)}]],
                            "routes": [{"dst": "0.0.0.0/0"}],
                        },
                    },
                    {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
                ],
            }],
        }],
    }))
}

/// The objects that make the API server's cluster usable, as YAML for `kubectl apply`.
pub fn manifests(plan: &Plan, dir: &Dir) -> String {
    let mut all = [
        include_str!("manifests/base.yaml"),
        include_str!("manifests/multus.yaml"),
        include_str!("manifests/coredns.yaml"),
    ]
    .join("---\n")
    .replace("${DNS_IP}", &plan.dns_ip().to_string())
    .replace("${COREDNS_IMAGE}", COREDNS_IMAGE);
    for i in 0..plan.nodes() {
        for v in 0..plan.volumes() {
            all.push_str("---\n");
            all.push_str(&volume(plan, &dir.volumes(i), i, v));
        }
    }
    all
}

/// The directory's name of volume `v`.
pub fn volume_dir(v: usize) -> String {
    format!("pv-{v:02}")
}

fn volume(plan: &Plan, volumes: &Path, i: usize, v: usize) -> String {
    let node = plan.node_name(i);
    pretty(&json!({
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": format!("{node}-{}", volume_dir(v))},
        "spec": {
            "capacity": {"storage": "16Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "local",
            "volumeMode": "Filesystem",
            "local": {"path": volumes.join(volume_dir(v))},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{
                "matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}],
            }]}},
        },
    }))
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}
