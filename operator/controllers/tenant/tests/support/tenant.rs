//! A tenant's control plane without a VM: upstream's real programs, started from the bootstrap Secret as the guest
//! would, with paths below a temporary directory and ports that are free. And a stand-in for kubelets that asks for its
//! certificates as a kubelet does.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use k8s_openapi::{
    ByteString,
    api::{
        certificates::v1::CertificateSigningRequest,
        core::v1::{Node, Secret},
    },
};
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use kubernest_bootstrap::{NODE_CONFIG_KEY, NodeConfig};
use kubernest_integration::{Binaries, Process, free_port, wait_until};
use serde_json::json;
use tempfile::TempDir;

use super::PATIENCE;

/// Names of the programs, in the order of starting.
const PROGRAMS: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"];

/// Ports that a tenant will have; chosen before it exists.
pub struct Ports {
    pub api: u16,
    etcd: u16,
    peer: u16,
    controller_manager: u16,
    scheduler: u16,
}

impl Ports {
    pub fn choose() -> Self {
        let port = || free_port().unwrap();
        Ports {
            api: port(),
            etcd: port(),
            peer: port(),
            controller_manager: port(),
            scheduler: port(),
        }
    }

    pub fn endpoint(&self) -> String {
        format!("https://127.0.0.1:{}", self.api)
    }

    fn rewrite(&self, text: &str, root: &Path) -> String {
        let root = root.display().to_string();
        text.replace(":6443", &format!(":{}", self.api))
            .replace("--secure-port=6443", &format!("--secure-port={}", self.api))
            .replace(":2379", &format!(":{}", self.etcd))
            .replace(":2380", &format!(":{}", self.peer))
            .replace("/etc/kubernetes", &format!("{root}/etc/kubernetes"))
            .replace("/var/lib/kubernest", &format!("{root}/data"))
            .replace("/var/log", &format!("{root}/log"))
    }
}

/// Running programs of a slot.
pub struct Programs {
    pub directory: TempDir,
    pub running: BTreeMap<&'static str, Process>,
}

impl Programs {
    /// Writes the Secret's files and starts the first `count` programs.
    pub fn start(secret: &Secret, ports: &Ports, version: &str, count: usize) -> Self {
        let directory = tempfile::Builder::new().prefix("kubernest-tenant-").tempdir().unwrap();
        let root = directory.path();
        let data = secret.data.as_ref().unwrap();
        let config = NodeConfig::parse(&data[NODE_CONFIG_KEY].0).unwrap();
        for file in &config.files {
            let path = root.join(file.path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = String::from_utf8(data[&file.key].0.clone()).unwrap();
            fs::write(path, ports.rewrite(&text, root)).unwrap();
        }
        let mut programs = Programs {
            directory,
            running: BTreeMap::new(),
        };
        for name in PROGRAMS.into_iter().take(count) {
            programs.run(name, ports, version);
        }
        programs
    }

    /// Starts one program with the flags that its unit has.
    pub fn run(&mut self, name: &'static str, ports: &Ports, version: &str) {
        let root = self.directory.path();
        let text = fs::read_to_string(root.join("etc/kubernest/env").join(name)).unwrap();
        let args = text.trim().strip_prefix("ARGS=\"").unwrap().strip_suffix('"').unwrap();
        let mut args: Vec<String> = args.split_whitespace().map(str::to_owned).collect();
        match name {
            "kube-controller-manager" => args.push(format!("--secure-port={}", ports.controller_manager)),
            "kube-scheduler" => args.push(format!("--secure-port={}", ports.scheduler)),
            _ => {}
        }
        let process = Process::start(&binary(name, version), args, &[], &root.join(format!("{name}.log"))).unwrap();
        self.running.insert(name, process);
    }

    /// Fails with a program's last words if it ended.
    pub fn assert_running(&mut self) {
        for (name, process) in &mut self.running {
            if let Some(status) = process.ended() {
                panic!("{name} ended with {status}:\n{}", process.tail(30));
            }
        }
    }
}

fn binary(name: &str, version: &str) -> PathBuf {
    let binaries = Binaries::locate();
    match name {
        "etcd" => binaries.etcd().unwrap(),
        // The locator knows one version; another lies beside it.
        name => {
            let usual = binaries.kubernetes(name).unwrap();
            let components = usual.ancestors().nth(3).unwrap();
            components.join(format!("kubernetes-{version}/bin")).join(name)
        }
    }
}

/// A client from a kubeconfig's text, whatever server it names, at `endpoint`.
pub async fn client(kubeconfig: &str, endpoint: &str) -> Client {
    let file = Kubeconfig::from_yaml(kubeconfig).unwrap();
    let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .unwrap();
    config.cluster_url = endpoint.parse().unwrap();
    Client::try_from(config).unwrap()
}

/// A client with a certificate of its own.
pub async fn client_with(ca: &[u8], certificate: &str, key: &str, endpoint: &str) -> Client {
    let encode = |bytes: &[u8]| json!(ByteString(bytes.to_vec()));
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": endpoint, "certificate-authority-data": encode(ca)}}],
        "users": [{"name": "x", "user": {
            "client-certificate-data": encode(certificate.as_bytes()), "client-key-data": encode(key.as_bytes()),
        }}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    });
    client(&kubeconfig.to_string(), endpoint).await
}

