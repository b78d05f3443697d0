//! The operator as a process in front of a real API server: leadership, readiness, metrics, and silence at rest.

#![allow(clippy::unwrap_used, reason = "a test; helpers count as production code for clippy")]

use std::{
    ffi::OsStr,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    time::Duration,
};

use k8s_openapi::api::{coordination::v1::Lease, core::v1::Namespace};
use kube::{Api, Client, api::PostParams};
use kubernest_integration::{ControlPlane, Process, free_port, install_crds, wait_until};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const LIMIT: Duration = Duration::from_secs(40);

struct Replica {
    process: Process,
    metrics: u16,
}

impl Replica {
    fn start(plane: &ControlPlane, name: &str) -> Self {
        let metrics = free_port().unwrap();
        let arguments = [
            format!("--metrics-addr=127.0.0.1:{metrics}"),
            "--launcher-image=localhost/kubernest-launcher:test".to_owned(),
            "--log-format=text".to_owned(),
        ];
        let kubeconfig = plane.kubeconfig();
        let environment = [("KUBECONFIG", kubeconfig.as_os_str()), ("POD_NAME", OsStr::new(name))];
        let program = Path::new(env!("CARGO_BIN_EXE_kubernest-operator"));
        let process = Process::start(program, arguments, &environment, &plane.directory().join(name)).unwrap();
        Self { process, metrics }
    }

    /// Body of a GET on its plain port; empty while nobody answers.
    fn get(&self, path: &str) -> String {
        let fetch = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(("127.0.0.1", self.metrics))?;
            write!(
                stream,
                "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        };
        fetch().unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.process.id()).unwrap()), signal).unwrap();
    }
}

async fn holder(client: &Client) -> String {
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kubernest-system");
    let lease = leases.get_opt("kubernest-operator").await.unwrap();
    lease
        .and_then(|lease| lease.spec)
        .and_then(|spec| spec.holder_identity)
        .unwrap_or_default()
}

async fn plane() -> (ControlPlane, Client) {
    let plane = ControlPlane::start().await.unwrap();
    let client = plane.client().await.unwrap();
    install_crds(&client).await.unwrap();
    let mut namespace = Namespace::default();
    namespace.metadata.name = Some("kubernest-system".to_owned());
    Api::all(client.clone())
        .create(&PostParams::default(), &namespace)
        .await
        .unwrap();
    (plane, client)
}

#[tokio::test]
async fn integration_operator_hands_its_lease_over_when_asked_to_stop() {
    let (plane, client) = plane().await;
    let mut first = Replica::start(&plane, "first");
    let leads = wait_until(LIMIT, || async { holder(&client).await == "first" }).await;
    assert!(leads, "{}", first.process.tail(20));
    let second = Replica::start(&plane, "second");
    let ready = wait_until(LIMIT, || async { second.get("/readyz").ends_with("ok") }).await;
    assert!(
        ready,
        "a replica that waits is ready; it said\n{}",
        second.process.tail(20)
    );
    assert_eq!(holder(&client).await, "first");
    let metrics = first.get("/metrics");
    assert!(
        metrics.contains("kubernest_reconciles_total{controller=\"tenantcluster\"} 0"),
        "{metrics}"
    );

    first.signal(Signal::SIGTERM);
    let ended = wait_until(LIMIT, || {
        let ended = first.process.ended();
        async move { ended.is_some_and(|status| status.success()) }
    });
    assert!(ended.await, "{}", first.process.tail(20));
    let taken = wait_until(Duration::from_secs(10), || async { holder(&client).await == "second" }).await;
    assert!(
        taken,
        "a released Lease is taken at the next attempt; it said\n{}",
        second.process.tail(20)
    );
}

#[tokio::test]
async fn integration_operator_exits_when_its_lease_is_taken() {
    let (plane, client) = plane().await;
    let mut replica = Replica::start(&plane, "first");
    let leads = wait_until(LIMIT, || async { holder(&client).await == "first" }).await;
    assert!(leads, "{}", replica.process.tail(20));
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kubernest-system");
    let stolen = wait_until(LIMIT, || async {
        let mut lease = leases.get("kubernest-operator").await.unwrap();
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = Some("thief".to_owned());
        }
        leases
            .replace("kubernest-operator", &PostParams::default(), &lease)
            .await
            .is_ok()
    });
    assert!(stolen.await);
    let ended = wait_until(LIMIT, || {
        let ended = replica.process.ended();
        async move { ended.is_some_and(|status| !status.success()) }
    });
    assert!(
        ended.await,
        "it must not go on without the Lease; it said\n{}",
        replica.process.tail(20)
    );
    assert_eq!(holder(&client).await, "thief");
}
