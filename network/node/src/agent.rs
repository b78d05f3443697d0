//! The agent's start and its standing tasks, put together. Decides nothing that the other modules decide.
//!
//! Order: plugin binary and CNI server first, so that pods can be deleted at once; then devices; the Node is marked as
//! schedulable last, when a machine that comes here would find everything.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args as ClapArgs, ValueEnum};
use futures::FutureExt as _;
use kubernest_plan::Vni;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::accelerator::{self, Accelerator};
use crate::attach::{Attacher, Owner};
use crate::device::{self, Plugin};
use crate::metrics::{self, Metrics};
use crate::netns::Netns;
use crate::outer::{self, Allocations, Mark};
use crate::overlay::{Nodes, Overlay};
use crate::records::Records;
use crate::{install, kubelet, server};

/// How often networks that nobody uses are looked for, beside every DEL: a pod's devices also go without one when its
/// node was cut off or the runtime lost it.
const COLLECT_EVERY: Duration = Duration::from_secs(60);
/// How often a kubelet that does not tell what it has is asked: one that has just started is not asked for long, one that
/// keeps its files elsewhere never answers.
const ASK_AGAIN: Duration = Duration::from_secs(15);
/// After a failure that only time or others can mend.
const AGAIN: Duration = Duration::from_secs(5);

/// Whether machines here are to be emulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Emulation {
    /// If the accelerator probe fails.
    Auto,
    /// Always; KVM is not even tried.
    Always,
    /// Never: without KVM the node takes no machines.
    Never,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// Flags of the agent.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Name of the Node that this is (from the downward API).
    #[arg(long, env = "KUBERNEST_NODE_NAME")]
    node_name: String,
    /// The node's folder of CNI plugins.
    #[arg(long, env = "KUBERNEST_CNI_BIN_DIR", default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,
    /// The CNI plugin to install there.
    #[arg(long, env = "KUBERNEST_CNI_PLUGIN", default_value = "/usr/local/bin/kubernest-cni")]
    cni_plugin: PathBuf,
    /// Where the CNI plugin finds the agent. Its folder also holds device nodes and notes, and must have the same path on
    /// the node and here.
    #[arg(long, env = "KUBERNEST_SOCKET", default_value = "/run/kubernest/cni.sock")]
    socket: PathBuf,
    /// The kubelet's folder of device plugins.
    #[arg(long, env = "KUBERNEST_DEVICE_PLUGIN_DIR", default_value = device::FOLDER)]
    device_plugin_dir: PathBuf,
    /// The kubelet's socket that tells whether it gives processors to one container alone.
    #[arg(long, env = "KUBERNEST_POD_RESOURCES_SOCKET", default_value = kubelet::SOCKET)]
    pod_resources_socket: PathBuf,
    /// Whether machines on this node are emulated.
    #[arg(long, env = "KUBERNEST_EMULATION", default_value = "auto")]
    emulation: Emulation,
    /// Where health and metrics are served.
    #[arg(long, env = "KUBERNEST_METRICS_ADDR", default_value = "0.0.0.0:9479")]
    metrics_addr: SocketAddr,
    /// Format of the logs on standard error.
    #[arg(long, env = "KUBERNEST_LOG_FORMAT", default_value = "json")]
    log_format: LogFormat,
}

