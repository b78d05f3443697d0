//! The TenantCluster controller: dereference → validate → build → apply → status, in one pass that a crash may end
//! anywhere.
//!
//! Order: finalizer, network, API Service, CAs; then all slots' machines at once; then, as soon as the tenant's API
//! server answers, what belongs inside. It sees VirtualMachines only: no pod, no launcher, no libvirt.

pub mod apply;
pub mod build;
pub mod console;
pub mod context;
pub mod csr;
pub mod dereference;
pub mod inner;
pub mod link;
pub mod signer;
pub mod status;
pub mod teardown;
pub mod validate;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{
    ResourceExt,
    runtime::{controller::Action, reflector::ObjectRef},
};
use kubernest_crds::{NetworkAllocation, TENANT_FINALIZER, TenantCluster, reasons};
use kubernest_runtime::{
    Applier, ApplyError, StepError,
    telemetry::{chain, truncate},
};

pub use self::context::Context;
use self::{
    apply::{SlotInput, WriteError},
    build::{
        network::{Network, NetworkError},
        pki::{self, Authorities, PkiError},
        slots::{self, NoAddress, Slot},
    },
    dereference::{DereferenceError, Observed},
    inner::InnerError,
    link::{Link, LinkError, Target},
    status::{Failure, Milestone, Progress, SlotState},
    teardown::TeardownError,
    validate::{Invalid, Validated},
};

/// Time between looks at a cluster that is not ready, or leaving, besides those that events cause.
const SOON: Duration = Duration::from_secs(10);
/// The same while only something inside the tenant is waited for that no watch tells.
const INSIDE: Duration = Duration::from_secs(3);
/// Longest time that a reconcile spends inside a tenant.
const INSIDE_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for the first answer of a cluster that was Ready, by an operator that just began.
const FIRST_LOOK: Duration = Duration::from_secs(15);
/// Time between looks at a cluster at rest, for certificates that come of age.
const AT_REST: Duration = Duration::from_secs(3600);
/// Time between looks for room where all was taken: others give theirs back, which is no event of this cluster.
const FULL: Duration = Duration::from_secs(300);

/// Longest message of a failure in status, in bytes.
const MESSAGE_BYTES: usize = 1024;

