//! etcd and kube-apiserver as processes, with certificates made on the spot.

use std::{
    ffi::OsStr,
    fs, io,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use kubernest_pki::{CaMaterial, EmbeddedIssuer, KeyMaterial, Leaf, San, issue};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    binaries::{Binaries, BinaryError},
    process::{Process, ProcessError, free_port, wait_until},
};

/// How long the API server may take until it is ready (2.6 s alone, more while others build).
const READY: Duration = Duration::from_secs(90);

/// Why there is no control plane.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An upstream binary is not built.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// Files or ports could not be had.
    #[error("preparing files and ports failed")]
    Prepare(#[from] io::Error),
    /// No CA.
    #[error("making a CA failed")]
    Ca(#[from] kubernest_pki::EmbeddedError),
    /// No certificate.
    #[error("issuing a certificate failed")]
    Issue(#[from] kubernest_pki::IssueError),
    /// A process did not start.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The kubeconfig just written is no good.
    #[error("reading the kubeconfig failed")]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    /// No client from it.
    #[error("making a client failed")]
    Client(#[source] Box<kube::Error>),
    /// The API server did not get ready.
    #[error("the API server is not ready after {READY:?}; it said last:\n{0}")]
    NotReady(String),
}

/// A running etcd and kube-apiserver. They end when it is dropped.
#[derive(Debug)]
pub struct ControlPlane {
    // Dropped in this order: the API server before the etcd that it talks to.
    api_server: Process,
    _etcd: Process,
    directory: TempDir,
    binaries: Binaries,
    port: u16,
}

impl ControlPlane {
    /// Starts both and waits until the API server is ready.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start() -> Result<Self, StartError> {
        // A process has one default provider; whoever sets it first wins, and all set this one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let binaries = Binaries::locate();
        let directory = tempfile::Builder::new().prefix("kubernest-integration-").tempdir()?;
        let path = |name: &str| directory.path().join(name);
        let (client_port, peer_port, port) = (free_port()?, free_port()?, free_port()?);
        write_pki(directory.path(), port).await?;

        let etcd_url = format!("http://127.0.0.1:{client_port}");
        let peer_url = format!("http://127.0.0.1:{peer_port}");
        let etcd = Process::start(
            &binaries.etcd()?,
            [
                "--data-dir".as_ref(),
                path("etcd").as_os_str(),
                "--listen-client-urls".as_ref(),
                etcd_url.as_ref(),
                "--advertise-client-urls".as_ref(),
                etcd_url.as_ref(),
                "--listen-peer-urls".as_ref(),
                peer_url.as_ref(),
                "--initial-advertise-peer-urls".as_ref(),
                peer_url.as_ref(),
                "--initial-cluster".as_ref(),
                format!("default={peer_url}").as_ref(),
                "--unsafe-no-fsync".as_ref(),
            ] as [&OsStr; 13],
            &[],
            &path("etcd.log"),
        )?;
        let file = |flag: &str, name: &str| format!("--{flag}={}", path(name).display());
        let api_server = Process::start(
            &binaries.kubernetes("kube-apiserver")?,
            [
                format!("--etcd-servers={etcd_url}"),
                "--bind-address=127.0.0.1".to_owned(),
                "--advertise-address=127.0.0.1".to_owned(),
                format!("--secure-port={port}"),
                file("cert-dir", "apiserver"),
                file("tls-cert-file", "apiserver.crt"),
                file("tls-private-key-file", "apiserver.key"),
                file("client-ca-file", "ca.crt"),
                file("service-account-key-file", "sa.pub"),
                file("service-account-signing-key-file", "sa.key"),
                // The aggregation layer, as kubeadm sets it up.
                file("proxy-client-cert-file", "front-proxy-client.crt"),
                file("proxy-client-key-file", "front-proxy-client.key"),
                file("requestheader-client-ca-file", "front-proxy-ca.crt"),
                "--requestheader-allowed-names=front-proxy-client".to_owned(),
                "--requestheader-username-headers=X-Remote-User".to_owned(),
                "--requestheader-group-headers=X-Remote-Group".to_owned(),
                "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
                "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
                "--service-cluster-ip-range=10.0.0.0/24".to_owned(),
                "--authorization-mode=RBAC".to_owned(),
            ],
            &[],
            &path("apiserver.log"),
        )?;
        let plane = Self {
            api_server,
            _etcd: etcd,
            directory,
            binaries,
            port,
        };
        plane.wait_until_ready().await?;
        Ok(plane)
    }

    async fn wait_until_ready(&self) -> Result<(), StartError> {
        let client = self.client().await?;
        let ready = wait_until(READY, || async {
            let Ok(request) = http::Request::get("/readyz").body(Vec::new()) else {
                return false;
            };
            matches!(client.request_text(request).await, Ok(text) if text == "ok")
        });
        if ready.await {
            Ok(())
        } else {
            Err(StartError::NotReady(self.api_server.tail(20)))
        }
    }

    /// A client of an administrator (group system:masters).
    ///
    /// # Errors
    /// [`StartError::Kubeconfig`] or [`StartError::Client`].
    pub async fn client(&self) -> Result<Client, StartError> {
        let kubeconfig = Kubeconfig::read_from(self.kubeconfig())?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        Client::try_from(config).map_err(|error| StartError::Client(Box::new(error)))
    }

    /// The administrator's kubeconfig file.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    /// URL of the API server.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// The CA of the front proxy, for tests that forge.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn front_proxy_ca(&self) -> Result<CaMaterial, StartError> {
        let read = |name: &str| fs::read_to_string(self.directory.path().join(name));
        Ok(CaMaterial {
            certificate_pem: read("front-proxy-ca.crt")?,
            key_pem: read("front-proxy-ca.key")?,
        })
    }

    /// A directory that is removed with the control plane, for logs and the like.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Runs kubectl as the administrator.
    ///
    /// # Errors
    /// When kubectl is not built or cannot be started; its own failure is in the output.
    pub fn kubectl<Arg: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = Arg>) -> Result<Output, StartError> {
        let kubectl = self.binaries.kubernetes("kubectl")?;
        let output = Command::new(&kubectl)
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(arguments)
            .output();
        output.map_err(|source| {
            ProcessError {
                program: kubectl,
                source,
            }
            .into()
        })
    }
}

