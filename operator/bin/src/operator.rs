//! The operator's life: waits for the Lease, runs the controllers, and stops them before it gives the Lease back.

use anyhow::{Context, bail};
use kube::Client;
use kubernest_runtime::{
    CancellationToken, Metrics,
    lease::{self, Leadership},
    process::{identity, shutdown_token},
    server::{self, Readiness, ServeError},
};
use tokio::task::{JoinHandle, JoinSet};

use crate::args::Args;

/// Name of the leader's Lease.
const LEASE: &str = "kubernest-operator";

/// Runs until SIGTERM.
///
/// # Errors
/// When the cluster cannot be found, the Lease is lost, or a controller ends though nobody asked it to.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let shutdown = shutdown_token().context("cannot listen for signals")?;
    // Two crypto providers are linked in; the choice must be made before the first client.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::try_default().await.context("cannot find the cluster")?;
    let metrics = Metrics::new();
    // A replica that waits for the Lease is as ready as the one that holds it.
    let plain = tokio::spawn(server::serve(
        args.metrics_addr,
        metrics.clone(),
        Readiness::default(),
        shutdown.clone(),
    ));

    let leadership = if args.leader_elect {
        let settings = lease::Settings::new(&args.namespace, LEASE, identity());
        match lease::acquire(client.clone(), settings, &shutdown).await {
            Some(leadership) => Some(leadership),
            None => return Ok(()),
        }
    } else {
        None
    };
    let mut controllers = start(args, client, metrics, &shutdown);
    let outcome = tokio::select! {
        () = lost(leadership.as_ref()) => bail!("the Lease {LEASE} is lost: another replica may be working already"),
        outcome = supervise(&mut controllers, &shutdown) => outcome,
        error = failure(plain) => Err(error),
    };
    // Nothing of ours writes any more, so the next leader may begin at once.
    controllers.shutdown().await;
    if let Some(leadership) = leadership {
        leadership.release().await;
    }
    outcome
}

/// Starts all controllers.
fn start(args: Args, client: Client, metrics: Metrics, shutdown: &CancellationToken) -> JoinSet<&'static str> {
    let mut controllers = JoinSet::new();
    let (namespace, machine) = (args.namespace, args.machine);
    let shared = (client.clone(), metrics.clone(), shutdown.clone());
    controllers.spawn(async move {
        let (client, metrics, shutdown) = shared;
        kubernest_machine::run(client, &namespace, machine, metrics, shutdown).await;
        "machine"
    });
    let tenant = kubernest_tenant::run(client, args.tenant, metrics, shutdown.clone());
    controllers.spawn(async move {
        tenant.await;
        "tenant"
    });
    controllers
}

/// Waits until all controllers have ended; one that ends before shutdown is an error.
async fn supervise(controllers: &mut JoinSet<&'static str>, shutdown: &CancellationToken) -> anyhow::Result<()> {
    while let Some(ended) = controllers.join_next().await {
        let half = ended.context("a controller died")?;
        if !shutdown.is_cancelled() {
            bail!("the controllers of the {half} half ended though nobody asked them to");
        }
        tracing::info!(half, "controllers ended");
    }
    Ok(())
}

/// The error of the metrics server, if it ends with one; it ends well when all is stopped.
async fn failure(plain: JoinHandle<Result<(), ServeError>>) -> anyhow::Error {
    match plain.await {
        Ok(Ok(())) => std::future::pending().await,
        Ok(Err(error)) => error.into(),
        Err(error) => anyhow::Error::new(error).context("the metrics server died"),
    }
}

async fn lost(leadership: Option<&Leadership>) {
    match leadership {
        Some(leadership) => leadership.lost().await,
        None => std::future::pending().await,
    }
}
