//! What a tenant's API server, which its owner may have replaced, can cost the operator: bounds on its answers and on
//! how fast they are read. All tenants share the operator's memory and processor.
//!
//! It knows nothing of what is asked, but whether it is a watch.

use std::{
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt, StreamExt, TryStreamExt, future::BoxFuture};
use http::{Request, Response};
use http_body_util::{BodyStream, Limited, StreamBody};
use kube::client::{Body, DynBody};
use kubernest_runtime::json::Seen;
use tokio::time::Instant;
use tower::{BoxError, Layer, Service};

use super::lock;

/// Longest answer, in bytes; a watch that gave more begins again.
const ANSWER_BYTES: usize = 2 << 20;
/// Most values of an answer, or of one line of a watch: bytes are no measure of memory, as each `{}` of a list may become an
/// object of 1 KB.
const VALUES: usize = 16 << 10;
/// Most items of an answer to a list: an item of two bytes becomes an object of 1 KB.
const ITEMS: usize = 256;
/// Objects in one answer to a list: Nodes have some 20 KB and 900 values each.
pub(in super::super) const PAGE: u32 = 10;
/// What a request takes of a tenant's time: 20 a second.
const REQUEST: Duration = Duration::from_millis(50);
/// What a byte that is read takes of it: 1 MB a second.
const BYTE: Duration = Duration::from_micros(1);
/// How much of its time a tenant may take in advance: it begins with 40 requests.
const BURST: Duration = Duration::from_secs(2);

/// The bounds of one tenant, shared by all that is asked of it.
#[derive(Clone)]
pub(super) struct Bounds(Arc<Pace>);

impl Bounds {
    pub(super) fn new() -> Self {
        Bounds(Arc::new(Pace(Mutex::new(Instant::now()))))
    }
}

impl<S> Layer<S> for Bounds {
    type Service = Bounded<S>;

    fn layer(&self, inner: S) -> Bounded<S> {
        let pace = self.0.clone();
        Bounded { inner, pace }
    }
}

/// A client that keeps the bounds.
pub(super) struct Bounded<S> {
    inner: S,
    pace: Arc<Pace>,
}

impl<S> Service<Request<Body>> for Bounded<S>
where
    S: Service<Request<Body>, Response = Response<Box<DynBody>>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let watch = request.uri().query().is_some_and(|query| query.contains("watch=true"));
        let answer = self.inner.call(request);
        let pace = self.pace.clone();
        async move {
            pace.take(REQUEST).await;
            let answer = answer.await?;
            // An answer that is no success is parsed as a whole, also that to a watch.
            let by_line = watch && answer.status().is_success();
            let values = Values {
                by_line,
                seen: Seen::default(),
            };
            Ok(answer.map(|body| bounded(body, values, pace)))
        }
        .boxed()
    }
}

fn bounded(body: Box<DynBody>, mut values: Values, pace: Arc<Pace>) -> Box<DynBody> {
    let frames = BodyStream::new(Limited::new(body, ANSWER_BYTES)).and_then(move |frame| {
        let data = frame.data_ref().map(AsRef::as_ref).unwrap_or_default();
        let counted = values.count(data);
        let cost = BYTE.saturating_mul(u32::try_from(data.len()).unwrap_or(u32::MAX));
        let pace = pace.clone();
        async move {
            counted?;
            pace.take(cost).await;
            Ok(frame)
        }
    });
    Box::new(StreamBody::new(frames.boxed()))
}

/// Counts what there is in an answer.
struct Values {
    /// Each line is parsed for itself.
    by_line: bool,
    seen: Seen,
}

impl Values {
    fn count(&mut self, text: &[u8]) -> Result<(), BoxError> {
        for byte in text {
            match byte {
                // No string of JSON goes on in the next line.
                b'\n' if self.by_line => self.seen = Seen::default(),
                byte => self.seen.byte(*byte),
            }
            if self.seen.values > VALUES || self.seen.items > ITEMS {
                return Err(format!("the answer has more than {VALUES} values or {ITEMS} objects").into());
            }
        }
        Ok(())
    }
}

/// Until when a tenant's time is taken.
struct Pace(Mutex<Instant>);