/// The step that failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Error {
    #[error("the finalizer can't be changed")]
    Finalizer(#[source] ApplyError),
    #[error("what exists can't be read")]
    Dereference(#[source] DereferenceError),
    #[error("the TenantCluster can't be carried out as written")]
    Validate(#[source] Invalid),
    #[error("the tenant's network can't be made")]
    Network(#[source] WriteError),
    #[error("the tenant's keys can't be made")]
    Pki(#[source] WriteError),
    #[error("the slots can't be planned")]
    Plan(#[source] NoAddress),
    #[error("the slots' objects can't be written")]
    Slots(#[source] WriteError),
    #[error("the tenant can't be connected to")]
    Link(#[source] LinkError),
    #[error("the operator has no certificate for the tenant")]
    Credential(#[source] PkiError),
    #[error("the add-ons can't be built")]
    Addons(#[source] build::addons::AddonError),
    #[error("the tenant can't be written into")]
    Inner(#[source] InnerError),
    #[error("the tenant's API server is too slow: not done within {0:?}")]
    Slow(Duration),
    #[error("taking down failed")]
    Teardown(#[source] TeardownError),
    #[error("the status can't be written")]
    Status(#[source] ApplyError),
}

impl StepError for Error {
    fn step(&self) -> &'static str {
        match self {
            Error::Finalizer(_) => "finalizer",
            Error::Dereference(_) => "dereference",
            Error::Validate(_) => "validate",
            Error::Network(_) => "network",
            Error::Pki(_) | Error::Credential(_) => "pki",
            Error::Plan(_) => "plan",
            Error::Slots(_) => "slots",
            Error::Link(_) => "link",
            Error::Addons(_) => "addons",
            Error::Inner(_) | Error::Slow(_) => "inner",
            Error::Teardown(_) => "teardown",
            Error::Status(_) => "status",
        }
    }
}

impl Error {
    /// Whether trying again changes nothing, and the reason to give then.
    fn terminal(&self) -> Option<&'static str> {
        match self {
            Error::Validate(_) => Some(reasons::INVALID),
            Error::Network(WriteError::Network(NetworkError::Exhausted { .. })) | Error::Plan(_) => {
                Some(reasons::EXHAUSTED)
            }
            _ => None,
        }
    }

    /// Somebody else wrote at the same time: tried again at once and of no interest to anyone.
    fn is_conflict(&self) -> bool {
        match self {
            Error::Finalizer(error) | Error::Status(error) => error.is_conflict(),
            _ => false,
        }
    }

    fn failure(&self) -> Failure {
        let source = std::error::Error::source(self);
        let message = source.map_or_else(|| self.to_string(), chain);
        Failure {
            step: self.step(),
            // It may repeat what a tenant's API server answered.
            message: truncate(&message, MESSAGE_BYTES).to_owned(),
            terminal: self.terminal(),
        }
    }
}

/// Brings one cluster closer to what it should be.
pub async fn reconcile(cluster: Arc<TenantCluster>, context: Arc<Context>) -> Result<Action, Error> {
    if cluster.metadata.deletion_timestamp.is_some() {
        return delete(&cluster, &context).await;
    }
    let mut progress = Progress::default();
    let result = advance(&cluster, &context, &mut progress).await;
    if result.as_ref().is_err_and(Error::is_conflict) {
        return result.map(|()| Action::await_change());
    }
    let now = Timestamp::now();
    let failure = result.as_ref().err().map(Error::failure);
    let status = status::derive(&cluster, &progress, failure.as_ref(), now);
    context
        .applier
        .apply_status(&*cluster, &status)
        .await
        .map_err(Error::Status)?;
    announce(&cluster, &context, &status, failure.as_ref()).await;
    match result {
        Err(error) => match error.terminal() {
            None => Err(error),
            Some(reasons::EXHAUSTED) => Ok(Action::requeue(FULL)),
            Some(_) => Ok(Action::requeue(AT_REST)),
        },
        Ok(()) if status.phase == kubernest_crds::Phase::Ready && progress.leaving.is_empty() => {
            Ok(Action::requeue(AT_REST))
        }
        Ok(()) if progress.addons && !progress.dns => Ok(Action::requeue(INSIDE)),
        Ok(()) => Ok(Action::requeue(SOON)),
    }
}

/// The steps, in order. What each achieved is in `progress`, also when a later one fails.
async fn advance(cluster: &TenantCluster, context: &Context, progress: &mut Progress) -> Result<(), Error> {
    let link = outside(cluster, context, progress).await?;
    if progress.view.version.is_none() {
        return Ok(());
    }
    if !was_ready(cluster) {
        // Writing inside takes a slow guest a while; that its API server answers is to be seen at once.
        let status = status::derive(cluster, progress, None, Timestamp::now());
        context
            .applier
            .apply_status(cluster, &status)
            .await
            .map_err(Error::Status)?;
    }
    bounded(inside(&link, progress)).await
}

/// A tenant may be paused, starved or hostile: it must not hold up the others for longer than this.
async fn bounded<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(INSIDE_LIMIT, work)
        .await
        .unwrap_or(Err(Error::Slow(INSIDE_LIMIT)))
}

/// Everything in the outer cluster.
async fn outside(cluster: &TenantCluster, context: &Context, progress: &mut Progress) -> Result<Arc<Link>, Error> {
    let applier = &context.applier;
    let valid = validated(cluster, context).await?;
    progress.valid = Some(valid.clone());
    let (observed, allocations) = claimed(cluster, applier).await?;
    let pool = context.options.node_cidr_pool;
    let network = apply::network(applier, cluster, &valid, pool, allocations)
        .await
        .map_err(Error::Network)?;
    progress.network = Some(network);
    let (cluster_ip, authorities) = foundation(applier, &valid, &network, &observed).await?;
    progress.cluster_ip = Some(cluster_ip);
    let slots = slots::plan(&valid, &network, &taken(&observed, &network)).map_err(Error::Plan)?;
    let link = connect(cluster, context, &authorities, cluster_ip, &slots, &observed).await?;
    progress.view = link.view();
    write_slots(
        context,
        progress,
        (&valid, &network),
        (&authorities, cluster_ip),
        &observed,
        &slots,
    )
    .await?;
    look_at_consoles(applier, cluster, &observed, progress).await?;
    let wanted: BTreeSet<String> = slots.iter().map(|slot| slot.name.clone()).collect();
    progress.leaving = teardown::surplus(applier, &observed, &wanted, Some(&link))
        .await
        .map_err(Error::Teardown)?;
    Ok(link)
}

/// The cluster as it can be built among the others.
async fn validated(cluster: &TenantCluster, context: &Context) -> Result<Validated, Error> {
    let options = &context.options;
    let found = dereference::surroundings(context.applier.client(), cluster, &options.node_images)
        .await
        .map_err(Error::Dereference)?;
    validate::among(cluster, options, &found).map_err(Error::Validate)
}

/// Takes the cluster in hand; what exists of it, and allocations among which its own is, if it has one.
async fn claimed(cluster: &TenantCluster, applier: &Applier) -> Result<(Observed, Vec<NetworkAllocation>), Error> {
    let client = applier.client();
    let (_, observed, allocations) = futures::try_join!(
        async {
            applier
                .add_finalizer(cluster, TENANT_FINALIZER)
                .await
                .map_err(Error::Finalizer)
        },
        async {
            dereference::dereference(client, cluster)
                .await
                .map_err(Error::Dereference)
        },
        async {
            dereference::allocations(client, cluster)
                .await
                .map_err(Error::Dereference)
        },
    )?;
    Ok((observed, allocations))
}

/// What all slots stand on: the API Service, whose address this gives, the tenant network, and the CAs.
async fn foundation(
    applier: &Applier,
    valid: &Validated,
    network: &Network,
    observed: &Observed,
) -> Result<(IpAddr, Arc<Authorities>), Error> {
    let (cluster_ip, (), authorities) = futures::try_join!(
        async { apply::service(applier, valid, observed).await.map_err(Error::Network) },
        async {
            apply::attachment(applier, valid, network, observed)
                .await
                .map_err(Error::Network)
        },
        async { apply::authorities(applier, valid, observed).await.map_err(Error::Pki) },
    )?;
    Ok((cluster_ip, authorities))
}

/// Host indices of all slots of which anything exists.
fn taken(observed: &Observed, network: &Network) -> BTreeMap<String, u8> {
    let written = observed.slots().into_iter();
    written
        .filter_map(|(slot, address)| Some((slot, network.index(address?)?)))
        .collect()
}

/// The connection to the tenant; made when there is none, or when the one there is leads elsewhere or ages.
async fn connect(
    cluster: &TenantCluster,
    context: &Context,
    authorities: &Arc<Authorities>,
    cluster_ip: IpAddr,
    slots: &[Slot],
    observed: &Observed,
) -> Result<Arc<Link>, Error> {
    let uid = cluster.uid().unwrap_or_default();
    let endpoint = (context.dial)(cluster_ip);
    let mut addresses: BTreeMap<String, Ipv4Addr> = BTreeMap::new();
    addresses.extend(slots.iter().map(|slot| (slot.name.clone(), slot.ip)));
    let mut control_planes = slots.iter().filter(|slot| slot.is_control_plane());
    let runs = control_planes.any(|slot| observed.runs(&slot.name));
    let link = match context
        .link(&uid)
        .filter(|link| link.serves(&endpoint, Timestamp::now()))
    {
        Some(link) => {
            link.set_slots(addresses);
            link
        }
        None => {
            let credential = pki::operator_credential(authorities).await.map_err(Error::Credential)?;
            let authorities = authorities.clone();
            let target = Target {
                cluster: ObjectRef::from_obj(cluster),
                endpoint,
                credential,
                authorities,
            };
            let link = Link::open(target, addresses, context.wake.clone())
                .await
                .map_err(Error::Link)?;
            let link = Arc::new(link);
            context.set_link(&uid, Some(link.clone()));
            if runs && was_ready(cluster) {
                link.first_look(FIRST_LOOK).await;
            }
            link
        }
    };
    if !runs {
        link.reset();
    }
    Ok(link)
}

/// Whether its control plane was Ready when it was looked at last, by this process or the one before.
fn was_ready(cluster: &TenantCluster) -> bool {
    kubernest_runtime::conditions::is_true(told(cluster), kubernest_crds::conditions::CONTROL_PLANE_READY)
}

/// The conditions that the status has.
fn told(cluster: &TenantCluster) -> &[Condition] {
    let status = cluster.status.as_ref();
    status.map(|status| status.conditions.as_slice()).unwrap_or_default()
}

async fn write_slots(
    context: &Context,
    progress: &mut Progress,
    (valid, network): (&Validated, &Network),
    (authorities, cluster_ip): (&Authorities, IpAddr),
    observed: &Observed,
    slots: &[Slot],
) -> Result<(), Error> {
    let applier = &context.applier;
    let now = Timestamp::now();
    let nodes = progress.view.nodes.clone();
    let ready = nodes
        .iter()
        .filter(|(name, node)| node.ready && observed.runs(name))
        .map(|(name, _)| name.clone())
        .collect();
    let input = SlotInput {
        valid,
        network,
        authorities,
        cluster_ip,
        observed,
        ready: &ready,
        now,
    };
    // The machines first, what only people wait for after them.
    let expiries = apply::slots(applier, &input, slots).await.map_err(Error::Slots)?;
    let admin = apply::kubeconfig(applier, valid, authorities, observed, now)
        .await
        .map_err(Error::Pki)?;
    progress.pki = true;
    let own = authorities.expiries().into_iter().chain([("kubeconfig", admin)]);
    progress.certificates = own.map(|(name, end)| (name.to_owned(), end)).collect();
    for (slot, expiries) in slots.iter().zip(expiries) {
        let machine = observed.machines.get(&slot.name);
        let printable = machine.and_then(|machine| machine.status.as_ref()?.printable_status.clone());
        progress.slots.push(SlotState {
            slot: slot.clone(),
            machine_ready: observed.runs(&slot.name),
            machine: printable.unwrap_or_else(|| "not started yet".to_owned()),
            node: nodes.get(&slot.name).cloned(),
            console: String::new(),
            losing_data: observed.is_losing_data(&slot.name),
        });
        let named = expiries
            .into_iter()
            .map(|(name, end)| (format!("{}/{name}", slot.name), end));
        progress.certificates.extend(named);
    }
    Ok(())
}

/// Reads what guests said of which something was asked and that are not up.
async fn look_at_consoles(
    applier: &Applier,
    cluster: &TenantCluster,
    observed: &Observed,
    progress: &mut Progress,
) -> Result<(), Error> {
    let down = |state: &SlotState| !state.node_ready();
    let asked = |state: &SlotState| {
        let machine = observed.machines.get(&state.slot.name);
        machine.is_some_and(|machine| {
            machine
                .annotations()
                .contains_key(kubernest_crds::labels::CONSOLE_TAIL_REQUEST)
        })
    };
    if !progress.slots.iter().any(|state| down(state) && asked(state)) {
        return Ok(());
    }
    let instances = dereference::instances(applier.client(), cluster)
        .await
        .map_err(Error::Dereference)?;
    for state in progress.slots.iter_mut().filter(|state| down(state)) {
        state.console = console::tail(instances.get(&state.slot.name));
    }
    Ok(())
}

/// Add-ons, labels and taints, once the tenant's API server answers.
async fn inside(link: &Link, progress: &mut Progress) -> Result<(), Error> {
    let control_plane = progress.slots.iter().find(|state| state.slot.is_control_plane());
    let (Some(valid), Some(control_plane)) = (&progress.valid, control_plane) else {
        return Ok(());
    };
    let addons = build::addons::all(valid, control_plane.slot.ip).map_err(Error::Addons)?;
    inner::apply_addons(link, &addons).await.map_err(Error::Inner)?;
    progress.addons = true;
    for state in &progress.slots {
        if let Some(node) = state.node.as_ref().filter(|node| !node.too_large) {
            inner::apply_node(link, &state.slot, node).await.map_err(Error::Inner)?;
        }
    }
    if progress.slots.iter().any(SlotState::node_ready) {
        progress.dns = inner::dns_available(link).await.map_err(Error::Inner)?;
    }
    Ok(())
}

async fn announce(
    cluster: &TenantCluster,
    context: &Context,
    status: &kubernest_crds::TenantClusterStatus,
    failure: Option<&Failure>,
) {
    let recorder = &context.recorder;
    for Milestone { reached, reason, note } in status::milestones(told(cluster), &status.conditions) {
        // What could not be looked at is not known to be lost.
        if reached || failure.is_none() {
            recorder.transition(cluster, reached, &reason, "Reconcile", &note).await;
        }
    }
    if let Some(failure) = failure {
        let reason = failure.terminal.unwrap_or(reasons::ERROR);
        let note = format!("the step {:?} failed: {}", failure.step, failure.message);
        recorder.warning(cluster, reason, "Reconcile", &note).await;
    }
}

async fn delete(cluster: &TenantCluster, context: &Context) -> Result<Action, Error> {
    if !cluster.finalizers().iter().any(|name| name == TENANT_FINALIZER) {
        return Ok(Action::await_change());
    }
    let applier = &context.applier;
    context.set_link(&cluster.uid().unwrap_or_default(), None);
    let result = teardown::cluster(applier, cluster).await;
    let waiting = match &result {
        Ok(None) => {
            applier
                .remove_finalizer(cluster, TENANT_FINALIZER)
                .await
                .map_err(Error::Finalizer)?;
            tracing::info!("the cluster is gone");
            return Ok(Action::await_change());
        }
        Ok(Some(waiting)) => waiting.clone(),
        Err(error) => format!("{}; it is tried again", chain(error)),
    };
    let status = status::deleting(cluster, &waiting, Timestamp::now());
    applier.apply_status(cluster, &status).await.map_err(Error::Status)?;
    context
        .recorder
        .normal(cluster, reasons::DELETING, "Delete", &waiting)
        .await;
    result.map(|_| Action::requeue(SOON)).map_err(Error::Teardown)
}
