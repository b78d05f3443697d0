use std::{
    convert::Infallible,
    sync::atomic::{AtomicUsize, Ordering},
};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::client::Body;

use super::*;

/// A client whose API server answers `answer(method, path)` and counts the requests.
fn client(answer: fn(&str, &str) -> (u16, Value)) -> (Client, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let service = tower::service_fn(move |request: http::Request<Body>| {
        counted.fetch_add(1, Ordering::SeqCst);
        let (code, body) = answer(request.method().as_str(), request.uri().path());
        async move {
            let mut response = http::Response::new(Body::from(body.to_string().into_bytes()));
            *response.status_mut() = http::StatusCode::from_u16(code).unwrap();
            Ok::<_, Infallible>(response)
        }
    });
    (Client::new(service, "default"), count)
}

fn config_map(value: &str, version: Option<&str>) -> ConfigMap {
    serde_json::from_value(json!({
        "metadata": {"name": "a", "namespace": "n", "uid": "u", "resourceVersion": version},
        "data": {"k": value},
    }))
    .unwrap()
}

fn stored(_: &str, _: &str) -> (u16, Value) {
    (200, serde_json::to_value(config_map("1", Some("7"))).unwrap())
}

fn status(code: u16, reason: &str) -> (u16, Value) {
    (
        code,
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}),
    )
}

#[tokio::test]
async fn apply_sends_nothing_when_nothing_changed() {
    let (client, count) = client(stored);
    let applier = Applier::new(client, "kubernest-test");
    let desired = config_map("1", None);
    let observed = applier.apply(&desired, None).await.unwrap();
    applier.apply(&desired, Some(&observed)).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 1);
    applier.apply(&config_map("2", None), Some(&observed)).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 2, "another desired state is sent");
    applier
        .apply(&config_map("2", None), Some(&config_map("1", Some("8"))))
        .await
        .unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 3, "a changed object is applied again");
}

#[tokio::test]
async fn apply_keeps_no_long_resource_version() {
    let (client, _) = client(|_, _| {
        let said = config_map("1", Some(&"7".repeat(VERSION_BYTES + 1)));
        (200, serde_json::to_value(said).unwrap())
    });
    let applier = Applier::new(client, "kubernest-test");
    applier.apply(&config_map("1", None), None).await.unwrap();
    assert!(applier.remembered().is_empty());
}

#[tokio::test]
async fn create_if_absent_returns_the_object_that_was_there() {
    let (client, count) = client(|method, path| match method {
        "POST" => status(409, "AlreadyExists"),
        _ => stored(method, path),
    });
    let existing = Applier::new(client, "kubernest-test")
        .create_if_absent(&config_map("mine", None))
        .await
        .unwrap();
    assert_eq!(existing.data.unwrap()["k"], "1");
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn delete_of_what_is_gone_or_replaced_is_success() {
    let (client, _) = client(|_, path| {
        if path.contains("n") {
            status(404, "NotFound")
        } else {
            status(409, "Conflict")
        }
    });
    Applier::new(client, "kubernest-test")
        .delete(&config_map("1", None))
        .await
        .unwrap();
}

#[tokio::test]
async fn apply_error_names_the_object() {
    let (client, _) = client(|_, _| status(403, "Forbidden"));
    let error = Applier::new(client, "kubernest-test")
        .apply(&config_map("1", None), None)
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "cannot apply ConfigMap n/a");
    assert_eq!(error.code(), Some(403));
}
