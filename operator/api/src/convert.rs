//! Conversion between the versions of `kubevirt.io` (apiextensions.k8s.io/v1 ConversionReview).
//!
//! v1alpha3 is v1 under its former name: only `apiVersion` differs, as upstream.

use axum::Json;
use serde::Deserialize;
use serde_json::{Value, json};

const VERSIONS: [&str; 2] = ["kubevirt.io/v1", "kubevirt.io/v1alpha3"];

/// The review that the API server sends.
#[derive(Debug, Deserialize)]
pub struct ConversionReview {
    request: Request,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    uid: String,
    #[serde(rename = "desiredAPIVersion")]
    desired: String,
    #[serde(default)]
    objects: Vec<Value>,
}

/// Converts all objects of a review or none.
pub async fn convert(Json(review): Json<ConversionReview>) -> Json<Value> {
    let Request { uid, desired, objects } = review.request;
    let converted: Result<Vec<Value>, String> = objects.into_iter().map(|object| to(object, &desired)).collect();
    let response = match converted {
        Ok(objects) => json!({"uid": uid, "result": {"status": "Success"}, "convertedObjects": objects}),
        Err(message) => {
            tracing::warn!(message, "cannot convert");
            json!({"uid": uid, "result": {"status": "Failure", "message": message}})
        }
    };
    Json(json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "ConversionReview", "response": response}))
}

fn to(mut object: Value, desired: &str) -> Result<Value, String> {
    let current = object.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
    for version in [current, desired] {
        if !VERSIONS.contains(&version) {
            return Err(format!(
                "no conversion from or to {version:?}: known are {}",
                VERSIONS.join(", ")
            ));
        }
    }
    object["apiVersion"] = json!(desired);
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn convert_changes_nothing_but_the_version() {
        let review = |desired: &str| {
            let object = json!({"apiVersion": "kubevirt.io/v1alpha3", "kind": "VirtualMachine", "spec": {"x": 1}});
            let request = json!({"uid": "u", "desiredAPIVersion": desired, "objects": [object]});
            serde_json::from_value(json!({"request": request})).unwrap()
        };
        let Json(answer) = convert(Json(review("kubevirt.io/v1"))).await;
        assert_eq!(answer["response"]["result"]["status"], "Success");
        let converted = json!([{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "spec": {"x": 1}}]);
        assert_eq!(answer["response"]["convertedObjects"], converted);
        let Json(answer) = convert(Json(review("kubevirt.io/v2"))).await;
        assert_eq!(answer["response"]["result"]["status"], "Failure");
    }
}
