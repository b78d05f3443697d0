//! News of guest agents: somebody in the place of a launcher, at whose port kubernest-api listens.

use std::collections::HashMap;
use std::net::IpAddr;

use axum::extract::{Query, State};
use axum::routing::get;
use axum::{Json, Router, http::StatusCode};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use kube::Api;
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use kubernest_domain::control::{self, AgentState, GuestOsInfo};
use kubernest_domain::paths::CONTROL_PORT;
use kubernest_integration::wait_until;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::own_address;
use super::support::launcher::Authority;
use super::support::{BASE, LIMIT, Setup};

/// What a launcher says of its guest's agent, from now on until it is dropped.
struct Launcher {
    state: watch::Sender<AgentState>,
    /// The revision that kubernest-api last said it knows.
    known: watch::Sender<Option<u64>>,
    listening: tokio::task::JoinHandle<()>,
}

impl Drop for Launcher {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

impl Launcher {
    async fn open(authority: &Authority, own: IpAddr, uid: &str) -> Self {
        let acceptor = authority.acceptor(uid).await;
        let listener = tokio::net::TcpListener::bind((own, CONTROL_PORT)).await.unwrap();
        let state = watch::Sender::default();
        let known = watch::Sender::default();
        let router = router(state.clone(), known.clone());
        let listening = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, service) = (acceptor.clone(), TowerToHyperService::new(router.clone()));
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let stream = TokioIo::new(stream);
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(stream, service)
                        .await;
                });
            }
        });
        Self {
            state,
            known,
            listening,
        }
    }

    /// Waits until what it said last was taken in: the next question comes after the write.
    async fn is_heard(&self) {
        let said = self.state.borrow().revision;
        let mut known = self.known.subscribe();
        let heard = tokio::time::timeout(LIMIT, known.wait_for(|known| *known == Some(said)));
        heard.await.unwrap().unwrap();
    }

    fn says(&self, connected: bool, os: Option<&str>) {
        self.state.send_modify(|state| {
            state.revision += 1;
            state.connected = connected;
            state.os = os.map(|id| GuestOsInfo {
                id: id.to_owned(),
                ..GuestOsInfo::default()
            });
        });
    }
}

/// The state, and the revision that kubernest-api knows.
type Told = (watch::Sender<AgentState>, watch::Sender<Option<u64>>);

fn router(state: watch::Sender<AgentState>, known: watch::Sender<Option<u64>>) -> Router {
    let news = async |State((state, known)): State<Told>, Query(seen): Query<HashMap<String, String>>| {
        let seen = seen.get(control::AGENT_SEEN).and_then(|seen| seen.parse().ok());
        known.send_replace(seen);
        let mut state = state.subscribe();
        let news = state.wait_for(|state| Some(state.revision) != seen).await.unwrap();
        Json(news.clone())
    };
    let silent = async || {
        (
            StatusCode::INTERNAL_SERVER_ERROR,
            "the guest agent did not answer in time",
        )
    };
    Router::new()
        .route(control::AGENT, get(news))
        .route(
            control::GUEST_INFO,
            get(async || Json(json!({"hostname": "tiny", "other": 1}))),
        )
        .route(
            control::GUEST_USERS,
            get(async || Json(json!({"items": [{"userName": "ada"}]}))),
        )
        .route(control::GUEST_FILE_SYSTEMS, get(silent))
        .with_state((state, known))
}

#[tokio::test]
async fn integration_subresources_tell_of_guest_agents() {
    let setup = Setup::start().await;
    let authority = Authority::install(&setup.client).await;
    let own = own_address().await;
    let uid = setup
        .instance("vmi", json!({"phase": "Running", "launcherAddress": own}))
        .await;
    let instances: Api<VirtualMachineInstance> = setup.api();
    let launcher = Launcher::open(&authority, own, &uid).await;
    let ask = async |what: &str| {
        let path = format!("{BASE}/namespaces/org-acme/virtualmachineinstances/vmi/{what}");
        setup.ask("GET", &path, None, Value::Null).await
    };
    // The condition, and what runs in the guest.
    let told = async || {
        let status = instances.get("vmi").await.unwrap().status.unwrap();
        let connected = status.conditions.iter().find(|one| one.type_ == "AgentConnected");
        (
            connected.map(|one| one.status.clone()),
            status.guest_os_info.map(|os| os.id),
        )
    };
    let until = async |connected: bool, os: Option<&str>| {
        let wanted = (connected.then(|| "True".to_owned()), os.map(str::to_owned));
        let reached = wait_until(LIMIT, || async { told().await == wanted }).await;
        assert!(reached, "{:?}, not {wanted:?}: {}", told().await, setup.api.tail(20));
    };
    assert_eq!(ask("userlist").await.0, 409);

    launcher.says(true, Some("tiny"));
    until(true, Some("tiny")).await;
    // What belongs to others stays.
    let status = instances.get("vmi").await.unwrap().status.unwrap();
    assert_eq!(status.launcher_address, Some(own.to_string()));
    let (code, info) = ask("guestosinfo").await;
    let expected = json!({"hostname": "tiny", "os": {}, "fsInfo": {"disks": []}});
    assert_eq!((code, info), (200, expected));
    let (code, users) = ask("userlist").await;
    assert_eq!(
        (code, users),
        (200, json!({"metadata": {}, "items": [{"userName": "ada"}]}))
    );
    let (code, silent) = ask("filesystemlist").await;
    let why = silent["message"].as_str().unwrap();
    assert!(code == 500 && why.contains("did not answer in time"), "{code} {why}");

    // What is new though it says the same is not written.
    let version = async || instances.get("vmi").await.unwrap().metadata.resource_version;
    let before = version().await;
    launcher.says(true, Some("tiny"));
    launcher.is_heard().await;
    assert_eq!(version().await, before);
    launcher.says(false, None);
    until(false, None).await;
    let (code, gone) = ask("guestosinfo").await;
    let why = gone["message"].as_str().unwrap();
    assert!(code == 409 && why.ends_with(control::NO_AGENT), "{code} {why}");
    // Somebody else's word is set right.
    let other = json!({"status": {"guestOSInfo": {"id": "other"}}});
    let params = kube::api::PatchParams::default();
    let patch = kube::api::Patch::Merge(other);
    instances.patch_status("vmi", &params, &patch).await.unwrap();
    until(false, None).await;
}
