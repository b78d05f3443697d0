//! Command lines and configuration files of the programs of a node: one function a program. Knows what they listen on
//! and which files they read; writes none of these files.
//!
//! Tuned for one control plane in a VM without hardware virtualisation: polling is rare, nobody elects a leader among
//! one, and everything is ECDSA. CIS Kubernetes Benchmark numbers stand beside what they ask for.

use kubernest_bootstrap::DATA_PATH;
use kubernest_crds::TaintEffect;
use serde_json::{Value, json};

use super::{network::API_PORT, pki::FRONT_PROXY_CLIENT, policies::CIPHER_SUITES, slots::Slot};
use crate::tenantcluster::validate::{NODE_POD_PREFIX, Validated};

/// Where certificates and keys lie.
pub const PKI: &str = "/etc/kubernetes/pki";
/// Where kubeconfigs and configuration files lie.
pub const CONFIG: &str = "/etc/kubernetes";
/// containerd's socket.
const CONTAINERD: &str = "unix:///run/containerd/containerd.sock";
/// The API server's log of requests; /var/log is on the data disk.
const AUDIT_LOG: &str = "/var/log/kubernetes/audit.log";
/// DNS inside tenants.
pub const CLUSTER_DOMAIN: &str = "cluster.local";
/// Issuer of service-account tokens.
const TOKEN_ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// Path of a certificate.
pub fn crt(name: &str) -> String {
    format!("{PKI}/{name}.crt")
}

/// Path of a private key.
pub fn key(name: &str) -> String {
    format!("{PKI}/{name}.key")
}

fn flag(name: &str, value: impl std::fmt::Display) -> String {
    format!("--{name}={value}")
}

/// etcd v3.6, one member.
pub fn etcd(slot: &Slot) -> Vec<String> {
    let (name, ip) = (&slot.name, slot.ip);
    vec![
        flag("name", name),
        flag("data-dir", format!("{DATA_PATH}/etcd")),
        flag(
            "listen-client-urls",
            format!("https://127.0.0.1:2379,https://{ip}:2379"),
        ),
        flag("advertise-client-urls", format!("https://{ip}:2379")),
        flag("listen-peer-urls", format!("https://{ip}:2380")),
        flag("initial-advertise-peer-urls", format!("https://{ip}:2380")),
        flag("initial-cluster", format!("{name}=https://{ip}:2380")),
        flag("initial-cluster-state", "new"),
        // CIS 2.1, 2.2, 2.4, 2.5, 2.7: its own CA, clients and peers authenticated.
        flag("cert-file", crt("etcd-server")),
        flag("key-file", key("etcd-server")),
        flag("trusted-ca-file", crt("etcd-ca")),
        flag("client-cert-auth", true),
        flag("peer-cert-file", crt("etcd-peer")),
        flag("peer-key-file", key("etcd-peer")),
        flag("peer-trusted-ca-file", crt("etcd-ca")),
        flag("peer-client-cert-auth", true),
        flag("tls-min-version", "TLS1.2"),
        flag("heartbeat-interval", 500),
        flag("election-timeout", 5000),
        flag("log-level", "warn"),
    ]
}

/// kube-apiserver.
pub fn apiserver(valid: &Validated, slot: &Slot) -> Vec<String> {
    let mut args = vec![
        flag("advertise-address", slot.ip),
        flag("secure-port", API_PORT),
        flag("allow-privileged", true),
        flag("authorization-mode", "Node,RBAC"),
        flag("enable-admission-plugins", "NodeRestriction"),
        flag("authentication-config", format!("{CONFIG}/authentication.yaml")),
        flag("client-ca-file", crt("ca")),
        flag("tls-cert-file", crt("apiserver")),
        flag("tls-private-key-file", key("apiserver")),
        flag("etcd-servers", "https://127.0.0.1:2379"),
        flag("etcd-cafile", crt("etcd-ca")),
        flag("etcd-certfile", crt("apiserver-etcd-client")),
        flag("etcd-keyfile", key("apiserver-etcd-client")),
        flag("kubelet-certificate-authority", crt("ca")),
        flag("kubelet-client-certificate", crt("apiserver-kubelet-client")),
        flag("kubelet-client-key", key("apiserver-kubelet-client")),
        flag("kubelet-preferred-address-types", "InternalIP"),
        flag("proxy-client-cert-file", crt("front-proxy-client")),
        flag("proxy-client-key-file", key("front-proxy-client")),
        flag("requestheader-client-ca-file", crt("front-proxy-ca")),
        flag("requestheader-allowed-names", FRONT_PROXY_CLIENT),
        flag("requestheader-username-headers", "X-Remote-User"),
        flag("requestheader-group-headers", "X-Remote-Group"),
        flag("requestheader-extra-headers-prefix", "X-Remote-Extra-"),
        flag("service-account-issuer", TOKEN_ISSUER),
        flag("service-account-key-file", format!("{PKI}/sa.pub")),
        flag("service-account-signing-key-file", format!("{PKI}/sa.key")),
        flag("service-cluster-ip-range", valid.service_cidr),
        flag("encryption-provider-config", format!("{CONFIG}/encryption.yaml")),
        // CIS 1.2.16 to 1.2.19; at most 1.1 GB of the data disk.
        flag("audit-policy-file", format!("{CONFIG}/audit.yaml")),
        flag("audit-log-path", AUDIT_LOG),
        flag("audit-log-maxage", 30),
        flag("audit-log-maxbackup", 10),
        flag("audit-log-maxsize", 100),
    ];
    args.extend(hardening());
    args
}

