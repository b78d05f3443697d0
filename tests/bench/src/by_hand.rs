//! The baseline of a tenant's start: the same node image with certificates ready, booted by qemu without Kubernest.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kube::Config;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::readyz;

/// What `vm-images/node-image/boot` needs.
pub struct ByHand {
    /// The script.
    pub boot: PathBuf,
    /// The node image's archive.
    pub image: PathBuf,
}

impl ByHand {
    /// From qemu's start until the API server of the slot in `bootstrap` is ready. `config` is the tenant's kubeconfig;
    /// `kvm` says how the tenant's own machine ran.
    pub async fn run(&self, bootstrap: &Path, mut config: Config, kvm: bool) -> Result<Duration> {
        let port = free_port()?;
        let child = Command::new(&self.boot)
            .arg("--image")
            .arg(&self.image)
            .args(["--forward", &port.to_string()])
            .args(["--accel", if kvm { "kvm" } else { "tcg" }])
            .arg(bootstrap)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", self.boot.display()))?;
        let mut group = Group(child);
        let started = qemu_started(&mut group.0).await?;
        // The certificate names the tenant's host, not this machine's loopback.
        config.tls_server_name = config.cluster_url.host().map(str::to_owned);
        config.cluster_url = format!("https://127.0.0.1:{port}").parse()?;
        let ready = tokio::select! {
            ready = readyz::wait(config) => ready?,
            ended = group.0.wait() => bail!("the boot by hand ended before its API server was ready: {}", ended?),
        };
        group.end()?;
        group.0.wait().await?;
        Ok(ready.duration_since(started))
    }
}

/// The script and all that it started; ended with it, however that comes about.
struct Group(Child);

impl Group {
    fn end(&self) -> Result<()> {
        if let Some(leader) = self.0.id() {
            killpg(Pid::from_raw(i32::try_from(leader)?), Signal::SIGTERM)?;
        }
        Ok(())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// When the script said that qemu starts. What it says later is read on, so that it never waits for us.
async fn qemu_started(child: &mut Child) -> Result<Instant> {
    let said = child.stderr.take().context("standard error")?;
    let mut lines = BufReader::new(said).lines();
    while let Some(line) = lines.next_line().await? {
        if line == "boot: qemu starts" {
            let now = Instant::now();
            tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
            return Ok(now);
        }
        eprintln!("{line}");
    }
    bail!("the boot by hand ended before qemu started")
}

fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
