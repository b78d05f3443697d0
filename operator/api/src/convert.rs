//! Conversion between the versions of `kubevirt.io` (apiextensions.k8s.io/v1 ConversionReview).
//!
//! v1alpha3 is v1 under its former name: only `apiVersion` differs, as upstream.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

const VERSIONS: [&str; 2] = ["kubevirt.io/v1", "kubevirt.io/v1alpha3"];

/// The review that the API server sends, and its answer.
#[derive(Debug, Deserialize)]
struct ConversionReview<'a> {
    #[serde(borrow)]
    request: Request<'a>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    uid: String,
    #[serde(rename = "desiredAPIVersion")]
    desired: String,
    #[serde(borrow, default)]
    objects: Vec<&'a RawValue>,
}

/// An object's fields; only one is read. A list's page of them may be large.
type Fields<'a> = BTreeMap<String, &'a RawValue>;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Response<'a> {
    uid: String,
    result: Outcome,
    converted_objects: Vec<Fields<'a>>,
}

#[derive(Serialize)]
struct Outcome {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer<'a> {
    api_version: &'static str,
    kind: &'static str,
    response: Response<'a>,
}

/// Converts all objects of a review or none.
///
/// # Errors
/// What is no review cannot be answered.
pub fn convert(review: &[u8]) -> serde_json::Result<Vec<u8>> {
    let Request { uid, desired, objects } = serde_json::from_slice::<ConversionReview<'_>>(review)?.request;
    let desired_text = serde_json::value::to_raw_value(&desired)?;
    let mut converted = Vec::with_capacity(objects.len());
    let mut message = unknown(&desired);
    for object in objects {
        let mut fields: Fields<'_> = serde_json::from_str(object.get())?;
        let current = fields.insert("apiVersion".to_owned(), &desired_text);
        let current: String = current.map_or(Ok(String::new()), |current| serde_json::from_str(current.get()))?;
        message = message.or_else(|| unknown(&current));
        converted.push(fields);
    }
    if let Some(message) = &message {
        tracing::warn!(message, "cannot convert");
        converted.clear();
    }
    let status = if message.is_some() { "Failure" } else { "Success" };
    serde_json::to_vec(&Answer {
        api_version: "apiextensions.k8s.io/v1",
        kind: "ConversionReview",
        response: Response {
            uid,
            result: Outcome { status, message },
            converted_objects: converted,
        },
    })
}

fn unknown(version: &str) -> Option<String> {
    (!VERSIONS.contains(&version)).then(|| {
        let known = VERSIONS.join(", ");
        format!("no conversion from or to {version:?}: known are {known}")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn convert_changes_nothing_but_the_version() {
        let convert = |current: &str, desired: &str| -> Value {
            let object = json!({"apiVersion": current, "kind": "VirtualMachine", "spec": {"x": 1}});
            let request = json!({"uid": "u", "desiredAPIVersion": desired, "objects": [object]});
            let review = json!({"request": request}).to_string();
            serde_json::from_slice(&convert(review.as_bytes()).unwrap()).unwrap()
        };
        let answer = convert("kubevirt.io/v1alpha3", "kubevirt.io/v1");
        assert_eq!(answer["response"]["uid"], "u");
        assert_eq!(answer["response"]["result"], json!({"status": "Success"}));
        let converted = json!([{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "spec": {"x": 1}}]);
        assert_eq!(answer["response"]["convertedObjects"], converted);
        for (current, desired) in [
            ("kubevirt.io/v1", "kubevirt.io/v2"),
            ("kubevirt.io/v2", "kubevirt.io/v1"),
        ] {
            let answer = convert(current, desired);
            assert_eq!(answer["response"]["result"]["status"], "Failure");
            let message = answer["response"]["result"]["message"].as_str().unwrap();
            assert!(message.contains("\"kubevirt.io/v2\""), "{message}");
            assert_eq!(answer["response"]["convertedObjects"], json!([]));
        }
    }

    #[test]
    fn convert_refuses_what_is_no_review() {
        for text in [
            "",
            "{}",
            r#"{"request":{"uid":"u","desiredAPIVersion":"kubevirt.io/v1","objects":[1]}}"#,
        ] {
            assert!(convert(text.as_bytes()).is_err());
        }
    }
}
