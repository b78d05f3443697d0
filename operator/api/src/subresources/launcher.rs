//! The client of launchers' control ports (`kubernest_domain::control`): mutual TLS to the launcher of one instance.
//!
//! The credential is read from its Secret at every connection, so that a renewed one is used at once and nothing is kept.
//! Where a launcher is stands in its instance's status; that it is the right one is proved by its certificate, whose name
//! has the instance's uid.

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use futures::{Stream, TryStreamExt};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes},
    client::conn::http1,
    header,
};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client, ResourceExt};
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use kubernest_domain::{control, paths};
use rustls::{ClientConfig, RootCertStore, client::Resumption, crypto::ring};
use rustls_pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName, pem::PemObject};
use serde::de::DeserializeOwned;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    answer::{Failure, Kind},
    picture::Picture,
};

/// Secret of the credential that launchers let in; made by the operator.
const SECRET: &str = "kubernest-launcher-client";
/// How long a connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long a command may take: qemu stops at once, a busy node answers late.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// Most bytes of an answer; it is a sentence.
const ANSWER_BYTES: usize = 4096;
/// Most bytes of a launcher's that wait for somebody to take them, its headers among them.
const BUFFER_BYTES: usize = 64 << 10;

/// A connection to a launcher, for one question after the other.
pub struct Line(http1::SendRequest<Empty<Bytes>>);

impl Line {
    /// What the launcher answers to a question, within this time and in so many bytes.
    ///
    /// # Errors
    /// [`LauncherError`]; the connection is of no use any more.
    pub async fn ask<T: DeserializeOwned>(
        &mut self,
        path: &str,
        limit: Duration,
        bytes: usize,
    ) -> Result<T, LauncherError> {
        let asked = async {
            let request = Request::builder().uri(path).header(header::HOST, "launcher");
            let response = self.0.send_request(request.body(Empty::new())?).await?;
            if response.status() != StatusCode::OK {
                return Err(refusal(response).await);
            }
            let body = Limited::new(response.into_body(), bytes).collect().await;
            let body = body.map_err(|_| LauncherError::TooLong)?.to_bytes();
            serde_json::from_slice(&body).map_err(LauncherError::Malformed)
        };
        timeout(limit, asked).await.unwrap_or(Err(LauncherError::Slow(limit)))
    }
}

/// A stream to a launcher.
pub type Connection = TokioIo<hyper::upgrade::Upgraded>;

