//! Who asks: the API server's aggregator says it in headers, and is believed only with a certificate of the front
//! proxy's CA *and* a name that is allowed (kubernetes.io, "Configure the Aggregation Layer").
//!
//! What that CA and those names are stands in a ConfigMap that the API server publishes; it is watched, as all of it may
//! change while we run. Until it was read nobody is believed.

use std::sync::{Arc, PoisonError, RwLock};

use axum::http::HeaderMap;
use axum_server::tls_rustls::RustlsConfig;
use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use kubernest_runtime::{CancellationToken, server::Readiness, telemetry::chain};
use percent_encoding::percent_decode_str;
use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, pem::PemObject};

use crate::certificate::Serving;

/// The name under which readiness waits for the first word of the API server.
pub const READY: &str = "the front proxy's CA";

const NAMESPACE: &str = "kube-system";
const NAME: &str = "extension-apiserver-authentication";

/// Why the ConfigMap tells nothing.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// A key is missing.
    #[error("{NAMESPACE}/{NAME} has no {0}: does the API server run with --requestheader-client-ca-file?")]
    Missing(&'static str),
    /// A list is none.
    #[error("{key} of {NAMESPACE}/{NAME} is no JSON list of texts")]
    List {
        /// Its key.
        key: &'static str,
        /// What was wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The CA cannot be read.
    #[error("the front proxy's CA is not PEM")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// The CA is no certificate.
    #[error("the front proxy's CA cannot be trusted")]
    Trust(#[source] rustls::Error),
    /// No TLS configuration from it.
    #[error("setting up client certificates failed")]
    Configure(#[from] crate::certificate::TlsError),
}

/// Whom to believe and which headers to read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FrontProxy {
    ca: String,
    /// Common names; with none, every certificate of the CA will do, as Kubernetes has it.
    names: Vec<String>,
    user: Vec<String>,
    groups: Vec<String>,
    extra: Vec<String>,
}

/// Somebody that the API server vouches for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub groups: Vec<String>,
    pub extra: std::collections::BTreeMap<String, Vec<String>>,
}

/// The common name of a connection's client certificate; `None` without one. It was verified by TLS.
#[derive(Clone, Debug, Default)]
pub struct Peer(pub Option<String>);

/// What is believed now. Clones share it.
#[derive(Clone, Default)]
pub struct Proxy {
    current: Arc<RwLock<Option<FrontProxy>>>,
}

/// What a new state of the ConfigMap came to.
enum Learned {
    /// It is believed from now on.
    Known,
    /// Its CA is another than the one that connections were let in by.
    AnotherCa,
}

impl FrontProxy {
    /// Reads the ConfigMap's data.
    fn parse(map: &ConfigMap) -> Result<Self, ProxyError> {
        let data = map.data.clone().unwrap_or_default();
        let text = |key: &'static str| data.get(key).ok_or(ProxyError::Missing(key));
        let list = |key: &'static str| -> Result<Vec<String>, ProxyError> {
            let Some(text) = data.get(key) else {
                return Ok(Vec::new());
            };
            serde_json::from_str(text).map_err(|source| ProxyError::List { key, source })
        };
        text("requestheader-username-headers")?;
        Ok(Self {
            ca: text("requestheader-client-ca-file")?.clone(),
            names: list("requestheader-allowed-names")?,
            user: list("requestheader-username-headers")?,
            groups: list("requestheader-group-headers")?,
            extra: list("requestheader-extra-headers-prefix")?,
        })
    }

    fn roots(&self) -> Result<RootCertStore, ProxyError> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(self.ca.as_bytes()) {
            roots
                .add(certificate.map_err(ProxyError::Pem)?)
                .map_err(ProxyError::Trust)?;
        }
        Ok(roots)
    }

    /// The user of a request, if the connection may name one.
    fn user(&self, peer: &Peer, headers: &HeaderMap) -> Option<User> {
        let name = peer.0.as_ref()?;
        if !self.names.is_empty() && !self.names.contains(name) {
            return None;
        }
        // Go writes names as UTF-8; one that is none is nobody's.
        let readable = |value: &axum::http::HeaderValue| std::str::from_utf8(value.as_bytes()).is_ok();
        if !headers.values().all(readable) {
            return None;
        }
        let values = |header: &String| -> Vec<String> {
            let all = headers.get_all(header.as_str()).iter();
            all.filter_map(|value| std::str::from_utf8(value.as_bytes()).ok())
                .filter(|value| !value.is_empty())
                .map(str::to_owned)
                .collect()
        };
        let mut user = User {
            name: self.user.iter().flat_map(values).next()?,
            groups: self.groups.iter().flat_map(values).collect(),
            ..User::default()
        };
        for prefix in &self.extra {
            let prefix = prefix.to_ascii_lowercase();
            // Header names arrive in lower case.
            for header in headers.keys() {
                let Some(key) = header.as_str().strip_prefix(&prefix) else {
                    continue;
                };
                let key = percent_decode_str(key).decode_utf8_lossy().into_owned();
                user.extra.entry(key).or_default().extend(values(&header.to_string()));
            }
        }
        Some(user)
    }
}

