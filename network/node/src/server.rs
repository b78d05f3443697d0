//! The agent's end of the CNI plugin: `POST /v1/cni` on a unix socket that only root may open.
//!
//! Answers 200 with the result, else an error as the CNI specification wants it; the plugin passes either on unread.
//! Decides nothing about networks.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Json, State};
use axum::routing::post;
use axum::serve::IncomingStream;
use http::StatusCode;
use kubernest_plan::Call;
use kubernest_plan::cni::{self, Command, WireCall};
use serde_json::Value;
use tokio::net::UnixListener;

use crate::attach::{AttachError, Attacher};
use crate::metrics::Metrics;
use crate::netns::{Netns, NetnsError};

/// The largest call that is read, in bytes; real ones have some hundreds.
const MAX_CALL: usize = 256 * 1024;

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No socket.
    #[error("listen on {0}")]
    Listen(PathBuf, #[source] io::Error),
    /// The server ended.
    #[error("serve CNI calls")]
    Serve(#[source] io::Error),
}

/// Who called.
#[derive(Debug, Clone, Copy)]
struct Caller {
    root: bool,
    process: Option<i32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let peer = stream.io().peer_cred().ok();
        Self {
            root: peer.is_some_and(|peer| peer.uid() == 0),
            process: peer.and_then(|peer| peer.pid()),
        }
    }
}

impl Caller {
    /// The namespace at the caller's path. The runtime may have a root of its own; the caller waits for the answer, so
    /// its process is there.
    fn netns(self, path: &str) -> Result<Netns, NetnsError> {
        match self.process {
            Some(process) => Netns::open_in(
                &Path::new("/proc").join(process.to_string()).join("root"),
                Path::new(path),
            ),
            None => Netns::open(path),
        }
    }
}

#[derive(Clone)]
struct Server {
    attacher: Arc<Attacher>,
    metrics: Arc<Metrics>,
}

/// Listens on a socket that only root may open, in place of an earlier one.
///
/// # Errors
/// [`ServerError::Listen`].
pub fn listen(socket: &Path) -> Result<UnixListener, ServerError> {
    let listen = || {
        if let Some(folder) = socket.parent() {
            std::fs::create_dir_all(folder)?;
        }
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    listen().map_err(|source| ServerError::Listen(socket.to_owned(), source))
}

/// Serves CNI calls until the listener fails.
///
/// # Errors
/// [`ServerError::Serve`].
pub async fn serve(listener: UnixListener, attacher: Arc<Attacher>, metrics: Arc<Metrics>) -> Result<(), ServerError> {
    let router = Router::new()
        .route("/v1/cni", post(call))
        .layer(DefaultBodyLimit::max(MAX_CALL))
        .with_state(Server { attacher, metrics });
    axum::serve(listener, router.into_make_service_with_connect_info::<Caller>())
        .await
        .map_err(ServerError::Serve)
}

async fn call(
    ConnectInfo(caller): ConnectInfo<Caller>,
    State(server): State<Server>,
    Json(wire): Json<WireCall>,
) -> (StatusCode, Json<Value>) {
    if !caller.root {
        return (
            StatusCode::FORBIDDEN,
            Json(cni::failed(4, "only root may call the CNI plugin", "")),
        );
    }
    // A runtime that gives up must not leave a half-made attachment: the work goes on to its end.
    let work = tokio::spawn(async move { answer(&server, caller, wire).await });
    work.await.unwrap_or_else(|error| {
        let message = format!("kubernest-node failed inside: {error}");
        (
            StatusCode::INTERNAL_SERVER_ERROR,
            Json(cni::failed(101, &message, "see its logs")),
        )
    })
}

async fn answer(server: &Server, caller: Caller, wire: WireCall) -> (StatusCode, Json<Value>) {
    let started = Instant::now();
    let arg = |key: &str| wire.args.get(key).cloned().unwrap_or_default();
    let (namespace, pod) = (arg("K8S_POD_NAMESPACE"), arg("K8S_POD_NAME"));
    let (container, tap) = (wire.container_id.clone(), wire.ifname.clone());
    let (command, result) = match Call::parse(wire) {
        Ok(call) => (Some(call.command()), carry_out(&server.attacher, caller, call).await),
        Err(refused) => (None, Err(refused.into())),
    };
    let took = started.elapsed();
    let label = command.map_or("refused", label);
    server
        .metrics
        .cni(label, result.as_ref().err().map_or(0, AttachError::code), took);
    match result {
        Ok(value) => {
            tracing::info!(
                command = label,
                namespace,
                pod,
                container,
                tap,
                ms = took.as_millis(),
                "CNI call done"
            );
            (StatusCode::OK, Json(value))
        }
        Err(error) => {
            let message = whole_message(&error);
            tracing::warn!(
                command = label,
                namespace,
                pod,
                container,
                tap,
                error = message,
                "CNI call failed"
            );
            (
                StatusCode::UNPROCESSABLE_ENTITY,
                Json(cni::failed(error.code(), &message, "")),
            )
        }
    }
}

async fn carry_out(attacher: &Attacher, caller: Caller, call: Call) -> Result<Value, AttachError> {
    match call {
        Call::Add(request) => attacher.add(&request, caller.netns(&request.netns)?).await,
        Call::Check(request) => attacher
            .check(&request, caller.netns(&request.netns)?)
            .await
            .map(|()| Value::Null),
        Call::Del(None) => Ok(Value::Null),
        Call::Del(Some(removal)) => {
            let netns = match removal.netns.as_deref().map(|path| caller.netns(path)) {
                None => None,
                Some(Err(error)) if error.is_gone() => None,
                Some(opened) => Some(opened?),
            };
            attacher.del(&removal, netns).await.map(|()| Value::Null)
        }
        Call::Status => attacher.ready().map(|()| Value::Null),
    }
}

fn label(command: Command) -> &'static str {
    match command {
        Command::Add => "ADD",
        Command::Check => "CHECK",
        Command::Del => "DEL",
        Command::Status => "STATUS",
    }
}

/// An error and all its causes: the runtime puts it into the pod's events, where nobody can ask further.
fn whole_message(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        // `LinkError` and rtnetlink's own words say the same twice.
        if !message.contains(&text) && !text.starts_with("Received a netlink") {
            message = format!("{message}: {text}");
        }
        source = cause.source();
    }
    message
}
