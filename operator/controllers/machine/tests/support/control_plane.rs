//! A real etcd and kube-apiserver of its own on loopback, and nothing else of a cluster: no scheduler, no controllers.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::PostParams;
use kube::client::ClientBuilder;
use kube::runtime::wait::{await_condition, conditions::is_crd_established};
use kube::{Api, Client, Config};

use super::gate::Gate;

const TOKEN: &str = "stories";

/// Both processes; killed when dropped.
pub struct ControlPlane {
    config: Config,
    _processes: Vec<Process>,
    state: tempfile::TempDir,
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl ControlPlane {
    /// Starts it and installs the CRDs.
    pub async fn start() -> Self {
        let state = tempfile::tempdir().unwrap();
        let (client_port, peer_port, api_port) = (free_port(), free_port(), free_port());
        let etcd = spawn(
            state.path(),
            "etcd",
            "etcd",
            &[
                format!("--data-dir={}/etcd", state.path().display()),
                format!("--listen-client-urls=http://127.0.0.1:{client_port}"),
                format!("--advertise-client-urls=http://127.0.0.1:{client_port}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer_port}"),
                format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer_port}"),
                format!("--initial-cluster=default=http://127.0.0.1:{peer_port}"),
                "--unsafe-no-fsync".to_owned(),
            ],
        );
        let key = state.path().join("service-accounts.key");
        let public_key = state.path().join("service-accounts.pub");
        let pair = rcgen::KeyPair::generate().unwrap();
        std::fs::write(&key, pair.serialize_pem()).unwrap();
        std::fs::write(&public_key, pair.public_key_pem()).unwrap();
        let tokens = state.path().join("tokens.csv");
        std::fs::write(&tokens, format!("{TOKEN},stories,1,system:masters\n")).unwrap();
        let api = spawn(
            state.path(),
            "kubernetes-v1.35.4",
            "kube-apiserver",
            &[
                format!("--etcd-servers=http://127.0.0.1:{client_port}"),
                "--bind-address=127.0.0.1".to_owned(),
                "--advertise-address=127.0.0.1".to_owned(),
                format!("--secure-port={api_port}"),
                format!("--cert-dir={}/certificates", state.path().display()),
                "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
                "--service-account-issuer=https://stories".to_owned(),
                format!("--service-account-key-file={}", public_key.display()),
                format!("--service-account-signing-key-file={}", key.display()),
                format!("--token-auth-file={}", tokens.display()),
                "--authorization-mode=AlwaysAllow".to_owned(),
                "--disable-admission-plugins=ServiceAccount,PersistentVolumeClaimResize".to_owned(),
                "--endpoint-reconciler-type=none".to_owned(),
            ],
        );
        let mut config = Config::new(format!("https://127.0.0.1:{api_port}").parse().unwrap());
        config.accept_invalid_certs = true;
        config.auth_info.token = Some(TOKEN.to_owned().into());
        let plane = Self {
            config,
            _processes: vec![api, etcd],
            state,
        };
        plane.wait_until_ready().await;
        plane.install_crds().await;
        plane
    }

    /// A client of the tests' own.
    pub fn client(&self) -> Client {
        Client::try_from(self.config.clone()).unwrap()
    }

    /// A client whose writes go through the gate.
    pub fn gated(&self, gate: &Gate) -> Client {
        ClientBuilder::try_from(self.config.clone())
            .unwrap()
            .with_layer(gate)
            .build()
    }

    async fn wait_until_ready(&self) {
        let client = self.client();
        let mut last = String::new();
        for _ in 0..600 {
            let request = http::Request::get("/readyz").body(Vec::new()).unwrap();
            match client.request_text(request).await {
                Ok(_) => return,
                Err(error) => last = format!("{error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let log = std::fs::read_to_string(self.state.path().join("kube-apiserver.log")).unwrap_or_default();
        let tail = log.lines().rev().take(20).collect::<Vec<_>>().join("\n");
        panic!("the API server did not become ready within a minute: {last}\n{tail}");
    }

    async fn install_crds(&self) {
        let api: Api<CustomResourceDefinition> = Api::all(self.client());
        for (stem, crd) in kubernest_crds::all_crds() {
            if stem.starts_with("kubevirt.io") {
                let created = api.create(&PostParams::default(), &crd).await.unwrap();
                let name = created.metadata.name.unwrap();
                await_condition(api.clone(), &name, is_crd_established()).await.unwrap();
            }
        }
    }
}

fn spawn(state: &Path, component: &str, name: &str, arguments: &[String]) -> Process {
    let log = std::fs::File::create(state.join(format!("{name}.log"))).unwrap();
    let binary = components().join(component).join("bin").join(name);
    let child = Command::new(&binary)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}; `vm-images/components/build` makes it", binary.display()));
    Process(child)
}

/// Where `vm-images/components/build` puts what it builds.
fn components() -> PathBuf {
    let cache = std::env::var_os("KUBERNEST_CACHE").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/kubernest");
    cache.unwrap_or_else(home).join("components")
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
