//! AdmissionReview on the wire (admission.k8s.io/v1): the request's parts that decisions need, and the answer.
//!
//! Objects stay raw JSON, so that fields unknown to our types are still there to be refused.

use base64::{Engine, engine::general_purpose::STANDARD};
use kubernest_admission::{Decision, Mutation};
use kubernest_runtime::json::Seen;
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

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
    /// How many values each object has.
    pub fn values(&self) -> serde_json::Result<Vec<usize>> {
        let objects = [self.object, self.old_object].into_iter().flatten();
        let count = |object| Ok(decided_upon(object)?.iter().map(|part| Seen::of(part).values).sum());
        objects.map(count).collect()
    }

    /// With what is decided upon of its objects.
    pub fn whole(self) -> serde_json::Result<Request> {
        let read = |object: Option<&RawValue>| {
            let read = |object| serde_json::from_str(&decided_upon(object)?.join("null"));
            object.map(read).transpose()
        };
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

/// The parts of an object's text between its status and its managedFields: those grow without a user's doing, and are not
/// decided upon. Nulls may stand for them.
fn decided_upon(object: &RawValue) -> serde_json::Result<Vec<&str>> {
    #[derive(Deserialize)]
    struct Object<'a> {
        #[serde(borrow)]
        metadata: Option<&'a RawValue>,
        #[serde(borrow)]
        status: Option<&'a RawValue>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata<'a> {
        #[serde(borrow)]
        managed_fields: Option<&'a RawValue>,
    }
    let text = object.get();
    let Object { metadata, status } = serde_json::from_str(text)?;
    let managed = metadata.map(|metadata| serde_json::from_str::<Metadata<'_>>(metadata.get()));
    let managed = managed.transpose()?.and_then(|metadata| metadata.managed_fields);
    // Where in the text they are, as both are borrowed from it.
    let place = |part: &RawValue| {
        let start = part.get().as_ptr().addr() - text.as_ptr().addr();
        start..start + part.get().len()
    };
    let mut left_out: Vec<_> = [managed, status].into_iter().flatten().map(place).collect();
    left_out.sort_by_key(|part| part.start);
    let (mut parts, mut from) = (Vec::new(), 0);
    for part in left_out {
        parts.push(&text[from..part.start]);
        from = part.end;
    }
    parts.push(&text[from..]);
    Ok(parts)
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
    use crate::bodies::VALUES;

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

    fn review_of(object: &Value, old: Option<&Value>) -> String {
        let request =
            json!({"uid": "1", "kind": {"kind": "A"}, "operation": "UPDATE", "object": object, "oldObject": old});
        json!({"request": request}).to_string()
    }

    fn is_too_much(review: &AdmissionReview<'_>) -> serde_json::Result<bool> {
        let values = review.request.values()?;
        Ok(values.iter().any(|values| *values > VALUES))
    }

    #[test]
    fn review_of_too_much_is_told_before_it_is_read() {
        let spec = |values: usize| json!({"metadata": {"name": "a"}, "spec": vec![0; values]});
        let (much, more) = (spec(VALUES - 5), spec(VALUES));
        for (object, old, expected) in [
            (&much, None, false),
            (&much, Some(&much), false),
            (&more, None, true),
            // Whoever reaches the port may say that it was there before.
            (&more, Some(&more), true),
            (&much, Some(&more), true),
        ] {
            let text = review_of(object, old);
            let review: AdmissionReview<'_> = serde_json::from_str(&text).unwrap();
            assert_eq!(is_too_much(&review).unwrap(), expected);
        }
    }

    #[test]
    fn review_leaves_out_what_grows_by_itself() {
        let grown = json!(vec![json!({"f:a": {}}); VALUES]);
        let object = json!({
            "a": 1, "metadata": {"labels": {"a": "b"}, "managedFields": grown, "name": "a"},
            "spec": {"managedFields": 1, "status": 2}, "status": grown,
        });
        let text = review_of(&object, Some(&object));
        let review: AdmissionReview<'_> = serde_json::from_str(&text).unwrap();
        assert!(!is_too_much(&review).unwrap());
        let whole = review.request.whole().unwrap();
        let mut expected = object.clone();
        expected["metadata"]["managedFields"] = Value::Null;
        expected["status"] = Value::Null;
        assert_eq!(
            (whole.object.as_ref(), whole.old_object.as_ref()),
            (Some(&expected), Some(&expected))
        );
        for odd in [json!(1), json!("a"), json!({"metadata": 1})] {
            let text = review_of(&odd, None);
            let review: AdmissionReview<'_> = serde_json::from_str(&text).unwrap();
            assert!(is_too_much(&review).is_err());
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
