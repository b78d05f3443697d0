//! The operator's connection to one tenant's API server: waits until it answers, watches its nodes, has its kubelets'
//! certificate requests signed, and wakes the reconciler when something changed.
//!
//! One task a tenant. It applies nothing and decides nothing about requests (`csr.rs` does). Waiting is cheap for the
//! guest: until its port is open a try costs it one refused packet, afterwards all tries use one TLS connection.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{StreamExt, channel::mpsc};
use http_body_util::Limited;
use jiff::Timestamp;
use k8s_openapi::api::{
    certificates::v1::CertificateSigningRequest,
    core::v1::{Node, Taint},
};
use kube::{
    Api, Client, Config, ResourceExt,
    client::ClientBuilder,
    config::{KubeConfigOptions, Kubeconfig as KubeconfigFile},
    runtime::{WatchStreamExt, reflector::ObjectRef, watcher},
};
use kubernest_crds::TenantCluster;
use kubernest_pki::{Credential, Kubeconfig, KubeconfigAuth};
use kubernest_runtime::{
    Applier, CancellationToken,
    telemetry::{chain, truncate},
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, MissedTickBehavior},
};
use tower::util::MapResponseLayer;

use super::{
    build::pki::{Authorities, Authority},
    signer::Signer,
};
use crate::FIELD_MANAGER;

/// Time between tries while the API server does not answer.
const POLL: Duration = Duration::from_secs(1);
/// Longest wait for one answer while the API server does not answer. Ample: giving up on a guest that is slow makes it
/// begin again, with a new handshake, and slower still.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest wait for a connection, TLS handshake included.
const CONNECT: Duration = Duration::from_secs(15);

