//! HTTP routes of the webhooks. What is refused and why, and what a new object gets, is decided by
//! `kubernest-admission`.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Body,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::post,
};
use kubernest_admission::{Decision, Installation, Mutation, Report, Review};
use kubernest_runtime::{Metrics, server::Readiness};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use serde_json::Value;

use crate::{
    bodies::{Bodies, VALUES},
    convert,
    presets::Presets,
    review::{AdmissionReview, Request, answer, completed},
};

/// Largest review: the API server takes bodies of 3 MiB, and a review holds the object twice.
const BODY_BYTES: usize = 8 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    kind: String,
    operation: &'static str,
    allowed: &'static str,
}

struct Webhooks {
    installation: Installation,
    namespace: String,
    presets: Presets,
    bodies: Bodies,
    reviews: Family<Outcome, Counter>,
}

impl Webhooks {
    fn count(&self, request: &Request, allowed: bool) {
        let outcome = Outcome {
            kind: request.kind.kind.clone(),
            operation: request.operation.name(),
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
        bodies: Bodies::default(),
        reviews,
    });
    let review = |answer: fn(&Webhooks, &Request) -> Response| {
        post(async move |State(webhooks), body| reviewed(webhooks, body, answer).await)
    };
    Router::new()
        .route("/validate/tenantclusters", review(validate))
        .route("/validate/virtualmachines", review(validate))
        .route("/validate/virtualmachineinstances", review(validate))
        .route("/validate/virtualmachineinstancepresets", review(validate))
        .route("/validate/virtualmachineinstancereplicasets", review(validate))
        .route("/mutate/virtualmachines", review(mutate_machine))
        .route("/mutate/virtualmachineinstances", review(mutate))
        .route("/convert", post(converted))
        .with_state(state)
        .merge(kubernest_runtime::server::health_routes(readiness))
}

/// Reads a review, within bounds, and answers it.
async fn reviewed(
    webhooks: Arc<Webhooks>,
    body: Body,
    answer: fn(&Webhooks, &Request) -> Response,
) -> Result<Response, Response> {
    let body = webhooks.bodies.read(body, BODY_BYTES).await?;
    let review = serde_json::from_slice::<AdmissionReview<'_>>(&body.text).map_err(bad_request)?;
    let request = review.request;
    let kind = &request.kind.kind;
    if !kubernest_admission::has_rules(kind) {
        return Err((StatusCode::BAD_REQUEST, format!("no rules for kind {kind}")).into_response());
    }
    let values = request.values().map_err(bad_request)?;
    if values.iter().any(|values| *values > VALUES) {
        let mut report = Report::default();
        report.invalid("", format!("more than {VALUES} values are no {kind}"));
        let decision = report.decide(|causes| causes[0].message.clone());
        return Ok(Json(webhooks.refuse(&request.without_objects(), &decision)).into_response());
    }
    let _turn = webhooks.bodies.turn(values.iter().sum()).await;
    Ok(answer(&webhooks, &request.whole().map_err(bad_request)?))
}

fn bad_request(error: serde_json::Error) -> Response {
    (StatusCode::BAD_REQUEST, error.to_string()).into_response()
}

fn validate(webhooks: &Webhooks, request: &Request) -> Response {
    // A deletion has no object, and nothing about it is refused here.
    let decision = request.object.as_ref().and_then(|object| {
        let review = Review {
            object,
            old: request.old_object.as_ref(),
            own_request: request.is_own(&webhooks.namespace),
        };
        kubernest_admission::admit(&webhooks.installation, &request.kind.kind, review)
    });
    let decision = decision.unwrap_or_default();
    if !decision.allowed() {
        return Json(webhooks.refuse(request, &decision)).into_response();
    }
    webhooks.count(request, true);
    Json(answer(request, &decision)).into_response()
}

/// Completes a new instance.
fn mutate(webhooks: &Webhooks, request: &Request) -> Response {
    let Some(object) = &request.object else {
        return (StatusCode::BAD_REQUEST, "there is no object to complete").into_response();
    };
    let presets = webhooks.presets.of(&request.namespace, object);
    let uuid = uuid::Uuid::new_v4().to_string();
    match kubernest_admission::mutate(object, &presets, &uuid) {
        Ok(done) => Json(completed(request, object, &done)).into_response(),
        Err(decision) => Json(webhooks.refuse(request, &decision)).into_response(),
    }
}

/// Completes a machine that is new or changed.
fn mutate_machine(_: &Webhooks, request: &Request) -> Response {
    let Some(object) = &request.object else {
        return (StatusCode::BAD_REQUEST, "there is no object to complete").into_response();
    };
    let done = Mutation {
        object: complete_machine(object, request.old_object.as_ref()),
        warnings: Vec::new(),
    };
    Json(completed(request, object, &done)).into_response()
}

async fn converted(State(webhooks): State<Arc<Webhooks>>, body: Body) -> Result<Response, Response> {
    let body = webhooks.bodies.read(body, BODY_BYTES).await?;
    let answer = convert::convert(&body.text).map_err(bad_request)?;
    Ok(([(CONTENT_TYPE, "application/json")], answer).into_response())
}

/// The machine with its gaps filled; its guest's UUID and serial number are drawn by chance.
pub fn complete_machine(object: &Value, old: Option<&Value>) -> Value {
    let [uuid, serial] = [uuid::Uuid::new_v4(), uuid::Uuid::new_v4()].map(|drawn| drawn.to_string());
    kubernest_admission::complete_machine(object, old, [&uuid, &serial])
}
