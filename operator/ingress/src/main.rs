//! `kubernest-ingress`: sidecar of HAProxy.

use clap::Parser;
use kubernest_ingress::{Args, haproxy::Haproxy, run};
use kubernest_runtime::{Metrics, process, server, telemetry};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    telemetry::init(args.log_format);
    let _ = rustls::crypto::ring::default_provider().install_default();
    let shutdown = process::shutdown_token()?;
    let readiness = server::Readiness::default();
    let metrics = Metrics::new();
    let health = server::serve(args.metrics_addr, metrics, readiness.clone(), shutdown.clone());
    let client = kube::Client::try_default().await?;
    let haproxy = Haproxy {
        map: args.map,
        socket: args.socket,
    };
    tokio::try_join!(
        async { Ok(health.await?) },
        run(client, haproxy, readiness, shutdown.clone())
    )?;
    Ok(())
}
