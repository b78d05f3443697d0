//! AdmissionReview on the wire (admission.k8s.io/v1): the request's parts that decisions need, and the answer.
//!
//! Objects stay raw JSON, so that fields unknown to our types are still there to be refused.

use base64::{Engine, engine::general_purpose::STANDARD};
use kubernest_admission::{Decision, Mutation};
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use crate::bodies::{VALUES, values};

/// The review that the API server sends, its objects not read yet.
#[derive(Debug, Deserialize)]
pub struct AdmissionReview<'a> {
    #[serde(borrow)]
    pub request: Request<&'a RawValue>,
}

/// Its request.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request<Object = Value> {
    pub uid: String,
    pub kind: Kind,
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub namespace: String,
    pub operation: Operation,
    pub object: Option<Object>,
    pub old_object: Option<Object>,
    #[serde(default)]
    pub user_info: UserInfo,
}

/// What is done to the object. One of few, as the metrics count by it.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Operation {
    Create,
    Update,
    Delete,
}

impl Operation {
    /// As on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Create => "CREATE",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
        }
    }
}

/// Kind of the object.
#[derive(Debug, Deserialize)]
pub struct Kind {
    #[serde(default)]
    pub group: String,
    pub kind: String,
}

/// Who asks.
#[derive(Debug, Default, Deserialize)]
pub struct UserInfo {
    #[serde(default)]
    pub username: String,
}

impl Request<&RawValue> {
    /// How many values there are to be read.
    pub fn values(&self) -> usize {
        let objects = [self.object, self.old_object];
        objects.iter().flatten().map(|object| count(object)).sum()
    }

    /// Whether the object is more than is ever read. One that does not grow is let through, so that it can be mended, and
    /// go.
    pub fn is_too_much(&self) -> bool {
        let before = self.old_object.map_or(0, count);
        self.object.is_some_and(|object| count(object) > VALUES.max(before))
    }

    /// With its objects read.
    pub fn whole(self) -> serde_json::Result<Request> {
        let read = |object: Option<&RawValue>| object.map(|object| serde_json::from_str(object.get())).transpose();
        Ok(Request {
            object: read(self.object)?,
            old_object: read(self.old_object)?,
            ..self.without_objects()
        })
    }

    /// Without what it is about, for an answer that needs no more.
    pub fn without_objects(self) -> Request {
        Request {
            uid: self.uid,
            kind: self.kind,
            name: self.name,
            namespace: self.namespace,
            operation: self.operation,
            object: None,
            old_object: None,
            user_info: self.user_info,
        }
    }
}

fn count(object: &RawValue) -> usize {
    values(object.get().as_bytes())
}

impl Request {
    /// Whether a process of Kubernest asks: a service account of its own namespace.
    pub fn is_own(&self, namespace: &str) -> bool {
        self.user_info
            .username
            .strip_prefix("system:serviceaccount:")
            .and_then(|rest| rest.split_once(':'))
            .is_some_and(|(owner, _)| owner == namespace)
    }
}

/// The answer to a request.
pub fn answer(request: &Request, decision: &Decision) -> Value {
    let mut response = json!({"uid": request.uid, "allowed": decision.allowed()});
    if !decision.warnings.is_empty() {
        response["warnings"] = json!(decision.warnings);
    }
    if !decision.allowed() {
        response["status"] = json!({
            "status": "Failure",
            "code": 422,
            "reason": "Invalid",
            "message": decision.message,
            "details": {
                "name": request.name,
                "group": request.kind.group,
                "kind": request.kind.kind,
                "causes": decision.causes,
            },
        });
    }
    review(response)
}

/// The answer that changes `object`, as JSON patch (RFC 6902).
pub fn completed(request: &Request, object: &Value, done: &Mutation) -> Value {
    let mut response = json!({"uid": request.uid, "allowed": true});
    if !done.warnings.is_empty() {
        response["warnings"] = json!(done.warnings);
    }
    let patch = json_patch::diff(object, &done.object);
    if !patch.0.is_empty() {
        response["patchType"] = json!("JSONPatch");
        response["patch"] = json!(STANDARD.encode(json!(patch).to_string()));
    }
    review(response)
}

fn review(response: Value) -> Value {
    json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(username: &str) -> Request {
        serde_json::from_value(json!({
            "uid": "1", "kind": {"group": "kubernest.io", "version": "v1alpha1", "kind": "TenantCluster"}, "name": "a",
            "operation": "CREATE", "object": {}, "userInfo": {"username": username},
        }))
        .unwrap()
    }

    #[test]
    fn review_tells_own_requests_from_users() {
        assert!(request("system:serviceaccount:kubernest-system:kubernest-operator").is_own("kubernest-system"));
        assert!(!request("system:serviceaccount:org:kubernest-operator").is_own("kubernest-system"));
        assert!(!request("kubernest-system").is_own("kubernest-system"));
    }

    #[test]
    fn review_may_be_of_much_that_does_not_grow() {
        let much = json!(vec![0; VALUES]);
        let more = json!(vec![0; VALUES + 1]);
        for (object, old, is_too_much) in [
            (Some(&much), None, false),
            (Some(&more), None, true),
            (Some(&more), Some(&much), true),
            (Some(&more), Some(&more), false),
            (Some(&much), Some(&more), false),
            (None, Some(&more), false),
        ] {
            let request =
                json!({"uid": "1", "kind": {"kind": "A"}, "operation": "UPDATE", "object": object, "oldObject": old});
            let text = json!({"request": request}).to_string();
            let review: AdmissionReview<'_> = serde_json::from_str(&text).unwrap();
            assert_eq!(review.request.is_too_much(), is_too_much);
            let whole = review.request.whole().unwrap();
            assert_eq!((whole.object.as_ref(), whole.old_object.as_ref()), (object, old));
        }
    }

    #[test]
    fn review_answers_with_causes() {
        let cause = kubernest_admission::Cause {
            reason: kubernest_admission::reasons::INVALID,
            field: "spec.version".to_owned(),
            message: "m".to_owned(),
        };
        let decision = Decision {
            causes: vec![cause],
            message: "spec.version: m".to_owned(),
            warnings: Vec::new(),
        };
        let review = answer(&request("u"), &decision);
        assert_eq!(review["response"]["allowed"], false);
        assert_eq!(review["response"]["status"]["code"], 422);
        assert_eq!(
            review["response"]["status"]["details"]["causes"][0]["field"],
            "spec.version"
        );
    }
}