/// Runs the agent until one of its tasks ends, which none should.
///
/// # Errors
/// What failed; the kubelet then starts the agent anew, and pods keep their networks meanwhile.
pub async fn run(args: Args) -> anyhow::Result<()> {
    log(args.log_format);
    // The process has one TLS provider; a second one set by a library would be the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let run_dir = args.socket.parent().context("--socket needs a folder")?.to_owned();
    let (accelerator, reason) = choose(args.emulation).await?;
    tracing::info!(
        node = args.node_name,
        accelerator = accelerator.as_str(),
        reason,
        "accelerator"
    );
    let client = kube::Client::try_default().await.context("find the outer API server")?;
    let metrics = Arc::new(Metrics::default());
    metrics.kvm(accelerator == Accelerator::Kvm);

    let (nodes_to, nodes) = watch::channel(None);
    let (api_to, api) = watch::channel(None);
    let overlay = Overlay::new(Netns::current()?);
    for vni in overlay.collect().await? {
        tracing::info!(vni = vni.get(), "took away a tenant network that no pod uses");
    }
    let records = Records::at(run_dir.join("attachments"));
    let attacher = Arc::new(Attacher::new(
        overlay,
        Box::new(Allocations(client.clone())),
        api.clone(),
        records,
    ));

    let mut tasks = JoinSet::<anyhow::Result<()>>::new();
    let listener = server::listen(&args.socket)?;
    install::install(&args.cni_plugin, &args.cni_bin_dir)?;
    {
        let (attacher, metrics) = (attacher.clone(), metrics.clone());
        tasks.spawn(async move { Ok(server::serve(listener, attacher, metrics).await?) });
    }
    {
        let (attacher, metrics) = (attacher.clone(), metrics.clone());
        tasks.spawn(async move {
            metrics::serve(args.metrics_addr, metrics, attacher)
                .await
                .context("serve metrics")
        });
    }
    let (follower, node) = (client.clone(), args.node_name.clone());
    tasks.spawn(outer::follow_nodes(follower, node, nodes_to).map(Ok));
    let follower = client.clone();
    tasks.spawn(outer::follow_api(follower, api_to).map(Ok));
    let (holders_to, holders) = watch::channel(None);
    tasks.spawn(outer::follow_holders(client.clone(), holders_to).map(Ok));
    tasks.spawn(keep_strangers_out(attacher.clone(), holders));
    tasks.spawn(keep_overlay(attacher.clone(), nodes, metrics));
    tasks.spawn(keep_api_out(attacher.clone(), api));

    let plugins = plugins(&run_dir, accelerator)?;
    let (registered_to, registered) = mpsc::channel(16);
    let kinds = plugins.len();
    for plugin in plugins {
        let (folder, registered_to) = (args.device_plugin_dir.clone(), registered_to.clone());
        tasks.spawn(async move {
            // A full channel already says what is to be said.
            let registered = || {
                let _ = registered_to.try_send(plugin.resource);
            };
            Ok(plugin.run(&folder, registered).await?)
        });
    }
    let marker = Marker {
        client,
        node: args.node_name,
        kubelet: args.pod_resources_socket,
        mark: Mark {
            accelerator,
            reason,
            processors: false,
        },
        silent: false,
    };
    tasks.spawn(marker.run(registered, kinds, registered_to, attacher));

    match tasks.join_next().await {
        Some(ended) => ended
            .context("a task of the agent broke")?
            .and_then(|()| anyhow::bail!("a task of the agent ended")),
        None => Ok(()),
    }
}

fn log(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Json => builder.json().flatten_event(true).init(),
        LogFormat::Text => builder.init(),
    }
}

async fn choose(emulation: Emulation) -> anyhow::Result<(Accelerator, String)> {
    if emulation == Emulation::Always {
        return Ok((Accelerator::Tcg, "--emulation=always".into()));
    }
    let agent = std::env::current_exe().context("find the agent's own program")?;
    let (accelerator, reason) = accelerator::probe(&agent, accelerator::LIMIT).await;
    if emulation == Emulation::Never && accelerator == Accelerator::Tcg {
        anyhow::bail!("KVM does not work here ({reason}): repair it, or allow emulation with --emulation=auto");
    }
    Ok((accelerator, reason))
}

fn plugins(run_dir: &std::path::Path, accelerator: Accelerator) -> anyhow::Result<Vec<Plugin>> {
    let folder = run_dir.join("devices");
    let host_path = device::make(&folder, "tun")?;
    let mut plugins = vec![Plugin {
        resource: device::TUN,
        container_path: "/dev/net/tun",
        host_path,
    }];
    if accelerator == Accelerator::Kvm {
        let host_path = device::make(&folder, "kvm")?;
        plugins.push(Plugin {
            resource: device::KVM,
            container_path: "/dev/kvm",
            host_path,
        });
    }
    Ok(plugins)
}