/// kube-controller-manager. It holds no CA key: kubelets' requests are signed by the operator.
pub fn controller_manager(valid: &Validated) -> Vec<String> {
    let mut args = vec![
        flag("kubeconfig", format!("{CONFIG}/controller-manager.conf")),
        flag("bind-address", "127.0.0.1"),
        flag("tls-cert-file", crt("controller-manager-server")),
        flag("tls-private-key-file", key("controller-manager-server")),
        flag("root-ca-file", crt("ca")),
        flag("service-account-private-key-file", format!("{PKI}/sa.key")),
        flag("use-service-account-credentials", true),
        flag(
            "controllers",
            "*,-certificatesigningrequest-signing-controller,-certificatesigningrequest-approving-controller",
        ),
        flag("allocate-node-cidrs", true),
        flag("cluster-cidr", valid.pod_cidr),
        flag("node-cidr-mask-size", NODE_POD_PREFIX),
        flag("service-cluster-ip-range", valid.service_cidr),
        flag("cluster-name", &valid.name),
        flag("terminated-pod-gc-threshold", 100),
        flag("leader-elect", false),
    ];
    args.extend(hardening());
    args
}

/// kube-scheduler.
pub fn scheduler() -> Vec<String> {
    let mut args = vec![
        flag("kubeconfig", format!("{CONFIG}/scheduler.conf")),
        flag("bind-address", "127.0.0.1"),
        flag("tls-cert-file", crt("scheduler-server")),
        flag("tls-private-key-file", key("scheduler-server")),
        flag("leader-elect", false),
    ];
    args.extend(hardening());
    args
}

/// What all three have in common (CIS 1.2.15, 1.3.2, 1.4.1).
fn hardening() -> [String; 3] {
    [
        flag("profiling", false),
        flag("tls-min-version", "VersionTLS12"),
        flag("tls-cipher-suites", CIPHER_SUITES.join(",")),
    ]
}

/// kubelet; the rest is in [`kubelet_config`].
pub fn kubelet(slot: &Slot) -> Vec<String> {
    vec![
        flag("config", format!("{CONFIG}/kubelet.yaml")),
        flag("bootstrap-kubeconfig", format!("{CONFIG}/kubelet-bootstrap.conf")),
        flag("kubeconfig", "/var/lib/kubelet/kubeconfig"),
        flag("cert-dir", "/var/lib/kubelet/pki"),
        flag("hostname-override", &slot.name),
        flag("node-ip", slot.ip),
    ]
}

/// KubeletConfiguration.
pub fn kubelet_config(valid: &Validated, slot: &Slot) -> Value {
    let mut taints: Vec<Value> = Vec::new();
    if slot.is_control_plane() {
        taints.push(json!({"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}));
    }
    taints.extend(slot.taints.iter().map(|taint| {
        let effect = match taint.effect {
            TaintEffect::NoSchedule => "NoSchedule",
            TaintEffect::PreferNoSchedule => "PreferNoSchedule",
            TaintEffect::NoExecute => "NoExecute",
        };
        json!({"key": taint.key, "value": taint.value, "effect": effect})
    }));
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        // CIS 4.2.1 to 4.2.4
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true, "cacheTTL": "2m0s"},
            "x509": {"clientCAFile": crt("ca")},
        },
        "authorization": {
            "mode": "Webhook",
            "webhook": {"cacheAuthorizedTTL": "5m0s", "cacheUnauthorizedTTL": "30s"},
        },
        "readOnlyPort": 0,
        // CIS 4.2.9 to 4.2.14
        "rotateCertificates": true,
        "serverTLSBootstrap": true,
        "tlsMinVersion": "VersionTLS12",
        "tlsCipherSuites": CIPHER_SUITES,
        "podPidsLimit": 4096,
        "seccompDefault": true,
        "makeIPTablesUtilChains": true,
        "cgroupDriver": "systemd",
        "containerRuntimeEndpoint": CONTAINERD,
        "clusterDNS": [valid.service_ip(10).to_string()],
        "clusterDomain": CLUSTER_DOMAIN,
        "resolvConf": "/etc/resolv.conf",
        "registerWithTaints": taints,
        "failSwapOn": false,
        // Polling costs the guest more than it is worth; leases still tell in 40 s that a node is gone.
        "nodeStatusUpdateFrequency": "20s",
        "nodeStatusReportFrequency": "5m0s",
        "syncFrequency": "2m0s",
        "volumeStatsAggPeriod": "5m0s",
        "imageMinimumGCAge": "10m0s",
    })
}

/// kube-proxy; the rest is in [`proxy_config`].
pub fn proxy() -> Vec<String> {
    vec![flag("config", format!("{CONFIG}/kube-proxy.yaml"))]
}

/// KubeProxyConfiguration.
pub fn proxy_config(valid: &Validated, slot: &Slot) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": format!("{CONFIG}/kube-proxy.conf")},
        "hostnameOverride": slot.name,
        "clusterCIDR": valid.pod_cidr.to_string(),
        "mode": "nftables",
        "nftables": {"minSyncPeriod": "1s", "syncPeriod": "5m0s"},
        // 0: leave the guest's conntrack table as it is.
        "conntrack": {"maxPerCore": 0},
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "enableProfiling": false,
    })
}
