use std::{convert::Infallible, future::ready};

use base64::{Engine, engine::general_purpose::STANDARD};
use http_body_util::BodyExt;
use kube::{
    client::{Body, DynBody},
    core::Status,
};
use serde_json::{Value, json};
use tower::BoxError;

use super::*;
use crate::tenantcluster::{
    build::pki::{BOOTSTRAP_GROUP, tests::authorities},
    validate::{
        tests::{cluster, options},
        validate,
    },
};

const SLOT: &str = "customera-a-0";

/// Follows a tenant that answers so (requests are counted by method and path), for so long; when the reconciler was woken.
async fn follow(lasting: Duration, answer: fn(&str, &str) -> (u16, Value)) -> (BTreeMap<String, usize>, Vec<Instant>) {
    let asked = Arc::new(Mutex::new(BTreeMap::new()));
    let counted = asked.clone();
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let (method, path) = (request.method().as_str(), request.uri().path());
        *lock(&counted).entry(format!("{method} {path}")).or_default() += 1;
        let (code, body) = answer(method, path);
        let body = Body::from(body.to_string().into_bytes()).map_err(BoxError::from);
        let mut answer = http::Response::new(Box::new(body) as Box<DynBody>);
        *answer.status_mut() = http::StatusCode::from_u16(code).unwrap();
        ready(Ok::<_, Infallible>(answer))
    });
    let client = ClientBuilder::new(service, "default")
        .with_layer(&Bounds::new())
        .build();
    let valid = validate(&cluster(json!({"version": "v1.35.4"})), &options()).unwrap();
    let named = ObjectRef::new("customera").within("org-acme");
    let (_slots, slots) = watch::channel(BTreeMap::from([(SLOT.to_owned(), Ipv4Addr::new(100, 64, 0, 20))]));
    let (wake, mut woken) = mpsc::unbounded();
    let task = Task {
        client: client.clone(),
        cluster: named.clone(),
        view: Arc::default(),
        slots,
        looked: watch::channel(false).0,
        restart: Arc::default(),
        wake,
        wake_at: Mutex::new(Instant::now()),
        signer: Signer::new(client, named, Arc::new(authorities(&valid))),
    };
    let mut wakes = Vec::new();
    let count = async {
        while woken.next().await.is_some() {
            wakes.push(Instant::now());
        }
    };
    let both = async { tokio::join!(task.run(), count) };
    assert!(tokio::time::timeout(lasting, both).await.is_err());
    let asked = lock(&asked).clone();
    (asked, wakes)
}

fn version(path: &str) -> Option<(u16, Value)> {
    let info = || json!({"major": "1", "minor": "35", "gitVersion": "v1.35.4"});
    ["/readyz", "/version"].contains(&path).then(|| (200, info()))
}

fn failed(code: u16) -> (u16, Value) {
    (code, json!({"kind": "Status", "status": "Failure", "code": code}))
}

#[tokio::test(start_paused = true)]
async fn link_that_breaks_at_once_waits_longer_each_time() {
    let minute = Duration::from_secs(60);
    let (asked, wakes) = follow(minute, |method, path| {
        let request = include_str!("../testdata/client.csr");
        let csr = json!({
            "metadata": {"name": "csr-1", "uid": "1"},
            "spec": {
                "signerName": "kubernetes.io/kube-apiserver-client-kubelet", "request": STANDARD.encode(request),
                "username": format!("kubernest:bootstrap:{SLOT}"), "groups": [BOOTSTRAP_GROUP],
                "usages": ["client auth"],
            },
        });
        let list = json!({"metadata": {"resourceVersion": "1"}, "items": [csr]});
        version(path).unwrap_or_else(|| match (method, path) {
            ("PATCH", _) => failed(500),
            ("GET", "/apis/certificates.k8s.io/v1/certificatesigningrequests") => (200, list),
            _ => failed(404),
        })
    })
    .await;
    let path = "PATCH /apis/certificates.k8s.io/v1/certificatesigningrequests/csr-1/approval";
    let tries = asked.get(path).copied().unwrap_or_default();
    assert!((2..=7).contains(&tries), "{asked:?}");
    let often = wakes.windows(2).any(|two| two[1] - two[0] < WAKE_PAUSE);
    assert!(!often && wakes.len() <= 2 * (tries + 1), "{wakes:?}");
}

#[tokio::test(start_paused = true)]
async fn link_is_not_driven_by_lists_and_watches_without_end() {
    let minute = Duration::from_secs(60);
    // No list ends.
    let (asked, _) = follow(minute, |_, path| {
        let page = json!({"metadata": {"resourceVersion": "1", "continue": "more"}, "items": []});
        version(path).unwrap_or((200, page))
    })
    .await;
    assert!(asked.values().sum::<usize>() <= 20 * 62, "{asked:?}");
    // Each watch ends at once.
    let (asked, _) = follow(minute, |_, path| {
        version(path).unwrap_or((200, json!({"metadata": {"resourceVersion": "1"}, "items": []})))
    })
    .await;
    assert!(asked.values().sum::<usize>() <= 20 * 62, "{asked:?}");
}

#[test]
fn link_names_only_the_failing_checks_of_readyz() {
    let said = "[+]ping ok\n[-]informer-sync failed: reason withheld\n[+]log ok\n[-]shutdown failed: reason withheld\n[-]a failed\nreadyz check failed";
    let status = Status::failure(said, "InternalError").with_code(500);
    let error = LinkError::Api("answer /readyz", kube::Error::Api(status.boxed()));
    assert_eq!(
        not_ready(&error),
        "/readyz waits for informer-sync, shutdown and 1 more"
    );
}

#[test]
fn link_says_how_far_the_way_to_a_starting_api_server_leads() {
    let said = |cause: io::Error| {
        let error = kube::Error::Service(Box::new(cause));
        not_ready(&LinkError::Api("answer /readyz", error))
    };
    assert_eq!(
        said(io::ErrorKind::ConnectionRefused.into()),
        "its port is not open yet"
    );
    assert_eq!(said(io::ErrorKind::HostUnreachable.into()), "its network is not up yet");
    assert_eq!(said(io::Error::other("certificate expired")), "certificate expired");
}
