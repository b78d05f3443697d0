//! The control port: [`kubernest_domain::control`] over mTLS, for `kubernest-api` alone.
//!
//! It decides nothing about the domain: commands go to the domain's owner ([`crate::supervisor`]), streams to console
//! and screen. Who has no certificate for [`kubernest_domain::control::CLIENT_NAME`] of the CA beside the launcher's own
//! certificate is not spoken to. What a peer can hold is bounded: handshakes, connections, and the time for each;
//! one that has vanished holds nothing for long.

mod peers;
mod routes;
mod tls;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::errno::Errno;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{KeepAlive, TcpKeepCount, TcpKeepIdle, TcpKeepInterval};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use self::peers::{Peers, Place};
use crate::agent::Agent;
use crate::camera::Camera;
use crate::chain;
use crate::console::Console;
use crate::seat::Seat;
use crate::state::{Refusal, Request};

/// Most handshakes at once; others wait in the listener's backlog.
const HANDSHAKES: usize = 32;
/// Most connections at once, streams among them.
const CONNECTIONS: usize = 64;
/// How long a TLS handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How long a request's header may take, from the end of the handshake or of the request before.
const HEADER_LIMIT: Duration = Duration::from_secs(10);
/// Seconds of silence after which a peer is asked whether it is still there (tcp(7), `TCP_KEEPIDLE`).
const KEEPALIVE_IDLE: u32 = 15;
/// Seconds between two such questions (`TCP_KEEPINTVL`).
const KEEPALIVE_INTERVAL: u32 = 5;
/// Questions without an answer after which it is gone (`TCP_KEEPCNT`).
const KEEPALIVE_PROBES: u32 = 3;
/// Pause after a connection could not be accepted: the process has no file descriptor left.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A request to the domain's owner.
#[derive(Debug)]
pub struct Command {
    /// What is asked for.
    pub request: Request,
    /// Where its answer goes.
    pub reply: oneshot::Sender<Result<(), Refusal>>,
}

/// What the port leads to.
#[derive(Clone)]
pub struct Backend {
    /// The serial console, if the machine has one.
    pub console: Option<Console>,
    /// qemu's VNC socket, if the machine has a screen.
    pub screen: Option<Screen>,
    /// The guest's agent.
    pub agent: Agent,
    /// To the domain's owner.
    pub commands: mpsc::Sender<Command>,
}

/// A screen that one session at a time looks at.
#[derive(Clone)]
pub struct Screen {
    /// Where qemu serves RFB.
    pub socket: PathBuf,
    /// Who looks at it.
    pub seat: Seat,
    /// Who wants a picture of it.
    pub camera: Camera,
}

/// Serves the port from now on. The key pair and the clients' CA are read from the folder `tls` at each connection.
pub fn serve(listener: TcpListener, tls: PathBuf, backend: Backend) {
    let server = Arc::new(Server {
        tls,
        backend,
        said: AtomicBool::new(false),
    });
    tokio::spawn(server.accept(listener));
}

/// Why a connection was closed before it was spoken to.
#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    /// Nothing to show, or to check a client with.
    #[error("reading the control port's certificates")]
    Config(#[source] tls::TlsError),
    /// TLS.
    #[error("shaking hands")]
    Handshake(#[source] std::io::Error),
    /// Certificate of somebody else.
    #[error("looking at the client's certificate")]
    Client(#[source] tls::ClientError),
    /// Too slow.
    #[error("the handshake took longer than {} s", HANDSHAKE_LIMIT.as_secs())]
    Slow,
}

struct Server {
    tls: PathBuf,
    backend: Backend,
    /// It was said that there are no certificates.
    said: AtomicBool,
}

impl Server {
    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        let peers = Peers::default();
        loop {
            let permits = tokio::try_join!(
                Arc::clone(&handshakes).acquire_owned(),
                Arc::clone(&connections).acquire_owned(),
            );
            // Nobody closes the semaphores.
            let Ok((handshake, connection)) = permits else { return };
            match listener.accept().await {
                Ok((stream, peer)) => match peers.admit(peer.ip()) {
                    Some(place) => drop(tokio::spawn(Arc::clone(&self).connection(
                        stream,
                        (handshake, place),
                        connection,
                    ))),
                    None => tracing::debug!(%peer, "too many handshakes at once"),
                },
                Err(error) => {
                    tracing::debug!(%error, "accepting at the control port");
                    sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        handshake: (OwnedSemaphorePermit, Place),
        connection: OwnedSemaphorePermit,
    ) {
        let opened = timeout(HANDSHAKE_LIMIT, self.open(stream)).await;
        drop(handshake);
        let stream = match opened.unwrap_or(Err(HandshakeError::Slow)) {
            Ok(stream) => stream,
            Err(error) => return self.log(&error),
        };
        let routes = routes::router(self.backend.clone(), connection);
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_LIMIT)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes))
            .with_upgrades()
            .await;
        if let Err(error) = served {
            tracing::debug!(error = chain(&error), "serving the control port");
        }
    }

    async fn open(&self, stream: TcpStream) -> Result<TlsStream<TcpStream>, HandshakeError> {
        let config = tls::config(&self.tls).await.map_err(HandshakeError::Config)?;
        // Keystrokes are small and must not wait for each other.
        stream.set_nodelay(true).map_err(HandshakeError::Handshake)?;
        keep_alive(&stream).map_err(|errno| HandshakeError::Handshake(errno.into()))?;
        let stream = TlsAcceptor::from(Arc::new(config))
            .accept(stream)
            .await
            .map_err(HandshakeError::Handshake)?;
        tls::check_client(stream.get_ref().1).map_err(HandshakeError::Client)?;
        Ok(stream)
    }

    /// Anybody who reaches the port can cause these: they don't fill the log.
    fn log(&self, error: &HandshakeError) {
        let first = matches!(error, HandshakeError::Config(_)) && !self.said.swap(true, Ordering::Relaxed);
        let error: &dyn std::error::Error = error;
        if first {
            tracing::warn!(error = chain(error), "nobody can use the control port");
        } else {
            tracing::debug!(error = chain(error), "a connection to the control port was closed");
        }
    }
}

/// Has the kernel end the connection of a peer that has vanished without a word: its node or its network is gone.
fn keep_alive(stream: &TcpStream) -> Result<(), Errno> {
    setsockopt(stream, TcpKeepIdle, &KEEPALIVE_IDLE)?;
    setsockopt(stream, TcpKeepInterval, &KEEPALIVE_INTERVAL)?;
    setsockopt(stream, TcpKeepCount, &KEEPALIVE_PROBES)?;
    setsockopt(stream, KeepAlive, &true)
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::getsockopt;

    use super::*;

    #[tokio::test]
    async fn control_asks_silent_peers_whether_they_are_there() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        keep_alive(&stream).unwrap();
        assert!(getsockopt(&stream, KeepAlive).unwrap());
        let seconds = getsockopt(&stream, TcpKeepIdle).unwrap()
            + getsockopt(&stream, TcpKeepInterval).unwrap() * getsockopt(&stream, TcpKeepCount).unwrap();
        assert_eq!(seconds, 30);
    }
}
