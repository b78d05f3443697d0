//! A client of KubeVirt's streams (console, VNC, portforward): a websocket of subprotocol `plain.kubevirt.io` through the
//! kube-apiserver, as virtctl opens it. Binary frames carry data; close 1000 is the end.

use std::{path::Path, sync::Arc};

use futures::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1, header, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use kube::{
    Config,
    client::ConfigExt,
    config::{KubeConfigOptions, Kubeconfig},
};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message, handshake::client::generate_key, protocol::Role},
};

/// Subprotocol of the streams.
const PROTOCOL: &str = "plain.kubevirt.io";

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Answered before any upgrade.
    #[error("refused with {code}: {body}")]
    Refused {
        /// HTTP status.
        code: u16,
        /// The `metav1.Status`.
        body: String,
    },
    /// The kubeconfig.
    #[error("reading the kubeconfig")]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    /// TLS from it.
    #[error("setting up TLS")]
    Tls(#[source] Box<kube::Error>),
    /// The API server's address is none.
    #[error("the kubeconfig's server has no host")]
    Server,
    /// Connecting.
    #[error("connecting")]
    Connect(#[from] std::io::Error),
    /// HTTP.
    #[error("talking to the API server")]
    Http(#[from] hyper::Error),
    /// A path that cannot be asked for.
    #[error("building the request")]
    Request(#[from] hyper::http::Error),
    /// The websocket.
    #[error("the websocket")]
    WebSocket(#[from] Box<tungstenite::Error>),
}

/// An open stream.
pub struct PlainStream {
    socket: WebSocketStream<TokioIo<Upgraded>>,
    received: String,
}

impl PlainStream {
    /// Opens `path` as the kubeconfig's user, or as another that this one may impersonate.
    ///
    /// # Errors
    /// [`StreamError::Refused`] with the answer when it is not upgraded.
    pub async fn open(kubeconfig: &Path, path: &str, user: Option<&str>) -> Result<Self, StreamError> {
        let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let mut tls = config
            .rustls_client_config()
            .map_err(|error| StreamError::Tls(Box::new(error)))?;
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let host = config.cluster_url.host().ok_or(StreamError::Server)?.to_owned();
        let port = config.cluster_url.port_u16().unwrap_or(443);
        let name = config.tls_server_name.clone().unwrap_or_else(|| host.clone());
        let name = ServerName::try_from(name).map_err(|_| StreamError::Server)?;
        let stream = TcpStream::connect((host.as_str(), port)).await?;
        let stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::get(path)
            .header(header::HOST, host)
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, generate_key())
            .header(header::SEC_WEBSOCKET_PROTOCOL, PROTOCOL);
        if let Some(user) = user {
            request = request.header("impersonate-user", user);
        }
        let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        let code = response.status();
        if code != StatusCode::SWITCHING_PROTOCOLS {
            let body = response.into_body().collect().await?.to_bytes();
            return Err(StreamError::Refused {
                code: code.as_u16(),
                body: String::from_utf8_lossy(&body).into_owned(),
            });
        }
        let stream = TokioIo::new(hyper::upgrade::on(response).await?);
        Ok(Self {
            socket: WebSocketStream::from_raw_socket(stream, Role::Client, None).await,
            received: String::new(),
        })
    }

    /// Sends bytes.
    ///
    /// # Errors
    /// When the stream is gone.
    pub async fn send(&mut self, data: &[u8]) -> Result<(), StreamError> {
        let message = Message::Binary(data.to_vec().into());
        Ok(self.socket.send(message).await.map_err(Box::new)?)
    }

    /// The next bytes; `None` once the other side has closed as it should.
    ///
    /// # Errors
    /// When the stream broke off.
    pub async fn receive(&mut self) -> Result<Option<Vec<u8>>, StreamError> {
        loop {
            match self.socket.next().await.transpose().map_err(Box::new)? {
                Some(Message::Binary(data)) => return Ok(Some(data.to_vec())),
                Some(Message::Close(_)) | None => return Ok(None),
                Some(_) => {}
            }
        }
    }

    /// Reads until all that was received holds `text`; what came after it is kept for the next. False at the end.
    ///
    /// # Errors
    /// When the stream broke off.
    pub async fn expect(&mut self, text: &str) -> Result<bool, StreamError> {
        loop {
            if let Some(at) = self.received.find(text) {
                self.received.drain(..at + text.len());
                return Ok(true);
            }
            match self.receive().await? {
                Some(data) => self.received.push_str(&String::from_utf8_lossy(&data)),
                None => return Ok(false),
            }
        }
    }
}
