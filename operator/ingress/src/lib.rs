//! The ingress sidecar: keeps HAProxy's route map equal to what the TenantClusters' status says.
//!
//! It deliberately terminates no TLS, reads no Secret and makes no decision about a tenant: it watches TenantClusters
//! and nothing else.

pub mod haproxy;
pub mod routes;

use std::path::PathBuf;
use std::time::Duration;

use futures::TryStreamExt;
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client};
use kubernest_crds::TenantCluster;
use kubernest_runtime::server::Readiness;
use kubernest_runtime::{CancellationToken, telemetry};

use haproxy::Haproxy;

/// Pause before a failed update of HAProxy is tried again; HAProxy restarts in about a second.
const RETRY: Duration = Duration::from_secs(1);
/// Readiness gate: the map file holds all routes.
const MAP_WRITTEN: &str = "route map written";

/// Flags of `kubernest-ingress`.
#[derive(Clone, Debug, clap::Parser)]
#[command(
    version,
    about = "Keeps HAProxy's map of tenant host names up to date, without reloads"
)]
pub struct Args {
    /// Map file that HAProxy reads at start and names on its socket.
    #[arg(long, env = "KUBERNEST_MAP", default_value = "/run/haproxy/routes.map")]
    pub map: PathBuf,
    /// HAProxy's runtime socket (level admin).
    #[arg(long, env = "KUBERNEST_SOCKET", default_value = "/run/haproxy/admin.sock")]
    pub socket: PathBuf,
    /// Address of health and metrics.
    #[arg(long, env = "KUBERNEST_METRICS_ADDR", default_value = "0.0.0.0:8080")]
    pub metrics_addr: std::net::SocketAddr,
    /// Form of the logs.
    #[arg(long, env = "KUBERNEST_LOG_FORMAT", default_value = "json")]
    pub log_format: telemetry::Format,
}

/// Watches until told to stop. The map file is written before readiness is reported, so that HAProxy, which starts
/// after this, has every route from its first connection on.
pub async fn run(
    client: Client,
    haproxy: Haproxy,
    readiness: Readiness,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    readiness.set(MAP_WRITTEN, false);
    let (store, writer) = reflector::store::<TenantCluster>();
    let clusters = Api::<TenantCluster>::all(client);
    let changed = watcher(clusters, watcher::Config::default())
        .default_backoff()
        .reflect(writer);
    let mut changed = std::pin::pin!(changed);
    let mut behind = true;
    let mut known = None;
    let ready = async { store.wait_until_ready().await };
    tokio::pin!(ready);
    let mut synced = false;
    loop {
        if synced {
            let clusters = store.state();
            let (routes, conflicts) = routes::routes(clusters.iter().map(AsRef::as_ref));
            if known.as_ref() != Some(&routes) {
                for conflict in conflicts {
                    tracing::warn!(
                        host = conflict.host,
                        cluster = conflict.loser,
                        "host name belongs to an older cluster"
                    );
                }
                haproxy.write_map(&routes)?;
                readiness.set(MAP_WRITTEN, true);
                behind = true;
            }
            if behind {
                match haproxy.update(&routes).await {
                    Ok(count) => {
                        tracing::info!(routes = routes.len(), changed = count, "route map is up to date");
                        behind = false;
                    }
                    Err(error) => tracing::info!(error = telemetry::chain(&error), "route map not applied yet"),
                }
            }
            known = Some(routes);
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            result = &mut ready, if !synced => { result?; synced = true; }
            event = changed.try_next() => match event {
                Ok(None) => anyhow::bail!("the watch of TenantClusters ended"),
                Ok(Some(_)) => {}
                Err(error) => tracing::warn!(error = telemetry::chain(&error), "watch of TenantClusters failed; trying again"),
            },
            () = tokio::time::sleep(RETRY), if behind && synced => {}
        }
    }
}