impl Proxy {
    /// The user of a request; `None` when nobody who may says who it is.
    pub fn user(&self, peer: &Peer, headers: &HeaderMap) -> Option<User> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.as_ref()?.user(peer, headers)
    }

    /// Keeps it right, and with it what the TLS port asks of clients, until shutdown. `readiness` waits for the first word:
    /// a connection that the API server opened before would stay one of nobody.
    ///
    /// With another CA than before the process is shut down, to be started anew: connections that were let in by the old
    /// one would be believed on.
    pub async fn keep(
        self,
        client: Client,
        serving: Serving,
        tls: RustlsConfig,
        readiness: Readiness,
        shutdown: CancellationToken,
    ) {
        let api: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
        let only = watcher::Config::default().fields(&format!("metadata.name={NAME}"));
        let mut maps = Box::pin(watcher(api, only).default_backoff().applied_objects());
        loop {
            let map = tokio::select! {
                () = shutdown.cancelled() => return,
                map = maps.next() => map,
            };
            let learned = match map {
                None => return,
                Some(Err(error)) => {
                    tracing::warn!(
                        error = chain(&error),
                        "watching {NAMESPACE}/{NAME} failed, it is begun again"
                    );
                    continue;
                }
                Some(Ok(map)) => self.learn(&map, &serving, &tls),
            };
            match learned {
                Ok(Learned::AnotherCa) => {
                    tracing::warn!("the front proxy has another CA: ends, to be started anew");
                    shutdown.cancel();
                }
                Ok(Learned::Known) => {}
                Err(error) => tracing::error!(error = chain(&error), "what was believed before stays"),
            }
            readiness.set(READY, true);
        }
    }

    fn learn(&self, map: &ConfigMap, serving: &Serving, tls: &RustlsConfig) -> Result<Learned, ProxyError> {
        let learned = FrontProxy::parse(map)?;
        let before = self.current.read().unwrap_or_else(PoisonError::into_inner).clone();
        if before.as_ref().is_some_and(|before| before.ca != learned.ca) {
            return Ok(Learned::AnotherCa);
        }
        if before.as_ref() == Some(&learned) {
            return Ok(Learned::Known);
        }
        tls.reload_from_config(Arc::new(serving.tls_config(Some(learned.roots()?))?));
        tracing::info!(names = ?learned.names, "believes the front proxy");
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(learned);
        Ok(Learned::Known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn front_proxy(names: &str) -> FrontProxy {
        let map: ConfigMap = serde_json::from_value(serde_json::json!({"data": {
            "requestheader-client-ca-file": "",
            "requestheader-allowed-names": names,
            "requestheader-username-headers": r#"["X-Remote-User"]"#,
            "requestheader-group-headers": r#"["X-Remote-Group"]"#,
            "requestheader-extra-headers-prefix": r#"["X-Remote-Extra-"]"#,
        }}))
        .unwrap();
        FrontProxy::parse(&map).unwrap()
    }

    fn headers() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("x-remote-user", "ada".parse().unwrap());
        headers.append("x-remote-group", "dev".parse().unwrap());
        headers.append("x-remote-group", "ops".parse().unwrap());
        headers.insert("x-remote-extra-acme.com%2fproject", "p".parse().unwrap());
        headers
    }

    #[test]
    fn proxy_reads_user_groups_and_extra() {
        let user = front_proxy(r#"["front-proxy-client"]"#)
            .user(&Peer(Some("front-proxy-client".to_owned())), &headers())
            .unwrap();
        assert_eq!(
            (user.name.as_str(), user.groups),
            ("ada", vec!["dev".to_owned(), "ops".to_owned()])
        );
        assert_eq!(user.extra["acme.com/project"], ["p"]);
    }

    #[test]
    fn proxy_reads_names_in_any_script() {
        let mut headers = headers();
        headers.insert("x-remote-user", "jürgen".as_bytes().try_into().unwrap());
        let peer = Peer(Some("front-proxy-client".to_owned()));
        let proxy = front_proxy("[]");
        assert_eq!(proxy.user(&peer, &headers).unwrap().name, "jürgen");
        headers.append("x-remote-group", b"\xff\xfe"[..].try_into().unwrap());
        assert_eq!(
            proxy.user(&peer, &headers),
            None,
            "a group that can't be read is not left out"
        );
    }

    #[test]
    fn proxy_believes_no_headers_without_certificate_and_allowed_name() {
        let proxy = front_proxy(r#"["front-proxy-client"]"#);
        assert_eq!(proxy.user(&Peer(None), &headers()), None);
        assert_eq!(proxy.user(&Peer(Some("somebody".to_owned())), &headers()), None);
        assert_eq!(
            Proxy::default().user(&Peer(Some("front-proxy-client".to_owned())), &headers()),
            None
        );
    }

    #[test]
    fn proxy_needs_headers_that_name_a_user() {
        let proxy = front_proxy("[]");
        assert_eq!(proxy.user(&Peer(Some("any".to_owned())), &HeaderMap::new()), None);
        assert!(proxy.user(&Peer(Some("any".to_owned())), &headers()).is_some());
    }
}
