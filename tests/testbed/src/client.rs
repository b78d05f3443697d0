//! A Kubernetes client from a kubeconfig file.
//!
//! It deliberately reads no other place: neither KUBECONFIG nor a pod's service account, so that a bed's client can
//! only ever talk to the bed.

use std::path::Path;

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig could not be read.
    #[error("cannot read the kubeconfig {path}")]
    Read {
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: Box<KubeconfigError>,
    },
    /// A client could not be made from it.
    #[error("cannot make a client from the kubeconfig")]
    Make(#[source] Box<kube::Error>),
}

/// Reads the kubeconfig at `path`.
pub async fn connect(path: &Path) -> Result<Client, Error> {
    // Installed by the first caller in the process; later ones find it there.
    rustls::crypto::ring::default_provider().install_default().ok();
    let read = |source| Error::Read {
        path: path.display().to_string(),
        source: Box::new(source),
    };
    let kubeconfig = Kubeconfig::read_from(path).map_err(read)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(read)?;
    Client::try_from(config).map_err(|e| Error::Make(Box::new(e)))
}
