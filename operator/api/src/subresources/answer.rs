//! What goes wrong, as the `metav1.Status` that clients of Kubernetes expect (apimachinery, pkg/api/errors).

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

/// Group of the objects that the subresources belong to.
const OBJECTS: &str = "kubevirt.io";

/// A refusal or a fault. Converts to a response.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub code: StatusCode,
    reason: &'static str,
    pub message: String,
    details: Option<Value>,
}

/// Kind of object in messages (upstream's words).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Machine,
    Instance,
}

impl Kind {
    fn resource(self) -> &'static str {
        match self {
            Self::Machine => "virtualmachine",
            Self::Instance => "virtualmachineinstance",
        }
    }
}

impl Failure {
    fn of_object(code: StatusCode, reason: &'static str, kind: Kind, name: &str, message: String) -> Self {
        let details = json!({"name": name, "group": OBJECTS, "kind": kind.resource()});
        Self {
            code,
            reason,
            message,
            details: Some(details),
        }
    }

    fn plain(code: StatusCode, reason: &'static str, message: String) -> Self {
        Self {
            code,
            reason,
            message,
            details: None,
        }
    }

    /// 404: the object does not exist.
    pub fn not_found(kind: Kind, name: &str) -> Self {
        let message = format!("{}.{OBJECTS} {name:?} not found", kind.resource());
        Self::of_object(StatusCode::NOT_FOUND, "NotFound", kind, name, message)
    }

    /// 409: the object's state does not allow it.
    pub fn conflict(kind: Kind, name: &str, why: &str) -> Self {
        let resource = kind.resource();
        let message = format!("Operation cannot be fulfilled on {resource}.{OBJECTS} {name:?}: {why}");
        Self::of_object(StatusCode::CONFLICT, "Conflict", kind, name, message)
    }

    /// 403: the object is of a sort that does not allow it.
    pub fn forbidden(kind: Kind, name: &str, why: &str) -> Self {
        let message = format!("{}.{OBJECTS} {name:?} is forbidden: {why}", kind.resource());
        Self::of_object(StatusCode::FORBIDDEN, "Forbidden", kind, name, message)
    }

    /// 403: the user may not.
    pub fn denied(message: String) -> Self {
        Self::plain(StatusCode::FORBIDDEN, "Forbidden", message)
    }

    /// 401: nobody vouches for the user.
    pub fn unauthorized(why: &str) -> Self {
        Self::plain(StatusCode::UNAUTHORIZED, "Unauthorized", format!("Unauthorized: {why}"))
    }

    /// 400.
    pub fn bad_request(why: impl Into<String>) -> Self {
        Self::plain(StatusCode::BAD_REQUEST, "BadRequest", why.into())
    }

    /// 400: the body is no such object, for these reasons.
    pub fn invalid(kind: &str, causes: &[String]) -> Self {
        let causes: Vec<Value> = causes.iter().map(|cause| json!({"message": cause})).collect();
        Self {
            details: Some(json!({"causes": causes})),
            ..Self::bad_request(format!("Object is not a valid {kind}"))
        }
    }

    /// 429: this replica has enough to do.
    pub fn too_many(what: &str, namespace: &str) -> Self {
        let message =
            format!("too many {what} of namespace {namespace:?}, or of all, are open: close some, or try again");
        Self::plain(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message)
    }

    /// 404: no such path.
    pub fn no_such_path() -> Self {
        let message = "the server could not find the requested resource".to_owned();
        Self::plain(StatusCode::NOT_FOUND, "NotFound", message)
    }

    /// 500; the cause is logged as well.
    pub fn internal(what: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        let cause = kubernest_runtime::telemetry::chain(error);
        tracing::error!(error = cause, "{what}");
        let message = format!("Internal error occurred: {what}: {cause}");
        Self::plain(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", message)
    }

    /// The body.
    pub fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code.as_u16(),
        });
        if let Some(details) = &self.details {
            status["details"] = details.clone();
        }
        status
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.code, Json(self.status())).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_says_it_as_kubernetes_does() {
        let conflict = Failure::conflict(Kind::Machine, "a", "VM is already running").status();
        assert_eq!(
            conflict["message"],
            "Operation cannot be fulfilled on virtualmachine.kubevirt.io \"a\": VM is already running"
        );
        assert_eq!(
            (&conflict["code"], &conflict["reason"]),
            (&json!(409), &json!("Conflict"))
        );
        assert_eq!(conflict["details"]["kind"], "virtualmachine");
        let missing = Failure::not_found(Kind::Instance, "a").status();
        assert_eq!(missing["message"], "virtualmachineinstance.kubevirt.io \"a\" not found");
    }
}
