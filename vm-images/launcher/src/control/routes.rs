//! The control port's paths: what each does with a request of a client that is believed.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, Request as HttpRequest, State};
use axum::http::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, UPGRADE};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, put};
use axum::{Json, Router};
use futures::Stream;
use futures::stream::unfold;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use kubernest_domain::control::{self, AgentState, GuestList};
use serde::Serialize;
use tokio::io::{AsyncWriteExt, copy, split};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::timeout;

use super::{Backend, Command};
use crate::agent::AgentError;
use crate::camera::{CameraError, Picture};
use crate::chain;
use crate::seat::Place;
use crate::state::{Refusal, Request};

/// How long libvirt may take for a command; a moment is usual. Less than the 30 s that kubernest-api gives a request
/// with all of its connecting, so that its client hears what the matter is.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// Bytes of a picture that are handed over at once.
const PIECE: usize = 64 << 10;
/// How long a client may take to hear that its stream has ended.
const GOODBYE_LIMIT: Duration = Duration::from_secs(5);

/// One connection of a client that is believed.
#[derive(Clone)]
struct Connection {
    backend: Backend,
    /// Its streams outlive its HTTP.
    permit: Arc<OwnedSemaphorePermit>,
}

/// What a connection may ask for.
pub(super) fn router(backend: Backend, permit: OwnedSemaphorePermit) -> Router {
    let permit = Arc::new(permit);
    Router::new()
        .route(control::CONSOLE, get(console))
        .route(control::VNC, get(vnc))
        .route(control::SCREENSHOT, get(screenshot))
        .route(control::AGENT, get(agent))
        .route(control::GUEST_INFO, get(guest_info))
        .route(control::GUEST_USERS, get(guest_users))
        .route(control::GUEST_FILE_SYSTEMS, get(guest_file_systems))
        .route(control::PAUSE, command(Request::Pause))
        .route(control::UNPAUSE, command(Request::Unpause))
        .route(control::SOFT_REBOOT, command(Request::SoftReboot))
        .route(control::RESET, command(Request::Reset))
        .with_state(Connection { backend, permit })
}

fn command(request: Request) -> MethodRouter<Connection> {
    put(async move |State(connection): State<Connection>| carry_out(&connection.backend, request).await)
}

/// Has the domain's owner do it.
async fn carry_out(backend: &Backend, request: Request) -> Response {
    let (reply, answer) = oneshot::channel();
    let ask = async {
        backend.commands.send(Command { request, reply }).await.ok()?;
        answer.await.ok()
    };
    let (status, sentence) = match timeout(ANSWER_LIMIT, ask).await {
        Ok(Some(Ok(()))) => return StatusCode::OK.into_response(),
        Ok(Some(Err(Refusal::Failed(why)))) => (StatusCode::INTERNAL_SERVER_ERROR, why),
        Ok(Some(Err(refusal))) => (StatusCode::CONFLICT, refusal.to_string()),
        // The owner is gone, and the domain before it.
        Ok(None) => (StatusCode::CONFLICT, Refusal::NotRunning.to_string()),
        Err(_) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("libvirt did not answer within {} s", ANSWER_LIMIT.as_secs()),
        ),
    };
    tracing::info!(?request, sentence, "a command was not carried out");
    (status, sentence).into_response()
}

async fn agent(State(connection): State<Connection>, Query(query): Query<HashMap<String, String>>) -> Json<AgentState> {
    let seen = query.get(control::AGENT_SEEN).and_then(|seen| seen.parse().ok());
    Json(connection.backend.agent.news(seen).await)
}

async fn guest_info(State(connection): State<Connection>) -> Response {
    told(connection.backend.agent.info().await)
}

async fn guest_users(State(connection): State<Connection>) -> Response {
    told(connection.backend.agent.users().await.map(GuestList::from))
}

async fn guest_file_systems(State(connection): State<Connection>) -> Response {
    told(connection.backend.agent.file_systems().await.map(GuestList::from))
}

/// What the guest's agent has said.
fn told<T: Serialize>(answer: Result<T, AgentError>) -> Response {
    match answer {
        Ok(answer) => Json(answer).into_response(),
        Err(AgentError::NotConnected) => (StatusCode::CONFLICT, control::NO_AGENT).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, chain(&error)).into_response(),
    }
}

async fn console(State(connection): State<Connection>, request: HttpRequest) -> Response {
    let Some(console) = connection.backend.console else {
        return (StatusCode::NOT_FOUND, "the machine has no serial console").into_response();
    };
    let Some(upgrade) = upgrade(request) else {
        return upgrade_required();
    };
    tokio::spawn(async move {
        let _permit = connection.permit;
        if let Some(stream) = upgraded(upgrade).await {
            console.attach(stream).await;
        }
    });
    switching_protocols()
}

