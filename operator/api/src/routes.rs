//! HTTP routes of the webhooks. What is refused and why, and what a new object gets, is decided by
//! `kubernest-admission`.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use kubernest_admission::{Decision, Installation, Mutation, Review};
use kubernest_runtime::{Metrics, server::Readiness};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use serde_json::Value;

use crate::{
    convert,
    presets::Presets,
    review::{AdmissionReview, Request, answer, completed},
};

/// Largest review: etcd takes objects of 1.5 MiB, a review holds the object twice.
const BODY_BYTES: usize = 8 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    kind: String,
    operation: String,
    allowed: &'static str,
}

struct Webhooks {
    installation: Installation,
    namespace: String,
    presets: Presets,
    reviews: Family<Outcome, Counter>,
}

impl Webhooks {
    fn count(&self, request: &Request, allowed: bool) {
        let outcome = Outcome {
            kind: request.kind.kind.clone(),
            operation: request.operation.clone(),
            allowed: if allowed { "true" } else { "false" },
        };
        self.reviews.get_or_create(&outcome).inc();
    }

    /// Counts, tells and answers.
    fn refuse(&self, request: &Request, decision: &Decision) -> Value {
        self.count(request, false);
        tracing::info!(
            kind = request.kind.kind,
            namespace = request.namespace,
            name = request.name,
            user = request.user_info.username,
            message = decision.message,
            "refused"
        );
        answer(request, decision)
    }
}

/// The routes of the HTTPS port.
pub fn router(
    installation: Installation,
    namespace: String,
    presets: Presets,
    metrics: &Metrics,
    readiness: Readiness,
) -> Router {
    let reviews = Family::default();
    metrics.register("admission_reviews", "Admission reviews answered", reviews.clone());
    let state = Arc::new(Webhooks {
        installation,
        namespace,
        presets,
        reviews,
    });
    Router::new()
        .route("/validate/tenantclusters", post(validate))
        .route("/validate/virtualmachines", post(validate))
        .route("/validate/virtualmachineinstances", post(validate))
        .route("/validate/virtualmachineinstancepresets", post(validate))
        .route("/mutate/virtualmachines", post(mutate_machine))
        .route("/mutate/virtualmachineinstances", post(mutate))
        .route("/convert", post(convert::convert))
        .route("/validate/virtualmachineinstancereplicasets", post(validate))
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .with_state(state)
        .merge(kubernest_runtime::server::health_routes(readiness))
}

async fn validate(State(webhooks): State<Arc<Webhooks>>, Json(review): Json<AdmissionReview>) -> Response {
    let request = review.request;
    let decision = match &request.object {
        // A deletion has no object, and nothing about it is refused here.
        None => Some(Decision::default()),
        Some(object) => {
            let own_request = request.is_own(&webhooks.namespace);
            let review = Review {
                object,
                old: request.old_object.as_ref(),
                own_request,
            };
            kubernest_admission::admit(&webhooks.installation, &request.kind.kind, review)
        }
    };
    let Some(decision) = decision else {
        return (
            StatusCode::BAD_REQUEST,
            format!("no rules for kind {}", request.kind.kind),
        )
            .into_response();
    };
    if !decision.allowed() {
        return Json(webhooks.refuse(&request, &decision)).into_response();
    }
    webhooks.count(&request, true);
    Json(answer(&request, &decision)).into_response()
}

/// Completes a new instance.
async fn mutate(State(webhooks): State<Arc<Webhooks>>, Json(review): Json<AdmissionReview>) -> Response {
    let request = review.request;
    let Some(object) = &request.object else {
        return (StatusCode::BAD_REQUEST, "there is no object to complete").into_response();
    };
    let presets = webhooks.presets.of(&request.namespace, object);
    let uuid = uuid::Uuid::new_v4().to_string();
    match kubernest_admission::mutate(object, &presets, &uuid) {
        Ok(done) => Json(completed(&request, object, &done)).into_response(),
        Err(decision) => Json(webhooks.refuse(&request, &decision)).into_response(),
    }
}

/// Completes a machine that is new or changed.
async fn mutate_machine(Json(review): Json<AdmissionReview>) -> Response {
    let request = review.request;
    let Some(object) = &request.object else {
        return (StatusCode::BAD_REQUEST, "there is no object to complete").into_response();
    };
    let done = Mutation {
        object: complete_machine(object, request.old_object.as_ref()),
        warnings: Vec::new(),
    };
    Json(completed(&request, object, &done)).into_response()
}

/// The machine with its gaps filled; its guest's UUID and serial number are drawn by chance.
pub fn complete_machine(object: &Value, old: Option<&Value>) -> Value {
    let [uuid, serial] = [uuid::Uuid::new_v4(), uuid::Uuid::new_v4()].map(|drawn| drawn.to_string());
    kubernest_admission::complete_machine(object, old, [&uuid, &serial])
}
