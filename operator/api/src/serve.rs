//! Serves webhooks and the aggregated API until the process is asked to stop: HTTPS for the API server, HTTP for metrics and health.

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use axum_server::{Handle, tls_rustls::RustlsConfig};
use kubernest_runtime::{CancellationToken, Metrics, process::shutdown_token, server};

use crate::{
    args::Args,
    bundles::Holders,
    certificate::{Serving, service_names},
    presets, routes, subresources,
    subresources::{
        peer::PeerAcceptor,
        proxy::{self, Proxy},
    },
    trust::{self, Trust},
};

/// How long requests in progress may take after the process was asked to stop.
const GRACE: Duration = Duration::from_secs(10);

/// Runs until SIGTERM.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let shutdown = shutdown_token().context("cannot listen for signals")?;
    // Two crypto providers are linked in; the choice must be made before any client or server.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = kube::Client::try_default().await.context("cannot find the cluster")?;
    let metrics = Metrics::new();
    let readiness = server::Readiness::default();
    readiness.set(trust::READY, false);
    readiness.set(proxy::READY, false);
    readiness.set(presets::READY, false);

    let serving = Serving::default();
    let mut names = service_names(&args.service, &args.namespace);
    names.extend(args.sans.iter().cloned());
    let keeping = tokio::spawn(trust::keep(
        Trust {
            client: client.clone(),
            namespace: args.namespace.clone(),
            names,
            holders: Holders {
                webhook_configuration: args.webhook_configuration.clone(),
                api_services: args.api_services.clone(),
                definitions: args.definitions.clone(),
            },
            serving: serving.clone(),
            readiness: readiness.clone(),
        },
        shutdown.clone(),
    ));

    let tls = RustlsConfig::from_config(Arc::new(serving.tls_config(None).context("cannot set up TLS")?));
    let proxy = Proxy::default();
    let believing = proxy.clone().keep(
        client.clone(),
        serving,
        tls.clone(),
        readiness.clone(),
        shutdown.clone(),
    );
    let believing = tokio::spawn(believing);
    let presets = presets::watch(client.clone(), readiness.clone(), shutdown.clone());
    let launchers = subresources::launcher::Launchers::new(client.clone(), args.namespace.clone());
    let agents = subresources::agents::keep(client.clone(), launchers, shutdown.clone());
    let agents = tokio::spawn(agents);
    let router = routes::router(
        args.installation(),
        args.namespace.clone(),
        presets,
        &metrics,
        readiness.clone(),
    )
    .merge(subresources::router(client, args.namespace.clone(), proxy, &metrics));
    let handle = Handle::new();
    tokio::spawn(stop(handle.clone(), shutdown.clone()));
    tracing::info!(addr = %args.addr, versions = ?args.node_images.0, "serves webhooks and the aggregated API");
    let webhooks = axum_server::bind(args.addr)
        .acceptor(PeerAcceptor::new(tls))
        .handle(handle)
        .serve(router.into_make_service());
    let plain = server::serve(args.metrics_addr, metrics, readiness, shutdown.clone());
    let outcome = tokio::select! {
        outcome = webhooks => outcome.context("serving webhooks ended"),
        outcome = plain => match outcome {
            // Health stays up as long as the process; it ends first only when it fails or all is stopped.
            Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        },
    };
    shutdown.cancel();
    keeping.await.context("the task that keeps the certificate died")?;
    believing.await.context("the task that watches the front proxy died")?;
    agents.await.context("the task that watches guest agents died")?;
    outcome.map(|()| ExitCode::SUCCESS)
}

async fn stop(handle: Handle<std::net::SocketAddr>, shutdown: CancellationToken) {
    shutdown.cancelled().await;
    handle.graceful_shutdown(Some(GRACE));
}
