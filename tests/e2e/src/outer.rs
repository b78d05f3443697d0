//! The outer cluster with Kubernest installed.

use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, ListParams};
use kube::{Client, ResourceExt};
use kubernest_crds::labels;
use kubernest_crds::quantity::Quantity;
use kubernest_testbed::Testbed;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::pods;

/// The outer cluster with Kubernest installed.
pub struct Outer {
    /// The bed that it runs on.
    pub bed: Testbed,
    /// A client with all rights.
    pub client: Client,
}

impl Outer {
    /// Opens the bed that `tests/tools/with-testbed` raised.
    pub async fn open() -> Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let name = std::env::var("KUBERNEST_E2E_BED").context("run this test with `make e2e`")?;
        let bed = Testbed::open(&name)?;
        let client = bed.client().await?;
        Ok(Self { bed, client })
    }

    /// Runs the real kubectl as the administrator.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        kubectl(
            self.bed.kubectl().to_str().context("path")?,
            self.bed.kubeconfig().to_str().context("path")?,
            args,
        )
    }

    /// Runs kubectl until it prints a line with this text.
    pub async fn follow(&self, args: &[&str], text: &str) -> Result<()> {
        let mut child = tokio::process::Command::new(self.bed.kubectl())
            .arg("--kubeconfig")
            .arg(self.bed.kubeconfig())
            .args(args)
            .stdout(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("its output")?).lines();
        while let Some(line) = lines.next_line().await? {
            if line.contains(text) {
                return Ok(());
            }
        }
        bail!("kubectl {} ended without {text:?}", args.join(" "))
    }

    /// The address that users reach the ingress at: any node, on the NodePort.
    pub async fn ingress_address(&self) -> Result<std::net::IpAddr> {
        let nodes = Api::<Node>::all(self.client.clone())
            .list(&ListParams::default())
            .await?;
        let addresses = nodes
            .items
            .into_iter()
            .filter_map(|node| node.status?.addresses)
            .flatten();
        let internal = addresses.into_iter().find(|address| address.type_ == "InternalIP");
        Ok(internal.context("a node with an address")?.address.parse()?)
    }

    /// Launcher pods of a virtual machine.
    pub async fn launchers(&self, namespace: &str, machine: &str) -> Result<Vec<Pod>> {
        let selector = format!(
            "{}={},{}={machine}",
            labels::LAUNCHER_APP,
            labels::LAUNCHER_APP_VALUE,
            labels::VM_NAME
        );
        let pods = Api::<Pod>::namespaced(self.client.clone(), namespace);
        Ok(pods.list(&ListParams::default().labels(&selector)).await?.items)
    }

    /// Fails when the machine's launcher pod uses more memory than it requested of its node.
    pub async fn memory_fits_its_request(&self, namespace: &str, machine: &str) -> Result<()> {
        for pod in self.launchers(namespace, machine).await? {
            let memory = pods::memory(&pod.uid().context("uid")?, None)?;
            let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
            let requests = containers.filter_map(|one| one.resources.as_ref()?.requests.as_ref()?.get("memory"));
            let mut requested = 0;
            for quantity in requests {
                requested += Quantity::from(quantity.0.as_str()).value()?;
            }
            let (used, requested) = (memory.all(), requested as f64 / f64::from(1 << 20));
            println!(
                "-- {machine}: {used:.0} MiB of {requested:.0} MiB requested: guest {:.0}, {:.1?}",
                memory.guest, memory.by_program
            );
            ensure!(used <= requested, "{machine} uses more than it requested");
        }
        Ok(())
    }

    /// Deletes the pods of a component of Kubernest without mercy, as a crash would.
    pub async fn kill_component(&self, component: &str) -> Result<()> {
        let pods = Api::<Pod>::namespaced(self.client.clone(), labels::SYSTEM_NAMESPACE);
        let selector = format!("app.kubernetes.io/component={component}");
        let found = loop {
            let found = pods.list(&ListParams::default().labels(&selector)).await?;
            if !found.items.is_empty() {
                break found;
            }
            // The successors of those that were killed a moment ago.
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        for pod in found {
            println!("-- killing {}", pod.name_any());
            pods.delete(&pod.name_any(), &DeleteParams::default().grace_period(0))
                .await
                .map(drop)
                .or_else(gone_is_fine)?;
        }
        Ok(())
    }
}

fn gone_is_fine(error: kube::Error) -> Result<(), kube::Error> {
    match error {
        kube::Error::Api(status) if status.code == 404 => Ok(()),
        other => Err(other),
    }
}

/// Runs the real kubectl.
pub fn kubectl(program: &str, kubeconfig: &str, args: &[&str]) -> Result<String> {
    let output: Output = Command::new(program)
        .args(["--kubeconfig", kubeconfig])
        .args(args)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!(
            "kubectl {}: {}{text}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(text)
}
