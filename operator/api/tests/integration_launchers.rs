//! What kubernest-api makes of what launchers answer: of real ones' pictures, and of hostile ones' floods.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test; helpers count as production code for clippy"
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::BodyExt;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::Api;
use kube::api::{Patch, PatchParams};
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use kubernest_domain::control;
use kubernest_integration::wait_until;
use serde_json::{Value, json};
use support::launcher::{Asked, Authority, Launcher};
use support::{BASE, LIMIT, Setup, create};
use tokio::io::AsyncWriteExt;

/// A PNG's first bytes, and more of them than one piece has.
fn picture() -> Vec<u8> {
    let mut picture = b"\x89PNG\r\n\x1a\n".to_vec();
    picture.resize(1 << 20, 7);
    picture
}

/// Counts the pictures in `taken`; other questions get no answer.
async fn answers_with_a_picture(mut stream: Asked, head: String, taken: Arc<AtomicUsize>) {
    if !head.starts_with(&format!("GET {} ", control::SCREENSHOT)) {
        return;
    }
    taken.fetch_add(1, Ordering::SeqCst);
    let length = picture().len();
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all(answer.as_bytes()).await.unwrap();
    stream.write_all(&picture()).await.unwrap();
    stream.shutdown().await.unwrap();
}

#[tokio::test]
async fn integration_screenshots_are_pictures_for_who_may_see_the_screen() {
    let setup = Setup::start().await;
    let authority = Authority::install(&setup.client).await;
    let uid = setup
        .instance("vmi", json!({"phase": "Running", "launcherAddress": "127.0.4.1"}))
        .await;
    let taken = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&taken);
    let behave = move |stream, head| answers_with_a_picture(stream, head, Arc::clone(&counter));
    let _launcher = Launcher::start(&authority, [127, 0, 4, 1], &uid, behave).await;
    let path = format!("{BASE}/namespaces/org-acme/virtualmachineinstances/vmi/vnc/screenshot");
    let get = |query: &str, user: &str| {
        let request = http::Request::get(format!("{path}{query}")).header("impersonate-user", user);
        let request = request.body(kube::client::Body::empty()).unwrap();
        let client = setup.client.clone();
        async move {
            let response = client.send(request).await.unwrap();
            let (head, body) = response.into_parts();
            (head, body.collect().await.unwrap().to_bytes())
        }
    };
    let (head, _) = get("", "ada").await;
    assert_eq!((head.status.as_u16(), taken.load(Ordering::SeqCst)), (403, 0));
    // As the API server reads the path it is below `vnc`, and so it asks for that as well.
    let group = "subresources.kubevirt.io";
    let resources = ["virtualmachineinstances/vnc", "virtualmachineinstances/vnc/screenshot"];
    let rule = json!({"apiGroups": [group], "resources": resources, "verbs": ["get"]});
    let role = json!({"metadata": {"name": "see"}, "rules": [rule]});
    create::<Role>(&setup.client, Some("org-acme"), role).await;
    let binding = json!({
        "metadata": {"name": "see"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "see"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "ada"}],
    });
    create::<RoleBinding>(&setup.client, Some("org-acme"), binding).await;
    let allowed = wait_until(LIMIT, || async { get("", "ada").await.0.status == 200 });
    assert!(allowed.await, "{}", setup.api.tail(20));
    let (head, body) = get("?moveCursor=false", "ada").await;
    assert_eq!(head.status.as_u16(), 200);
    assert_eq!(&head.headers["content-type"], "image/png");
    assert_eq!(&head.headers["x-content-type-options"], "nosniff");
    assert!(body == picture(), "{} bytes", body.len());

    let instances: Api<VirtualMachineInstance> = setup.api();
    let said = async |query: &str, status: Value| {
        let patch = Patch::Merge(json!({"status": status}));
        let params = PatchParams::default();
        instances.patch_status("vmi", &params, &patch).await.unwrap();
        let (head, body) = get(query, "ada").await;
        let status: Value = serde_json::from_slice(&body).unwrap();
        (head.status.as_u16(), status["message"].as_str().unwrap().to_owned())
    };
    let running = json!({"phase": "Running"});
    assert_eq!(
        said("?moveCursor=true", running).await,
        (400, "moveCursor: not supported".to_owned())
    );
    assert_eq!(
        said("", json!({"phase": "Scheduled"})).await,
        (400, control::NOT_RUNNING.to_owned())
    );
    let patch = Patch::Merge(json!({"spec": {"domain": {"devices": {"autoattachGraphicsDevice": false}}}}));
    instances.patch("vmi", &PatchParams::default(), &patch).await.unwrap();
    assert_eq!(
        said("", json!({"phase": "Running"})).await,
        (400, "No graphics devices are present.".to_owned())
    );
}