async fn vnc(
    State(connection): State<Connection>,
    Query(query): Query<HashMap<String, String>>,
    request: HttpRequest,
) -> Response {
    let Some(screen) = connection.backend.screen else {
        return no_graphics();
    };
    let Some(upgrade) = upgrade(request) else {
        return upgrade_required();
    };
    // Before the seat is taken: who can't see anything takes nobody's place.
    let qemu = match UnixStream::connect(&screen.socket).await {
        Ok(qemu) => qemu,
        Err(error) => return no_screen(&error),
    };
    let preserve = query
        .get(control::PRESERVE_SESSION)
        .is_some_and(|value| value == "true");
    let place = match preserve {
        true => screen.seat.take_free(),
        false => Some(screen.seat.take()),
    };
    let Some(place) = place else {
        return (StatusCode::CONFLICT, control::SESSION_OPEN).into_response();
    };
    tokio::spawn(async move {
        let _permit = connection.permit;
        if let Some(stream) = upgraded(upgrade).await {
            relay(stream, qemu, &place).await;
        }
    });
    switching_protocols()
}

async fn screenshot(State(connection): State<Connection>) -> Response {
    let Some(screen) = connection.backend.screen else {
        return no_graphics();
    };
    let (status, sentence) = match timeout(ANSWER_LIMIT, screen.camera.take()).await {
        Ok(Ok(picture)) => {
            let length = picture.png.len();
            let headers = [
                (CONTENT_TYPE, "image/png".to_owned()),
                (CONTENT_LENGTH, length.to_string()),
            ];
            return (headers, Body::from_stream(pieces(picture))).into_response();
        }
        Ok(Err(CameraError::NotRunning)) => (StatusCode::CONFLICT, control::NOT_RUNNING.to_owned()),
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, chain(&error)),
        Err(_) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("no picture came within {} s", ANSWER_LIMIT.as_secs()),
        ),
    };
    tracing::info!(sentence, "no picture was taken");
    (status, sentence).into_response()
}

/// No faster than they are read, so that the next picture waits for this one's reader.
fn pieces(picture: Picture) -> impl Stream<Item = Result<Bytes, Infallible>> {
    unfold(picture, async |mut picture| {
        let piece = picture.png.split_to(picture.png.len().min(PIECE));
        (!piece.is_empty()).then(|| (Ok(piece), picture))
    })
}

fn no_graphics() -> Response {
    (StatusCode::NOT_FOUND, "the machine has no graphics device").into_response()
}

fn no_screen(error: &std::io::Error) -> Response {
    match error.kind() {
        // qemu has not come so far, or is gone.
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => (StatusCode::CONFLICT, control::NOT_RUNNING.to_owned()),
        _ => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("connecting to the screen: {}", chain(error)),
        ),
    }
    .into_response()
}

/// Copies both ways until one side closes or a newer session has come.
async fn relay(client: TokioIo<Upgraded>, mut qemu: UnixStream, place: &Place) {
    tracing::info!("a session looks at the screen");
    let (mut from_client, mut to_client) = split(client);
    let (mut from_qemu, mut to_qemu) = qemu.split();
    let ended = tokio::select! {
        ended = copy(&mut from_client, &mut to_qemu) => ended,
        ended = copy(&mut from_qemu, &mut to_client) => ended,
        () = place.lost() => Ok(0),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "copying the screen");
    }
    let _ = timeout(GOODBYE_LIMIT, to_client.shutdown()).await;
}

/// The stream to come, if the request asks for one (RFC 9110, section 7.8).
fn upgrade(request: HttpRequest) -> Option<OnUpgrade> {
    let headers = request.headers();
    let asked = has_token(headers, &CONNECTION, "upgrade") && has_token(headers, &UPGRADE, control::STREAM_PROTOCOL);
    asked.then(|| hyper::upgrade::on(request))
}

fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|value| value.trim().eq_ignore_ascii_case(token))
}

async fn upgraded(upgrade: OnUpgrade) -> Option<TokioIo<Upgraded>> {
    match upgrade.await {
        Ok(stream) => Some(TokioIo::new(stream)),
        Err(error) => {
            tracing::debug!(error = chain(&error), "switching to a stream");
            None
        }
    }
}

fn switching_protocols() -> Response {
    upgrade_headers(StatusCode::SWITCHING_PROTOCOLS, Body::empty())
}

fn upgrade_required() -> Response {
    let sentence = format!("this is a stream: ask for an upgrade to {}\n", control::STREAM_PROTOCOL);
    upgrade_headers(StatusCode::UPGRADE_REQUIRED, Body::from(sentence))
}

fn upgrade_headers(status: StatusCode, body: Body) -> Response {
    let headers = [(CONNECTION, "Upgrade"), (UPGRADE, control::STREAM_PROTOCOL)];
    (status, headers, body).into_response()
}
