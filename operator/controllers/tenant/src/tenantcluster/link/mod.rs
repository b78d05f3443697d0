//! The operator's connection to one tenant's API server: waits until it answers, watches its nodes, has its kubelets'
//! certificate requests signed, and wakes the reconciler when something changed.
//!
//! One task a tenant. It applies nothing and decides nothing about requests (`csr.rs` does). Waiting is cheap for the
//! guest: until its port is open a try costs it one refused packet, afterwards all tries use one TLS connection.
//! What is read of a tenant is bounded (`bounds.rs`), and little of it kept (`nodes.rs`).

mod bounds;
mod nodes;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{StreamExt, channel::mpsc};
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::{
    Api, Client, Config,
    client::ClientBuilder,
    config::{KubeConfigOptions, Kubeconfig as KubeconfigFile},
    runtime::{WatchStreamExt, reflector::ObjectRef, watcher},
};
use kubernest_crds::TenantCluster;
use kubernest_pki::{Credential, Kubeconfig, KubeconfigAuth};
use kubernest_runtime::{
    Applier, CancellationToken,
    telemetry::{chain, refusal, truncate},
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, MissedTickBehavior},
};

pub(super) use self::bounds::PAGE;
pub use self::nodes::NodeFacts;
use self::{
    bounds::Bounds,
    nodes::{SeenNode, note},
};
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

/// Longest time between the end of a connection and the next, when each breaks soon.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A connection that lasted longer did not break soon.
const STEADY: Duration = Duration::from_secs(60);