/// Asks for a certificate as `node` and waits for it; `None` when it is denied.
pub async fn request_certificate(client: &Client, name: &str, node: &str, sans: &[&str]) -> Option<(String, String)> {
    let key = rcgen::KeyPair::generate().unwrap();
    let names: Vec<String> = sans.iter().map(|name| (*name).to_owned()).collect();
    let mut params = rcgen::CertificateParams::new(names).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::OrganizationName, "system:nodes");
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, format!("system:node:{node}"));
    let pem = params.serialize_request(&key).unwrap().pem().unwrap();
    let (signer, usage) = match sans {
        [] => ("kubernetes.io/kube-apiserver-client-kubelet", "client auth"),
        _ => ("kubernetes.io/kubelet-serving", "server auth"),
    };
    let request: CertificateSigningRequest = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {"signerName": signer, "usages": ["digital signature", usage], "request": ByteString(pem.into())},
    }))
    .unwrap();
    let api = Api::<CertificateSigningRequest>::all(client.clone());
    let created = wait_until(PATIENCE, || async {
        api.create(&PostParams::default(), &request).await.is_ok()
    });
    assert!(
        created.await,
        "the request can't be made: {:?}",
        api.create(&PostParams::default(), &request).await
    );
    let status = || async { api.get(name).await.unwrap().status.unwrap_or_default() };
    let answered = wait_until(PATIENCE, || async {
        let status = status().await;
        status.certificate.is_some()
            || status
                .conditions
                .iter()
                .flatten()
                .any(|condition| condition.type_ == "Denied")
    });
    assert!(answered.await, "nobody answered {name}: {:?}", status().await);
    let certificate = status().await.certificate?;
    Some((String::from_utf8(certificate.0).unwrap(), key.serialize_pem()))
}

/// Registers a node as its kubelet does, with the kubelet's own credential, and says that it is Ready.
pub async fn register(client: &Client, name: &str) {
    let node: Node = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
    }))
    .unwrap();
    let api = Api::<Node>::all(client.clone());
    api.create(&PostParams::default(), &node).await.unwrap();
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    let status = json!({"status": {"conditions": [{
        "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready status",
        "lastHeartbeatTime": now, "lastTransitionTime": now,
    }]}});
    api.patch_status(name, &PatchParams::default(), &Patch::Strategic(status))
        .await
        .unwrap();
}

/// Time that programs get to show that they stay up.
pub const SETTLE: Duration = Duration::from_secs(5);