/// Why a launcher did not do it.
#[derive(Debug, thiserror::Error)]
pub enum LauncherError {
    /// It says that the guest's state does not allow it.
    #[error("{0}")]
    Refused(String),
    /// It has no such device.
    #[error("{0}")]
    Absent(String),
    /// It answers otherwise.
    #[error("the launcher answered {code}: {said}")]
    Answer {
        /// HTTP status.
        code: StatusCode,
        /// What it said.
        said: String,
    },
    /// It answers with something else than a picture.
    #[error("the launcher's answer is no picture of 1 to {} bytes", control::SCREENSHOT_BYTES)]
    NoPicture,
    /// The status names no address.
    #[error("the instance's launcher has no address yet")]
    Address,
    /// The Secret cannot be read.
    #[error("reading Secret {SECRET}, which kubernest-operator makes")]
    Secret(#[source] Box<kube::Error>),
    /// The Secret has not all.
    #[error("Secret {SECRET} has no {0}")]
    Key(&'static str),
    /// The Secret's PEM.
    #[error("Secret {SECRET} is not PEM")]
    Pem(#[from] rustls_pki_types::pem::Error),
    /// TLS cannot be set up.
    #[error("setting up TLS to the launcher")]
    Tls(#[from] rustls::Error),
    /// The name that the launcher must prove.
    #[error("the instance's uid is no DNS label")]
    Name(#[from] InvalidDnsNameError),
    /// TCP or handshake.
    #[error("connecting to the launcher at {address}")]
    Connect {
        /// Where.
        address: IpAddr,
        /// What was wrong.
        #[source]
        source: io::Error,
    },
    /// It took too long.
    #[error("the launcher did not answer within {0:?}")]
    Slow(Duration),
    /// It says more than it may, or was cut off.
    #[error("the launcher's answer is not whole, or longer than it may be")]
    TooLong,
    /// It says something else.
    #[error("reading the launcher's answer")]
    Malformed(#[source] serde_json::Error),
    /// HTTP.
    #[error("talking to the launcher")]
    Http(#[from] hyper::Error),
    /// A request that cannot be.
    #[error("building the request")]
    Request(#[from] hyper::http::Error),
}

impl LauncherError {
    /// What the user is told.
    pub fn failure(&self, instance: &VirtualMachineInstance) -> Failure {
        match self {
            Self::Refused(why) => Failure::conflict(Kind::Instance, &instance.name_any(), why),
            Self::Absent(why) if why.is_empty() => {
                Failure::bad_request("the instance's launcher is of an earlier version and knows no such question")
            }
            Self::Absent(why) => Failure::bad_request(why.clone()),
            other => Failure::internal("dialing virt-launcher", other),
        }
    }
}

/// Reaches launchers.
#[derive(Clone)]
pub struct Launchers {
    client: Client,
    namespace: String,
}

impl Launchers {
    /// With the credential in `namespace`.
    pub fn new(client: Client, namespace: String) -> Self {
        Self { client, namespace }
    }

    /// Has the launcher of `instance` carry out a command.
    ///
    /// # Errors
    /// [`LauncherError`].
    pub async fn command(&self, instance: &VirtualMachineInstance, path: &str) -> Result<(), LauncherError> {
        let commanded = async {
            let request = Request::builder().method(Method::PUT).uri(path);
            let response = self.send(instance, request).await?;
            if response.status() == StatusCode::OK {
                return Ok(());
            }
            Err(refusal(response).await)
        };
        timeout(COMMAND_LIMIT, commanded)
            .await
            .unwrap_or(Err(LauncherError::Slow(COMMAND_LIMIT)))
    }

    /// What the launcher of `instance` answers to a question.
    ///
    /// # Errors
    /// [`LauncherError`].
    pub async fn ask<T: DeserializeOwned>(
        &self,
        instance: &VirtualMachineInstance,
        path: &str,
    ) -> Result<T, LauncherError> {
        self.line(instance)
            .await?
            .ask(path, COMMAND_LIMIT, control::ANSWER_BYTES)
            .await
    }

    /// Opens a connection to the launcher of `instance`.
    ///
    /// # Errors
    /// [`LauncherError`].
    pub async fn line(&self, instance: &VirtualMachineInstance) -> Result<Line, LauncherError> {
        let stream = self.connect(instance).await?;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER_BYTES)
            .handshake(TokioIo::new(stream))
            .await?;
        // Ends with the stream, or when the sender is dropped.
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "connection to a launcher ended");
            }
        });
        Ok(Line(sender))
    }

    /// Opens a stream to the launcher of `instance`.
    ///
    /// # Errors
    /// [`LauncherError`].
    pub async fn stream(&self, instance: &VirtualMachineInstance, path: &str) -> Result<Connection, LauncherError> {
        let opened = async {
            let request = Request::builder()
                .uri(path)
                .header(header::CONNECTION, "Upgrade")
                .header(header::UPGRADE, control::STREAM_PROTOCOL);
            let response = self.send(instance, request).await?;
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                return Ok(TokioIo::new(hyper::upgrade::on(response).await?));
            }
            Err(refusal(response).await)
        };
        timeout(COMMAND_LIMIT, opened)
            .await
            .unwrap_or(Err(LauncherError::Slow(COMMAND_LIMIT)))
    }

    /// Has the launcher of `instance` take a picture of the screen.
    ///
    /// # Errors
    /// [`LauncherError`].
    pub async fn screenshot(
        &self,
        instance: &VirtualMachineInstance,
    ) -> Result<Picture<impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static + use<>>, LauncherError> {
        let taken = async {
            let request = Request::builder().uri(control::SCREENSHOT);
            let response = self.send(instance, request).await?;
            if response.status() != StatusCode::OK {
                return Err(refusal(response).await);
            }
            let (head, body) = response.into_parts();
            let length = body.size_hint().exact();
            let pieces = body.into_data_stream().map_err(io::Error::other);
            Picture::new(head.headers.get(header::CONTENT_TYPE), length, pieces).ok_or(LauncherError::NoPicture)
        };
        timeout(COMMAND_LIMIT, taken)
            .await
            .unwrap_or(Err(LauncherError::Slow(COMMAND_LIMIT)))
    }

    async fn send(
        &self,
        instance: &VirtualMachineInstance,
        request: hyper::http::request::Builder,
    ) -> Result<Response<hyper::body::Incoming>, LauncherError> {
        let Line(mut sender) = self.line(instance).await?;
        let request = request.header(header::HOST, "launcher").body(Empty::<Bytes>::new())?;
        Ok(sender.send_request(request).await?)
    }

    async fn connect(&self, instance: &VirtualMachineInstance) -> Result<TlsStream<TcpStream>, LauncherError> {
        let status = instance.status.as_ref();
        let address: IpAddr = status
            .and_then(|status| status.launcher_address.as_deref()?.parse().ok())
            .ok_or(LauncherError::Address)?;
        let config = self.credential().await?;
        let name = ServerName::try_from(control::server_name(&instance.uid().unwrap_or_default()))?;
        let failed = |source| LauncherError::Connect { address, source };
        let connected = async {
            let stream = TcpStream::connect((address, paths::CONTROL_PORT)).await?;
            super::stream::keep_alive(&stream)?;
            TlsConnector::from(Arc::new(config)).connect(name, stream).await
        };
        match timeout(CONNECT_LIMIT, connected).await {
            Ok(connected) => connected.map_err(failed),
            Err(_) => Err(LauncherError::Slow(CONNECT_LIMIT)),
        }
    }

    async fn credential(&self) -> Result<ClientConfig, LauncherError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let secret = secrets
            .get(SECRET)
            .await
            .map_err(|error| LauncherError::Secret(Box::new(error)))?;
        let data = secret.data.unwrap_or_default();
        let text = |key: &'static str| data.get(key).map(|bytes| &bytes.0[..]).ok_or(LauncherError::Key(key));
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(text(control::files::CA)?) {
            roots.add(certificate?)?;
        }
        let chain =
            CertificateDer::pem_slice_iter(text(control::files::CERTIFICATE)?).collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(text(control::files::KEY)?)?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)?;
        // Each connection has a configuration of its own, so none is ever resumed.
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

/// What an answer other than the one wanted means.
async fn refusal(response: Response<hyper::body::Incoming>) -> LauncherError {
    let code = response.status();
    let said = match Limited::new(response.into_body(), ANSWER_BYTES).collect().await {
        // It ends up in terminals.
        Ok(body) => String::from_utf8_lossy(&body.to_bytes())
            .trim()
            .replace(char::is_control, " "),
        Err(_) => String::new(),
    };
    match code {
        StatusCode::CONFLICT => LauncherError::Refused(said),
        StatusCode::NOT_FOUND => LauncherError::Absent(said),
        code => LauncherError::Answer { code, said },
    }
}