/// Keeps the overlay as the cluster's nodes want it, and free of networks that nobody uses.
async fn keep_overlay(
    attacher: Arc<Attacher>,
    mut nodes: watch::Receiver<Option<Nodes>>,
    metrics: Arc<Metrics>,
) -> anyhow::Result<()> {
    let mut collect = tokio::time::interval(COLLECT_EVERY);
    loop {
        let known = nodes.borrow_and_update().clone();
        if let Some(known) = known {
            metrics.nodes(known.all.len());
            if let Err(error) = attacher.overlay().set_nodes(known).await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the overlay does not follow the Nodes; trying again"
                );
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        }
        tokio::select! {
            changed = nodes.changed() => changed.context("Nodes are no longer followed")?,
            _ = collect.tick() => for vni in attacher.overlay().collect().await? {
                tracing::info!(vni = vni.get(), "took away a tenant network that no pod uses");
            },
        }
    }
}

/// Keeps guests that are already attached from the outer API server when that moves.
async fn keep_api_out(attacher: Arc<Attacher>, mut api: crate::attach::OuterApi) -> anyhow::Result<()> {
    loop {
        let known = api.borrow_and_update().clone();
        if let Some(known) = known {
            attacher.refresh_outer_api(&known).await?;
        }
        api.changed()
            .await
            .context("the API server's addresses are no longer followed")?;
    }
}

/// Keeps pods off tenant networks that are no longer their tenant's.
async fn keep_strangers_out(
    attacher: Arc<Attacher>,
    mut holders: watch::Receiver<Option<BTreeMap<Vni, Owner>>>,
) -> anyhow::Result<()> {
    // What failed once is tried again.
    let mut again = tokio::time::interval(COLLECT_EVERY);
    loop {
        let known = holders.borrow_and_update().clone();
        if let Some(known) = known {
            attacher.unplug_strangers(&known).await?;
        }
        tokio::select! {
            changed = holders.changed() => changed.context("NetworkAllocations are no longer followed")?,
            _ = again.tick() => {}
        }
    }
}

/// Says on the Node what it can do.
struct Marker {
    client: kube::Client,
    node: String,
    /// Where the kubelet tells what it has.
    kubelet: PathBuf,
    /// What is said, or was last.
    mark: Mark,
    /// It did not answer, and that was told.
    silent: bool,
}

impl Marker {
    /// Marks the Node once all kinds of devices are registered and pods can be attached, and again after each registration
    /// of the first kind: a kubelet that starts anew may have made the Node anew, and has another policy only since a
    /// start. It takes registrations once it knows its policy.
    async fn run(
        mut self,
        mut registered: mpsc::Receiver<&'static str>,
        kinds: usize,
        _keeps_the_channel_open: mpsc::Sender<&'static str>,
        attacher: Arc<Attacher>,
    ) -> anyhow::Result<()> {
        let mut known = BTreeSet::new();
        while known.len() < kinds {
            known.insert(registered.recv().await.context("no device plugin is left")?);
        }
        attacher.wait_ready().await;
        let mut said = false;
        loop {
            let answered = self.ask().await;
            if !said || answered == Some(true) {
                self.say().await;
                said = true;
            }
            tokio::select! {
                registration = registered.recv() => {
                    registration.context("no device plugin is left")?;
                    said = false;
                }
                () = tokio::time::sleep(ASK_AGAIN), if answered.is_none() => {}
            }
        }
    }

    /// Asks the kubelet; whether what is to be said differs now, or nothing if it does not answer: then it is as it was, and
    /// before its first answer it gives nothing away as far as anybody knows.
    async fn ask(&mut self) -> Option<bool> {
        match kubelet::gives_processors_away(&self.kubelet).await {
            Ok(processors) => {
                self.silent = false;
                Some(std::mem::replace(&mut self.mark.processors, processors) != processors)
            }
            Err(error) => {
                if !std::mem::replace(&mut self.silent, true) {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "the kubelet does not say whether it gives processors away; asking again"
                    );
                }
                None
            }
        }
    }

    async fn say(&self) {
        let Self { node, mark, .. } = self;
        while let Err(error) = outer::publish(self.client.clone(), node, mark).await {
            tracing::warn!(
                node,
                error = &error as &dyn std::error::Error,
                "the Node is not labelled yet; trying again"
            );
            tokio::time::sleep(AGAIN).await;
        }
        let accelerator = mark.accelerator.as_str();
        tracing::info!(
            node,
            accelerator,
            processors = mark.processors,
            "the Node takes machines"
        );
    }
}
