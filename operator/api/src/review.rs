//! AdmissionReview on the wire (admission.k8s.io/v1): the request's parts that decisions need, and the answer.
//!
//! Objects stay raw JSON, so that fields unknown to our types are still there to be refused.

use base64::{Engine, engine::general_purpose::STANDARD};
use kubernest_admission::{Decision, Mutation};
use serde::Deserialize;
use serde_json::{Value, json};

/// The review that the API server sends.
#[derive(Debug, Deserialize)]
pub struct AdmissionReview {
    pub request: Request,
}

/// Its request.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    pub uid: String,
    pub kind: Kind,
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub namespace: String,
    pub operation: String,
    #[serde(default)]
    pub object: Option<Value>,
    #[serde(default)]
    pub old_object: Option<Value>,
    #[serde(default)]
    pub user_info: UserInfo,
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