/// Longest answer, in bytes, that is read from a tenant, whose owner may have replaced the API server; a watch that gave
/// more begins again. All tenants share the operator's memory, and JSON takes several times its length there.
const ANSWER_BYTES: usize = 2 << 20;
/// Objects in one answer to a list: Nodes have some 20 KB each.
pub(super) const PAGE: u32 = 50;
/// Longest text of a tenant's, in bytes, that is repeated outside it.
const TEXT_BYTES: usize = 256;
/// Most bytes of labels and taints that are read of a node.
const NODE_BYTES: usize = 16 << 10;
/// Least time between two events of one tenant that are looked at: one that sends them without end must not take the
/// processor from the others.
const EVENT_PAUSE: Duration = Duration::from_millis(5);
/// Least time between two wakes of the reconciler for what changed on nodes: each may be a write into the outer cluster.
const WAKE_PAUSE: Duration = Duration::from_secs(1);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The kubeconfig made for it can't be read.
    #[error("the connection to the tenant can't be configured")]
    Config(#[source] kube::config::KubeconfigError),
    /// The client can't be made.
    #[error("the client of the tenant can't be made")]
    Client(#[source] kube::Error),
    /// The tenant's API server refused or did not answer.
    #[error("the tenant's API server did not {0}")]
    Api(&'static str, #[source] kube::Error),
    /// The watch broke.
    #[error("the watch of the tenant broke")]
    Watch(#[source] watcher::Error),
    /// Signing failed.
    #[error("a kubelet's certificate was not signed")]
    Sign(#[source] kubernest_pki::IssueError),
}

/// What is known of a node of the tenant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeFacts {
    /// Its Ready condition is True.
    pub ready: bool,
    /// Why it is not ready, in the kubelet's words.
    pub message: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations that are ours.
    pub applied: Option<String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// It has more labels and taints than are read, and none of them is known.
    pub too_large: bool,
}

impl NodeFacts {
    fn of(node: &Node) -> Self {
        if size(node) > NODE_BYTES {
            return NodeFacts {
                message: format!("the node has more than {NODE_BYTES} bytes of labels and taints: remove some"),
                too_large: true,
                ..NodeFacts::default()
            };
        }
        let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
        let ready = conditions
            .into_iter()
            .flatten()
            .find(|condition| condition.type_ == "Ready");
        NodeFacts {
            ready: ready.is_some_and(|condition| condition.status == "True"),
            message: ready
                .and_then(|condition| condition.message.as_deref())
                .map(clip)
                .unwrap_or_default(),
            labels: node.labels().clone(),
            applied: node.annotations().get(super::inner::APPLIED).cloned(),
            taints: node
                .spec
                .as_ref()
                .and_then(|spec| spec.taints.clone())
                .unwrap_or_default(),
            too_large: false,
        }
    }
}

/// Bytes of what [`NodeFacts`] keeps of a node as it is.
fn size(node: &Node) -> usize {
    let applied = node.annotations().get(super::inner::APPLIED).map_or(0, String::len);
    let labels = node.labels().iter().map(|(key, value)| key.len() + value.len());
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let taints = taints.map(|taint| taint.key.len() + taint.effect.len() + taint.value.as_ref().map_or(0, String::len));
    applied + labels.sum::<usize>() + taints.sum::<usize>()
}

/// What is known of the tenant.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Version that the API server reports, once it is ready.
    pub version: Option<String>,
    /// Why it is not.
    pub waiting: String,
    /// Its nodes by name.
    pub nodes: BTreeMap<String, NodeFacts>,
    /// The nodes were listed at least once since the API server is ready.
    pub listed: bool,
    /// How often the API server became ready.
    pub connections: u32,
}

/// A connection to a tenant. Dropping it ends its task.
pub struct Link {
    client: Client,
    applier: Applier,
    credential: Credential,
    endpoint: String,
    view: Arc<Mutex<View>>,
    slots: watch::Sender<BTreeMap<String, Ipv4Addr>>,
    restart: Arc<Notify>,
    applied: Mutex<BTreeSet<[u8; 32]>>,
    stop: CancellationToken,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What a link is made from.
pub struct Target {
    /// The cluster, to be woken.
    pub cluster: ObjectRef<TenantCluster>,
    /// `https://<address>:<port>` of its API Service.
    pub endpoint: String,
    /// The operator's certificate for it.
    pub credential: Credential,
    /// Signs kubelets' certificates.
    pub authorities: Arc<Authorities>,
}

impl Link {
    /// Starts the connection.
    pub async fn open(
        target: Target,
        slots: BTreeMap<String, Ipv4Addr>,
        wake: mpsc::UnboundedSender<ObjectRef<TenantCluster>>,
    ) -> Result<Self, LinkError> {
        let client = client(&target).await?;
        let (slots, slots_seen) = watch::channel(slots);
        let link = Link {
            applier: Applier::new(client.clone(), FIELD_MANAGER),
            client: client.clone(),
            credential: target.credential,
            endpoint: target.endpoint,
            view: Arc::default(),
            slots,
            restart: Arc::default(),
            applied: Mutex::default(),
            stop: CancellationToken::new(),
        };
        let signer = Signer::new(client.clone(), target.cluster.clone(), target.authorities);
        let task = Task {
            client,
            cluster: target.cluster,
            view: link.view.clone(),
            slots: slots_seen,
            restart: link.restart.clone(),
            wake,
            signer,
        };
        let stop = link.stop.clone();
        tokio::spawn(async move { stop.run_until_cancelled(task.run()).await });
        Ok(link)
    }

    /// Whether it can go on as it is.
    pub fn serves(&self, endpoint: &str, now: Timestamp) -> bool {
        let margin = jiff::SignedDuration::from_hours(24 * 100);
        self.endpoint == endpoint && self.credential.not_after.duration_since(now) > margin
    }

    /// What is known of the tenant now.
    pub fn view(&self) -> View {
        lock(&self.view).clone()
    }

    /// The tenant's slots, whose kubelets may have certificates.
    pub fn set_slots(&self, slots: BTreeMap<String, Ipv4Addr>) {
        self.slots.send_if_modified(|known| {
            let changed = *known != slots;
            *known = slots;
            changed
        });
    }

    /// The machine behind it stopped: what is known is no longer true.
    pub fn reset(&self) {
        let mut view = lock(&self.view);
        if view.version.take().is_some() {
            view.listed = false;
            // Its data may not come back either: everything is applied again.
            lock(&self.applied).clear();
            self.restart.notify_one();
        }
    }

    /// A client of the tenant.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Writes into the tenant.
    pub fn applier(&self) -> &Applier {
        &self.applier
    }

    /// Whether an object with this hash was applied through this link.
    pub fn has_applied(&self, hash: &[u8; 32]) -> bool {
        lock(&self.applied).contains(hash)
    }

    /// Remembers that it was.
    pub fn set_applied(&self, hash: [u8; 32]) {
        lock(&self.applied).insert(hash);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn client(target: &Target) -> Result<Client, LinkError> {
    let text = Kubeconfig {
        cluster: "tenant",
        user: "operator",
        server: &target.endpoint,
        ca_pem: target.authorities.issuer(Authority::Cluster).certificate_pem(),
        auth: KubeconfigAuth::Inline(&target.credential),
    }
    .render();
    let file = KubeconfigFile::from_yaml(&text).map_err(LinkError::Config)?;
    let options = KubeConfigOptions::default();
    let mut config = Config::from_custom_kubeconfig(file, &options)
        .await
        .map_err(LinkError::Config)?;
    config.connect_timeout = Some(CONNECT);
    // Retries are ours: we want to know at once, and say, that it does not answer.
    config.default_retry = false;
    let bounded =
        MapResponseLayer::new(|answer: http::Response<_>| answer.map(|body| Limited::new(body, ANSWER_BYTES)));
    Ok(ClientBuilder::try_from(config)
        .map_err(LinkError::Client)?
        .with_layer(&bounded)
        .build())
}

/// Most failing checks that are named; there are some forty.
const CHECKS_NAMED: usize = 2;

/// Why an API server is not ready, on one line: the checks of /readyz that fail, else the innermost cause.
fn not_ready(error: &LinkError) -> String {
    let LinkError::Api(_, source) = error else {
        return chain(error);
    };
    if let kube::Error::Api(status) = source {
        let failing = status.message.lines().filter_map(|line| line.strip_prefix("[-]"));
        let failing: Vec<_> = failing.filter_map(|check| check.split(' ').next()).collect();
        if !failing.is_empty() {
            let (named, rest) = failing.split_at(failing.len().min(CHECKS_NAMED));
            let more = (!rest.is_empty()).then(|| format!(" and {} more", rest.len()));
            return format!("/readyz waits for {}{}", named.join(", "), more.unwrap_or_default());
        }
    }
    let causes = std::iter::successors(Some(source as &dyn std::error::Error), |error| error.source());
    causes.last().map(ToString::to_string).unwrap_or_default()
}

fn clip(text: impl AsRef<str>) -> String {
    truncate(text.as_ref(), TEXT_BYTES).to_owned()
}

struct Task {
    client: Client,
    cluster: ObjectRef<TenantCluster>,
    view: Arc<Mutex<View>>,
    slots: watch::Receiver<BTreeMap<String, Ipv4Addr>>,
    restart: Arc<Notify>,
    wake: mpsc::UnboundedSender<ObjectRef<TenantCluster>>,
    signer: Signer,
}

impl Task {
    async fn run(self) {
        loop {
            self.until_ready().await;
            let outcome = tokio::select! {
                outcome = self.follow() => outcome,
                () = self.restart.notified() => Ok(()),
            };
            if let Err(error) = outcome {
                tracing::info!(cluster = %self.cluster, error = chain(&error), "the connection to the tenant broke");
                lock(&self.view).waiting = clip(chain(&error));
            }
            let mut view = lock(&self.view);
            view.version = None;
            view.listed = false;
            drop(view);
            self.wake();
        }
    }

    fn wake(&self) {
        // Nobody listens any more only when the operator stops.
        let _ = self.wake.unbounded_send(self.cluster.clone());
    }

    async fn until_ready(&self) {
        loop {
            match tokio::time::timeout(ANSWER, self.version()).await {
                Ok(Ok(version)) => {
                    tracing::info!(cluster = %self.cluster, version, "the tenant's API server is ready");
                    let mut view = lock(&self.view);
                    view.version = Some(version);
                    view.connections += 1;
                    drop(view);
                    self.wake();
                    return;
                }
                Ok(Err(error)) => lock(&self.view).waiting = clip(not_ready(&error)),
                Err(_) => lock(&self.view).waiting = format!("no answer within {} s", ANSWER.as_secs()),
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn version(&self) -> Result<String, LinkError> {
        let request = http::Request::get("/readyz")
            .body(Vec::new())
            .map_err(kube::Error::HttpError);
        let not_ready = |source| LinkError::Api("answer /readyz", source);
        self.client
            .request_text(request.map_err(not_ready)?)
            .await
            .map_err(not_ready)?;
        let info = self
            .client
            .apiserver_version()
            .await
            .map_err(|source| LinkError::Api("tell its version", source))?;
        Ok(clip(info.git_version))
    }

    /// Follows nodes and requests until the API server no longer answers.
    async fn follow(&self) -> Result<(), LinkError> {
        let nodes = Api::<Node>::all(self.client.clone());
        let requests = Api::<CertificateSigningRequest>::all(self.client.clone());
        let config = watcher::Config::default().page_size(PAGE);
        let mut nodes = watcher(nodes, config.clone()).default_backoff().boxed();
        let mut requests_seen = watcher(requests, config).default_backoff().boxed();
        let mut slots = self.slots.clone();
        slots.mark_unchanged();
        let mut listing = BTreeMap::new();
        self.signer.forget();
        let mut pace = tokio::time::interval(EVENT_PAUSE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut changed, mut wake) = (false, Instant::now());
        loop {
            pace.tick().await;
            tokio::select! {
                () = tokio::time::sleep_until(wake), if changed => {
                    (changed, wake) = (false, Instant::now() + WAKE_PAUSE);
                    self.wake();
                }
                event = nodes.next() => match event {
                    Some(Ok(event)) => {
                        let is_slot = |name: &str| self.slots.borrow().contains_key(name);
                        changed |= note(&mut lock(&self.view), &mut listing, is_slot, event);
                    }
                    Some(Err(error)) => self.after(error).await?,
                    None => return Ok(()),
                },
                event = requests_seen.next() => match event {
                    Some(Ok(watcher::Event::Apply(csr) | watcher::Event::InitApply(csr))) => {
                        let known = self.slots.borrow().clone();
                        self.signer.answer(&csr, &known).await?;
                    }
                    Some(Ok(_)) => {}
                    Some(Err(error)) => self.after(error).await?,
                    None => return Ok(()),
                },
                changed = slots.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let known = slots.borrow_and_update().clone();
                    self.signer.answer_all(&known).await?;
                }
            }
        }
    }

    /// A watch that ended is started again by itself; one that ended because nobody is there any more ends the link.
    async fn after(&self, error: watcher::Error) -> Result<(), LinkError> {
        match tokio::time::timeout(ANSWER, self.version()).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(LinkError::Watch(error)),
        }
    }
}

/// Takes note of what happened to a node; whether the reconciler is to know. Only of nodes that are slots: what else a tenant
/// calls a node is its own affair. (A slot is known here before its machine is made, so that none is missed.)
fn note(
    view: &mut View,
    listing: &mut BTreeMap<String, NodeFacts>,
    is_slot: impl Fn(&str) -> bool,
    event: watcher::Event<Node>,
) -> bool {
    match event {
        watcher::Event::Apply(node) | watcher::Event::InitApply(node) if !is_slot(&node.name_any()) => false,
        watcher::Event::Apply(node) => {
            let facts = NodeFacts::of(&node);
            view.nodes.insert(node.name_any(), facts.clone()) != Some(facts)
        }
        watcher::Event::Delete(node) => view.nodes.remove(&node.name_any()).is_some(),
        watcher::Event::Init => {
            listing.clear();
            false
        }
        watcher::Event::InitApply(node) => {
            listing.insert(node.name_any(), NodeFacts::of(&node));
            false
        }
        watcher::Event::InitDone => {
            let fresh = std::mem::take(listing);
            let changed = !view.listed || view.nodes != fresh;
            view.nodes = fresh;
            view.listed = true;
            changed
        }
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;
    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, labels: Value, message: &str) -> Node {
        let ready = json!({"type": "Ready", "status": "False", "message": message});
        let node = json!({"metadata": {"name": name, "labels": labels}, "status": {"conditions": [ready]}});
        serde_json::from_value(node).unwrap()
    }

    #[test]
    fn link_keeps_only_nodes_that_are_slots() {
        let (mut view, mut listing) = (View::default(), BTreeMap::new());
        let mut take = |event| note(&mut view, &mut listing, |name| name == "a", event);
        take(watcher::Event::Init);
        for name in ["a", "stranger"] {
            take(watcher::Event::InitApply(node(name, json!({}), "")));
        }
        assert!(take(watcher::Event::InitDone));
        assert!(!take(watcher::Event::Apply(node("another", json!({}), ""))));
        assert!(take(watcher::Event::Apply(node("a", json!({"tier": "db"}), ""))));
        assert_eq!(view.nodes.keys().collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn link_repeats_little_of_what_a_tenant_says() {
        let facts = NodeFacts::of(&node("a", json!({}), &"x".repeat(700_000)));
        assert_eq!(facts.message.len(), TEXT_BYTES);
        let facts = NodeFacts::of(&node("a", json!({"large": "x".repeat(700_000)}), ""));
        assert!(facts.too_large && facts.labels.is_empty(), "{facts:?}");
    }

    #[test]
    fn link_names_only_the_failing_checks_of_readyz() {
        let said = "[+]ping ok\n[-]informer-sync failed: reason withheld\n[+]log ok\n[-]shutdown failed: reason withheld\n[-]a failed\nreadyz check failed";
        let status = Status::failure(said, "InternalError").with_code(500);
        let error = LinkError::Api("answer /readyz", kube::Error::Api(status.boxed()));
        assert_eq!(
            not_ready(&error),
            "/readyz waits for informer-sync, shutdown and 1 more"
        );
    }

    #[test]
    fn link_says_the_innermost_cause_of_no_answer() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let error = LinkError::Api("answer /readyz", kube::Error::Service(Box::new(refused)));
        assert_eq!(not_ready(&error), "connection refused");
    }
}