/// Writes CA, API server certificate, service-account keys and the administrator's kubeconfig.
async fn write_pki(directory: &Path, port: u16) -> Result<(), StartError> {
    let material = CaMaterial::generate("kubernest-integration")?;
    let ca = EmbeddedIssuer::new(&material)?;
    let names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "localhost",
    ];
    let mut sans: Vec<San> = names.into_iter().map(|name| San::Dns(name.to_owned())).collect();
    sans.extend([Ipv4Addr::LOCALHOST, Ipv4Addr::new(10, 0, 0, 1)].map(|address| San::Ip(address.into())));
    let serving = issue(&ca, &Leaf::server("kube-apiserver", sans)).await?;
    let admin = issue(&ca, &Leaf::client("kubernetes-admin", Some("system:masters"))).await?;
    let tokens = KeyMaterial::generate()?;
    let proxy_material = CaMaterial::generate("kubernest-integration-front-proxy")?;
    let proxy_ca = EmbeddedIssuer::new(&proxy_material)?;
    let proxy = issue(&proxy_ca, &Leaf::client("front-proxy-client", None)).await?;
    for (name, content) in [
        ("ca.crt", &material.certificate_pem),
        ("apiserver.crt", &serving.chain_pem),
        ("apiserver.key", &serving.key_pem),
        ("sa.pub", &tokens.public_pem),
        ("sa.key", &tokens.private_pem),
        ("front-proxy-ca.crt", &proxy_material.certificate_pem),
        ("front-proxy-ca.key", &proxy_material.key_pem),
        ("front-proxy-client.crt", &proxy.chain_pem),
        ("front-proxy-client.key", &proxy.key_pem),
        ("admin.crt", &admin.chain_pem),
        ("admin.key", &admin.key_pem),
    ] {
        write_private(&directory.join(name), content)?;
    }
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "admin",
        "clusters": [{"name": "test", "cluster": {
            "server": format!("https://127.0.0.1:{port}"), "certificate-authority": directory.join("ca.crt"),
        }}],
        "users": [{"name": "admin", "user": {
            "client-certificate": directory.join("admin.crt"), "client-key": directory.join("admin.key"),
        }}],
        "contexts": [{"name": "admin", "context": {"cluster": "test", "user": "admin", "namespace": "default"}}],
    });
    Ok(write_private(&directory.join("kubeconfig"), &kubeconfig.to_string())?)
}

fn write_private(path: &Path, content: &str) -> io::Result<()> {
    fs::write(path, content)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
}