/// Longest text of a tenant's, in bytes, that is repeated outside it.
const TEXT_BYTES: usize = 256;
/// Least time between two events of one tenant that are looked at: one that sends them without end must not take the
/// processor from the others.
const EVENT_PAUSE: Duration = Duration::from_millis(5);
/// Least time between two wakes of the reconciler: each may be a write into the outer cluster.
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
    looked: watch::Receiver<bool>,
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
        let (looked, looked_seen) = watch::channel(false);
        let link = Link {
            applier: Applier::new(client.clone(), FIELD_MANAGER),
            client: client.clone(),
            credential: target.credential,
            endpoint: target.endpoint,
            view: Arc::default(),
            slots,
            restart: Arc::default(),
            applied: Mutex::default(),
            looked: looked_seen,
            stop: CancellationToken::new(),
        };
        let signer = Signer::new(client.clone(), target.cluster.clone(), target.authorities);
        let task = Task {
            client,
            cluster: target.cluster,
            view: link.view.clone(),
            slots: slots_seen,
            looked,
            restart: link.restart.clone(),
            wake,
            wake_at: Mutex::new(Instant::now()),
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

    /// Waits until the tenant was looked at once: its nodes are listed, or it does not answer. Before that nothing is known, which
    /// is no reason to say that a cluster that was Ready is not.
    pub async fn first_look(&self, limit: Duration) {
        let mut looked = self.looked.clone();
        // Whatever comes of it, the view says what is known.
        let _ = tokio::time::timeout(limit, looked.wait_for(|looked| *looked)).await;
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
    Ok(ClientBuilder::try_from(config)
        .map_err(LinkError::Client)?
        .with_layer(&Bounds::new())
        .build())
}

/// Most failing checks that are named; there are some forty.
const CHECKS_NAMED: usize = 2;

/// Why an API server is not ready, on one line: the checks of /readyz that fail, else how far the way to it leads. Each of
/// these is usual while a machine starts, and must not look like a fault.
fn not_ready(error: &LinkError) -> String {
    let LinkError::Api(_, source) = error else {
        return chain(error);
    };
    if let kube::Error::Api(status) = source {
        let failing = status.message.lines().filter_map(|line| line.strip_prefix("[-]"));
        let failing: Vec<_> = failing.filter_map(|check| check.split(' ').next()).collect();
        if failing.is_empty() {
            return refusal(status).lines().next().unwrap_or_default().to_owned();
        }
        let (named, rest) = failing.split_at(failing.len().min(CHECKS_NAMED));
        let more = (!rest.is_empty()).then(|| format!(" and {} more", rest.len()));
        return format!("/readyz waits for {}{}", named.join(", "), more.unwrap_or_default());
    }
    let causes = || std::iter::successors(Some(source as &dyn std::error::Error), |error| error.source());
    let mut kinds = causes().filter_map(|cause| cause.downcast_ref::<io::Error>());
    let usual = kinds.find_map(|cause| match cause.kind() {
        io::ErrorKind::ConnectionRefused => Some("its port is not open yet"),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Some("its network is not up yet"),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => {
            Some("it closed the connection")
        }
        io::ErrorKind::TimedOut => Some("it takes no connection in time"),
        _ => None,
    });
    let innermost = || causes().last().map(ToString::to_string).unwrap_or_default();
    usual.map_or_else(innermost, str::to_owned)
}

/// As much of a tenant's text as is repeated outside it.
pub(super) fn clip(text: impl AsRef<str>) -> String {
    truncate(text.as_ref(), TEXT_BYTES).to_owned()
}

struct Task {
    client: Client,
    cluster: ObjectRef<TenantCluster>,
    view: Arc<Mutex<View>>,
    slots: watch::Receiver<BTreeMap<String, Ipv4Addr>>,
    /// The tenant was looked at once.
    looked: watch::Sender<bool>,
    restart: Arc<Notify>,
    wake: mpsc::UnboundedSender<ObjectRef<TenantCluster>>,
    /// When the reconciler may be woken next.
    wake_at: Mutex<Instant>,
    signer: Signer,
}

impl Task {
    async fn run(self) {
        let mut pause = POLL;
        loop {
            self.until_ready().await;
            let begun = Instant::now();
            let outcome = tokio::select! {
                outcome = self.follow() => outcome,
                () = self.restart.notified() => Ok(()),
            };
            let soon = outcome.is_err() && begun.elapsed() < STEADY;
            if let Err(error) = outcome {
                let error = clip(chain(&error));
                tracing::info!(cluster = %self.cluster, error, "the connection to the tenant broke");
                lock(&self.view).waiting = error;
            }
            {
                let mut view = lock(&self.view);
                view.version = None;
                view.listed = false;
            }
            self.looked.send_replace(true);
            self.wake().await;
            tokio::time::sleep(pause).await;
            pause = if soon { LONGEST_PAUSE.min(pause * 2) } else { POLL };
        }
    }

    /// Wakes the reconciler, once a [`WAKE_PAUSE`] at most.
    async fn wake(&self) {
        let at = *lock(&self.wake_at);
        tokio::time::sleep_until(at).await;
        *lock(&self.wake_at) = Instant::now() + WAKE_PAUSE;
        // Nobody listens any more only when the operator stops.
        let _ = self.wake.unbounded_send(self.cluster.clone());
    }

    async fn until_ready(&self) {
        loop {
            match tokio::time::timeout(ANSWER, self.version()).await {
                Ok(Ok(version)) => {
                    tracing::info!(cluster = %self.cluster, version, "the tenant's API server is ready");
                    {
                        let mut view = lock(&self.view);
                        view.version = Some(version);
                        view.connections += 1;
                    }
                    self.wake().await;
                    return;
                }
                Ok(Err(error)) => lock(&self.view).waiting = clip(not_ready(&error)),
                Err(_) => lock(&self.view).waiting = format!("no answer within {} s", ANSWER.as_secs()),
            }
            self.looked.send_replace(true);
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
        let nodes = Api::<SeenNode>::all(self.client.clone());
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
        let mut changed = false;
        loop {
            pace.tick().await;
            tokio::select! {
                () = self.wake(), if changed => changed = false,
                event = nodes.next() => match event {
                    Some(Ok(event)) => {
                        let is_slot = |name: &str| self.slots.borrow().contains_key(name);
                        let mut view = lock(&self.view);
                        changed |= note(&mut view, &mut listing, is_slot, event);
                        if view.listed {
                            self.looked.send_replace(true);
                        }
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

#[cfg(test)]
mod tests;