impl Pace {
    /// Takes so much of the tenant's time, and waits while more than [`BURST`] is taken.
    async fn take(&self, cost: Duration) {
        let taken = {
            let mut taken = lock(&self.0);
            *taken = (*taken).max(Instant::now()) + cost;
            *taken
        };
        if let Some(due) = taken.checked_sub(BURST) {
            tokio::time::sleep_until(due).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::BodyExt;
    use k8s_openapi::api::core::v1::Node;
    use kube::{
        Api, Client,
        api::{ListParams, WatchParams},
        client::ClientBuilder,
    };
    use serde_json::{Map, Value, json};

    use super::*;

    /// A tenant that gives this answer to all that is asked.
    fn tenant(answer: impl Into<Vec<u8>>) -> Client {
        let answer = answer.into();
        let service = tower::service_fn(move |_: Request<Body>| {
            let body = Body::from(answer.clone()).map_err(BoxError::from);
            std::future::ready(Ok::<_, Infallible>(Response::new(Box::new(body) as Box<DynBody>)))
        });
        ClientBuilder::new(service, "default")
            .with_layer(&Bounds::new())
            .build()
    }

    async fn list(answer: String) -> kube::Result<usize> {
        let nodes = Api::<Node>::all(tenant(answer));
        nodes.list(&ListParams::default()).await.map(|list| list.items.len())
    }

    async fn watch(answer: String) -> Vec<bool> {
        let nodes = Api::<Node>::all(tenant(answer));
        let events = nodes.watch(&WatchParams::default(), "1").await.unwrap();
        events.map(|event| event.is_ok()).collect().await
    }

    fn list_of(node: &str, count: usize, between: &str) -> String {
        let nodes = vec![node; count].join(between);
        format!(r#"{{"metadata":{{"resourceVersion":"1"}},"items":[{nodes}]}}"#)
    }

    /// A node with all that a kubelet tells at most: 50 images, 20 volumes, and many who manage its fields.
    fn real_node() -> String {
        let map = |prefix: &str, count: usize, value: Value| -> Map<String, Value> {
            (0..count).map(|at| (format!("{prefix}{at}"), value.clone())).collect()
        };
        let own = map("f:label.example.org/", 12, json!({}));
        let fields = json!({"f:metadata": {"f:labels": own}, "f:spec": {"f:taints": {}}});
        let condition = map("f:field", 7, json!({}));
        let conditions = map("k:{\"type\":\"condition\"}", 5, json!(condition));
        let status = json!({"f:status": {"f:conditions": conditions, "f:nodeInfo": map("f:", 10, json!({}))}});
        let managed =
            |fields| json!({"manager": "kubelet", "operation": "Update", "apiVersion": "v1", "fieldsV1": fields});
        let mut managers = vec![managed(fields); 6];
        managers.push(managed(status));
        let image =
            json!({"names": ["a.example.org/b@sha256:0123", "a.example.org/b:v1.2.3"], "sizeBytes": 123_456_789});
        let labels = map("label.example.org/", 16, json!("value"));
        let condition =
            json!({"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "posting, ready"});
        json!({
            "metadata": {
                "name": "customera-a-0", "uid": "0", "resourceVersion": "1",
                "labels": labels, "annotations": labels, "managedFields": managers,
            },
            "spec": {"podCIDR": "10.244.0.0/24", "taints": [{"key": "a", "effect": "NoSchedule"}]},
            "status": {
                "capacity": map("c", 8, json!("1")), "allocatable": map("c", 8, json!("1")), "conditions": vec![condition; 5],
                "images": vec![image; 50], "volumesInUse": vec!["kubernetes.io/csi/x^y"; 20],
                "volumesAttached": vec![json!({"name": "a", "devicePath": ""}); 20],
            },
        })
        .to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn link_reads_a_page_of_real_nodes() {
        let page = list_of(&real_node(), PAGE as usize, ",");
        assert_eq!(list(page).await.unwrap(), PAGE as usize);
    }

    #[tokio::test(start_paused = true)]
    async fn link_reads_no_answer_that_takes_much_memory() {
        for between in [",", ",\n"] {
            assert!(list(list_of("{}", 500_000, between)).await.is_err());
        }
        let taints = format!(r#"{{"spec":{{"taints":[{}]}}}}"#, vec!["{}"; 500_000].join(","));
        assert!(list(list_of(&taints, 1, ",")).await.is_err());
        assert!(list(list_of("[[]]", 400_000, ",")).await.is_err());
        assert!(list(" ".repeat(ANSWER_BYTES + 1)).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn link_reads_no_more_objects_than_it_asked_for() {
        assert_eq!(list(list_of(r#"{"metadata":{}}"#, ITEMS, ",")).await.unwrap(), ITEMS);
        let refused = list(list_of(r#"{"metadata":{}}"#, ITEMS + 1, ",")).await;
        assert!(refused.unwrap_err().to_string().contains("256 objects"));
        // Structs are read from lists as well.
        assert!(list(list_of("[{}]", ITEMS + 1, ",")).await.is_err());
        // What stands in strings is text.
        let text = r#"{"metadata":{"annotations":{"a":"\\\"{[,"}}}"#;
        let much = format!(
            r#"{{"metadata":{{"annotations":{{"a":"{}"}}}}}}"#,
            r#"\\\"{[,"#.repeat(50_000)
        );
        assert_eq!(list(list_of(text, 3, &format!(",{much},"))).await.unwrap(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn link_reads_each_line_of_a_watch_for_itself() {
        let event = format!("{{\"type\":\"MODIFIED\",\"object\":{}}}\n", real_node());
        assert_eq!(watch(event.repeat(50)).await, [true; 50]);
        let large = list_of("{}", 500_000, ",");
        let large = format!("{{\"type\":\"MODIFIED\",\"object\":{large}}}\n");
        assert_eq!(watch(large).await, [false]);
    }

    #[tokio::test(start_paused = true)]
    async fn link_asks_a_tenant_20_times_a_second_at_most() {
        let nodes = Api::<Node>::all(tenant(list_of("{}", 1, ",")));
        let start = Instant::now();
        for _ in 0..240 {
            nodes.list(&ListParams::default()).await.unwrap();
        }
        let took = start.elapsed();
        assert!(
            took >= Duration::from_secs(10) && took < Duration::from_secs(11),
            "{took:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn link_reads_a_megabyte_of_a_tenant_a_second() {
        let nodes = Api::<Node>::all(tenant(list_of("{}", 1, ",") + &" ".repeat(1_000_000)));
        let start = Instant::now();
        for _ in 0..10 {
            nodes.list(&ListParams::default()).await.unwrap();
        }
        let took = start.elapsed();
        assert!(
            took >= Duration::from_secs(8) && took < Duration::from_secs(9),
            "{took:?}"
        );
    }
}
