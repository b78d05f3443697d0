//! What a cluster's status says: pure, from what was applied and observed in this reconcile.

use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kubernest_crds::{
    Certificate, IngressRoute, Phase, Slot as SlotRow, TenantCluster, TenantClusterStatus, conditions as types, reasons,
};
use kubernest_runtime::conditions::{self, Status};

use super::{
    build::{
        network::{API_PORT, Network},
        slots::{Slot, claim_name},
    },
    link::{NodeFacts, View},
    validate::Validated,
};

/// Certificates that status lists at most.
const CERTIFICATES: usize = 64;
/// Slots that a message names at most.
const NAMED: usize = 3;

/// How far a reconcile came, and what it saw.
#[derive(Default)]
pub struct Progress {
    /// The cluster could be parsed.
    pub valid: Option<Validated>,
    /// The network is allocated.
    pub network: Option<Network>,
    /// Network objects are applied; the API Service's address.
    pub cluster_ip: Option<IpAddr>,
    /// Keys, certificates and the kubeconfig are stored.
    pub pki: bool,
    /// Certificates and when they end.
    pub certificates: Vec<(String, Timestamp)>,
    /// Slots, applied.
    pub slots: Vec<SlotState>,
    /// Slots that are being removed.
    pub leaving: Vec<String>,
    /// The tenant, once there is a connection to it.
    pub view: View,
    /// Add-ons are applied.
    pub addons: bool,
    /// CoreDNS answers.
    pub dns: bool,
}

/// A slot as it is.
#[derive(Clone, Debug)]
pub struct SlotState {
    /// The slot.
    pub slot: Slot,
    /// The machine is Ready.
    pub machine_ready: bool,
    /// The machine's state in one word.
    pub machine: String,
    /// Its node in the tenant.
    pub node: Option<NodeFacts>,
    /// What its guest said last.
    pub console: String,
    /// Somebody deleted its data disk, which goes once no machine uses it.
    pub losing_data: bool,
}

impl SlotState {
    /// The tenant's word alone is not enough: it calls a node Ready for most of a minute after its machine is gone.
    pub fn node_ready(&self) -> bool {
        self.machine_ready && self.node.as_ref().is_some_and(|node| node.ready)
    }

    /// Why the slot is not up, in one sentence.
    fn waiting(&self) -> String {
        let name = &self.slot.name;
        let state = match &self.node {
            // Its pod goes, or its node is not heard of.
            _ if !self.machine_ready && self.machine == "Running" => {
                format!("{name}: the virtual machine is not ready")
            }
            _ if !self.machine_ready => format!("{name}: the virtual machine is {}", self.machine),
            None => format!("{name}: the virtual machine runs and has not joined yet"),
            Some(node) if node.message.is_empty() => format!("{name}: the node is not Ready"),
            Some(node) => format!("{name}: {}", node.message),
        };
        if self.console.is_empty() {
            state
        } else {
            format!("{state} (the guest said: {})", self.console)
        }
    }
}

/// What went wrong in a reconcile.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The step.
    pub step: &'static str,
    /// The error and its causes.
    pub message: String,
    /// Trying again changes nothing: the reason that stands in the condition instead of Error.
    pub terminal: Option<&'static str>,
}

/// A condition before it has a time.
struct Verdict {
    status: Status,
    reason: &'static str,
    message: String,
}

fn holds(message: impl Into<String>) -> Verdict {
    Verdict {
        status: Status::True,
        reason: reasons::AVAILABLE,
        message: message.into(),
    }
}

fn waits(reason: &'static str, message: impl Into<String>) -> Verdict {
    Verdict {
        status: Status::False,
        reason,
        message: message.into(),
    }
}

/// The status after a reconcile.
pub fn derive(
    cluster: &TenantCluster,
    progress: &Progress,
    failure: Option<&Failure>,
    now: Timestamp,
) -> TenantClusterStatus {
    let previous = cluster.status.clone().unwrap_or_default();
    let mut status = TenantClusterStatus {
        observed_generation: cluster.metadata.generation,
        conditions: previous.conditions.clone(),
        version: progress.view.version.clone().or(previous.version.clone()),
        vni: progress.network.map(|network| network.vni).or(previous.vni),
        node_cidr: progress
            .network
            .map(|network| network.node_cidr.to_string())
            .or(previous.node_cidr.clone()),
        ..TenantClusterStatus::default()
    };
    if let Some(valid) = &progress.valid {
        status.endpoint = Some(valid.endpoint());
        let route = |address: IpAddr| IngressRoute {
            host: valid.host.clone(),
            address: address.to_string(),
            port: API_PORT,
        };
        status.ingress = progress.cluster_ip.map(route).or(previous.ingress.clone());
    }
    if progress.slots.is_empty() {
        (status.slots, status.nodes) = (previous.slots.clone(), previous.nodes.clone());
        status.certificates = previous.certificates.clone();
    } else {
        status.slots = progress.slots.iter().map(row).collect();
        let ready = progress.slots.iter().filter(|slot| slot.node_ready()).count();
        status.nodes = Some(format!("{ready}/{}", progress.slots.len()));
        let list = progress.certificates.iter().take(CERTIFICATES);
        status.certificates = list
            .map(|(name, end)| Certificate {
                name: name.clone(),
                not_after: Time(*end),
            })
            .collect();
    }
    let all = verdicts(progress, failure);
    let mut set = |type_: &str, verdict: &Verdict| {
        let generation = cluster.metadata.generation;
        let Verdict {
            status: value,
            reason,
            message,
        } = verdict;
        conditions::set_at(&mut status.conditions, type_, *value, reason, message, generation, now);
    };
    let ready = overall(&all, progress, failure);
    set(types::READY, &ready);
    for (type_, verdict) in &all {
        set(type_, verdict);
    }
    let was_ready = matches!(previous.phase, Phase::Ready | Phase::Degraded);
    status.phase = match failure {
        Some(failure) if failure.terminal.is_some() => Phase::Failed,
        _ if ready.status == Status::True => Phase::Ready,
        _ if was_ready => Phase::Degraded,
        _ if progress.network.is_none() => Phase::Pending,
        _ => Phase::Provisioning,
    };
    status
}

fn row(state: &SlotState) -> SlotRow {
    SlotRow {
        name: state.slot.name.clone(),
        role: state.slot.role,
        pool: state.slot.pool.clone(),
        ip: state.slot.ip.to_string(),
        mac: state.slot.mac.clone(),
        machine_ready: state.machine_ready,
        node_ready: state.node_ready(),
    }
}

fn verdicts(progress: &Progress, failure: Option<&Failure>) -> [(&'static str, Verdict); 6] {
    let failed = |what: &str| match failure {
        Some(failure) => waits(
            failure.terminal.unwrap_or(reasons::ERROR),
            format!("{what}: the step {:?} failed: {}", failure.step, failure.message),
        ),
        None => waits(reasons::IN_PROGRESS, what),
    };
    let network = match (progress.network, progress.cluster_ip) {
        (Some(network), Some(_)) => holds(format!("VNI {}, nodes in {}", network.vni, network.node_cidr)),
        _ => failed("allocating the tenant's network"),
    };
    let pki = if progress.pki {
        holds("keys, certificates and the admin kubeconfig are stored")
    } else {
        failed("making keys and certificates")
    };
    let control_plane = control_plane(progress).unwrap_or_else(|| failed("making the control plane's virtual machine"));
    let api = control_plane.status == Status::True;
    let first = || waits(reasons::WAITING, "waits for the control plane");
    let nodes = if api { nodes(progress) } else { first() };
    let addons = match (api, progress.addons, progress.dns) {
        (false, ..) => first(),
        (true, false, _) => failed("applying flannel and CoreDNS in the tenant"),
        (true, true, false) if nodes.status == Status::True => {
            waits(reasons::IN_PROGRESS, "waits for CoreDNS to answer")
        }
        (true, true, false) => {
            let message = format!("waits for CoreDNS to answer, which needs a node: {}", nodes.message);
            waits(reasons::IN_PROGRESS, message)
        }
        (true, true, true) => holds("flannel and CoreDNS run"),
    };
    let ingress = match (&progress.valid, progress.cluster_ip, api) {
        (Some(valid), Some(address), true) => holds(format!("{} leads to {address}:{API_PORT}", valid.host)),
        (Some(_), Some(_), false) => first(),
        _ => failed("making the API Service"),
    };
    [
        (types::NETWORK_READY, network),
        (types::PKI_READY, pki),
        (types::CONTROL_PLANE_READY, control_plane),
        (types::ADDONS_READY, addons),
        (types::NODES_READY, nodes),
        (types::INGRESS_READY, ingress),
    ]
}

/// None while there is no machine yet.
fn control_plane(progress: &Progress) -> Option<Verdict> {
    let state = progress.slots.iter().find(|state| state.slot.is_control_plane())?;
    if !state.machine_ready {
        return Some(waits(reasons::MACHINES_STARTING, state.waiting()));
    }
    Some(match &progress.view.version {
        Some(version) => holds(format!("the API server answers, {version}")),
        None => {
            let mut message = format!(
                "{}: the virtual machine runs, its API server does not answer yet",
                state.slot.name
            );
            if !state.console.is_empty() {
                message.push_str(&format!(" (the guest said: {})", state.console));
            } else if !progress.view.waiting.is_empty() {
                message.push_str(&format!(" ({})", progress.view.waiting));
            }
            waits(reasons::API_SERVER_STARTING, message)
        }
    })
}

fn nodes(progress: &Progress) -> Verdict {
    let missing: Vec<_> = progress.slots.iter().filter(|state| !state.node_ready()).collect();
    if missing.is_empty() {
        return holds(format!("{0} of {0} nodes are Ready", progress.slots.len()));
    }
    let mut text = missing
        .iter()
        .take(NAMED)
        .map(|state| state.waiting())
        .collect::<Vec<_>>()
        .join("; ");
    if missing.len() > NAMED {
        text.push_str(&format!("; and {} more", missing.len() - NAMED));
    }
    let reason = if missing.iter().any(|state| !state.machine_ready) {
        reasons::MACHINES_STARTING
    } else {
        reasons::NODES_NOT_READY
    };
    waits(reason, text)
}

fn overall(all: &[(&'static str, Verdict)], progress: &Progress, failure: Option<&Failure>) -> Verdict {
    if let Some(failure) = failure {
        let next = if failure.terminal.is_some() {
            ""
        } else {
            "; it is tried again"
        };
        let message = format!("the step {:?} failed: {}{next}", failure.step, failure.message);
        return waits(failure.terminal.unwrap_or(reasons::ERROR), message);
    }
    let mut slots = progress.slots.iter().filter(|state| state.slot.is_control_plane());
    if let Some(state) = slots.find(|state| state.losing_data) {
        let claim = claim_name(&state.slot.name);
        let message = format!(
            "PersistentVolumeClaim {claim}, which has all that the tenant's etcd knows, is being deleted: it goes when {} \
             stops, and a deletion can't be taken back; save what is to be kept (etcdctl snapshot save)",
            state.slot.name
        );
        return waits(reasons::LOSING_DATA, message);
    }
    match all.iter().find(|(_, verdict)| verdict.status != Status::True) {
        Some((_, verdict)) => waits(verdict.reason, verdict.message.clone()),
        None => holds("everything that was asked for runs"),
    }
}

/// The status of a cluster that is being taken down.
pub fn deleting(cluster: &TenantCluster, waiting: &str, now: Timestamp) -> TenantClusterStatus {
    let mut status = cluster.status.clone().unwrap_or_default();
    status.phase = Phase::Deleting;
    status.observed_generation = cluster.metadata.generation;
    let generation = cluster.metadata.generation;
    let message = format!("the cluster is being deleted: {waiting}");
    conditions::set_at(
        &mut status.conditions,
        types::READY,
        Status::False,
        reasons::DELETING,
        &message,
        generation,
        now,
    );
    // No new connection is led to it.
    status.ingress = None;
    status
}

/// What became true since the last status, and what no longer is.
pub fn milestones(before: &[Condition], after: &[Condition]) -> Vec<Milestone> {
    let changed = after.iter().filter_map(|condition| {
        let reached = condition.status == "True";
        let was = conditions::get(before, &condition.type_);
        let asked_more = was.is_some_and(|was| was.observed_generation != condition.observed_generation);
        match was.is_some_and(|was| was.status == "True") {
            was if was == reached => None,
            // What was just asked for is not lost, and what waits for a loss is none of its own.
            true if asked_more || condition.reason == reasons::WAITING => None,
            _ => Some((reached, condition)),
        }
    });
    let changed: Vec<_> = changed.collect();
    let is_ready = |condition: &Condition| condition.type_ == types::READY;
    // Ready repeats which other is lost, if one is.
    let repeats = changed
        .iter()
        .any(|(reached, condition)| !reached && !is_ready(condition));
    let told = changed
        .into_iter()
        .filter(|(reached, condition)| *reached || !is_ready(condition) || !repeats);
    told.map(|(reached, condition)| Milestone {
        reached,
        reason: match condition.type_.strip_suffix("Ready") {
            // `NodesNotReady`, as the node controller's NodeNotReady.
            Some(what) if !reached => format!("{what}NotReady"),
            _ => condition.type_.clone(),
        },
        note: condition.message.clone(),
    })
    .collect()
}

/// A step of a cluster's life that its events tell.
#[derive(Debug, PartialEq)]
pub struct Milestone {
    /// Forward, or back.
    pub reached: bool,
    /// The event's reason.
    pub reason: String,
    /// The event's text.
    pub note: String,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::tenantcluster::{
        build::slots::{plan, tests::network},
        validate::{
            tests::{cluster, options},
            validate,
        },
    };

    fn progress(cluster: &TenantCluster) -> Progress {
        let valid = validate(cluster, &options()).unwrap();
        let slots = plan(&valid, &network(), &BTreeMap::new()).unwrap();
        let state = |slot| SlotState {
            slot,
            machine_ready: true,
            machine: "Running".into(),
            node: Some(NodeFacts {
                ready: true,
                ..NodeFacts::default()
            }),
            console: String::new(),
            losing_data: false,
        };
        Progress {
            valid: Some(valid),
            network: Some(network()),
            cluster_ip: Some("10.96.0.7".parse().unwrap()),
            pki: true,
            certificates: vec![("ca".into(), at(1000))],
            slots: slots.into_iter().map(state).collect(),
            leaving: Vec::new(),
            view: View {
                version: Some("v1.35.4".into()),
                listed: true,
                ..View::default()
            },
            addons: true,
            dns: true,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn condition<'a>(status: &'a TenantClusterStatus, type_: &str) -> &'a Condition {
        conditions::get(&status.conditions, type_).unwrap()
    }

    #[test]
    fn status_of_a_cluster_that_runs() {
        let cluster = cluster(json!({"version": "v1.35.4"}));
        insta::assert_yaml_snapshot!(derive(&cluster, &progress(&cluster), None, at(100)));
    }

    #[test]
    fn status_says_the_same_twice() {
        let mut cluster = cluster(json!({"version": "v1.35.4"}));
        let first = derive(&cluster, &progress(&cluster), None, at(100));
        cluster.status = Some(first.clone());
        assert_eq!(derive(&cluster, &progress(&cluster), None, at(200)), first);
    }

    #[test]
    fn status_says_that_data_is_being_deleted() {
        let cluster = cluster(json!({"version": "v1.35.4"}));
        let mut progress = progress(&cluster);
        // What a worker has is made anew.
        let workers = |state: &&mut SlotState| !state.slot.is_control_plane();
        progress
            .slots
            .iter_mut()
            .filter(workers)
            .for_each(|state| state.losing_data = true);
        assert_eq!(derive(&cluster, &progress, None, at(100)).phase, Phase::Ready);
        progress.slots.iter_mut().for_each(|state| state.losing_data = true);
        let status = derive(&cluster, &progress, None, at(100));
        let ready = condition(&status, types::READY);
        assert_eq!(
            (ready.status.as_str(), ready.reason.as_str()),
            ("False", reasons::LOSING_DATA)
        );
        let name = claim_name(&progress.slots[0].slot.name);
        assert!(ready.message.contains(&name), "{}", ready.message);
        assert_eq!(condition(&status, types::CONTROL_PLANE_READY).status, "True");
    }

    #[test]
    fn status_names_the_node_that_coredns_waits_for() {
        let cluster = cluster(json!({"version": "v1.35.4"}));
        let mut progress = progress(&cluster);
        progress.dns = false;
        let message = |progress: &Progress| {
            let status = derive(&cluster, progress, None, at(100));
            condition(&status, types::READY).message.clone()
        };
        assert_eq!(message(&progress), "waits for CoreDNS to answer");
        let slot = progress.slots.last_mut().unwrap();
        slot.node = Some(NodeFacts {
            message: "Kubelet stopped posting node status.".into(),
            ..NodeFacts::default()
        });
        assert!(
            message(&progress).contains("Kubelet stopped posting"),
            "{}",
            message(&progress)
        );
    }

    #[test]
    fn status_names_what_the_guest_said() {
        let cluster = cluster(json!({"version": "v1.35.4"}));
        let mut progress = progress(&cluster);
        progress.view.version = None;
        progress.slots[0].node = None;
        progress.slots[0].console = "kubernest-guest: disk: FAILED".into();
        let status = derive(&cluster, &progress, None, at(100));
        assert_eq!(status.phase, Phase::Provisioning);
        let ready = condition(&status, types::READY);
        assert_eq!(ready.reason, reasons::API_SERVER_STARTING);
        assert!(
            ready.message.contains("kubernest-guest: disk: FAILED"),
            "{}",
            ready.message
        );
        assert_eq!(condition(&status, types::NODES_READY).reason, reasons::WAITING);
    }

    #[test]
    fn status_is_degraded_after_it_was_ready() {
        let mut cluster = cluster(json!({"version": "v1.35.4"}));
        let mut progress = progress(&cluster);
        cluster.status = Some(derive(&cluster, &progress, None, at(100)));
        progress.slots[1].machine_ready = false;
        progress.slots[1].machine = "Starting".into();
        progress.slots[1].node = None;
        let status = derive(&cluster, &progress, None, at(200));
        assert_eq!((status.phase, status.nodes.as_deref()), (Phase::Degraded, Some("1/2")));
        let nodes = condition(&status, types::NODES_READY);
        assert_eq!(nodes.message, "customera-default-0: the virtual machine is Starting");
    }

    #[test]
    fn status_names_the_step_that_failed() {
        let cluster = cluster(json!({"version": "v1.35.4"}));
        let failure = Failure {
            step: "network",
            message: "no free VNI".into(),
            terminal: Some(reasons::EXHAUSTED),
        };
        let status = derive(&cluster, &Progress::default(), Some(&failure), at(100));
        assert_eq!(status.phase, Phase::Failed);
        assert_eq!(condition(&status, types::READY).reason, reasons::EXHAUSTED);
        assert!(condition(&status, types::NETWORK_READY).message.contains("no free VNI"));
    }

    #[test]
    fn status_milestones_are_what_became_true() {
        let cluster = cluster(json!({"version": "v1.35.4"}));
        let mut progress = progress(&cluster);
        progress.dns = false;
        let before = derive(&cluster, &progress, None, at(100)).conditions;
        progress.dns = true;
        let after = derive(&cluster, &progress, None, at(200)).conditions;
        let all = milestones(&before, &after);
        let reasons: Vec<_> = all
            .iter()
            .map(|milestone| (milestone.reached, milestone.reason.as_str()))
            .collect();
        assert_eq!(reasons, [(true, "Ready"), (true, "AddonsReady")]);
        assert!(milestones(&after, &after).is_empty());
    }

    #[test]
    fn status_of_a_lost_machine_does_not_wait_for_the_tenant_to_notice() {
        let mut cluster = cluster(json!({"version": "v1.35.4"}));
        let mut progress = progress(&cluster);
        let before = derive(&cluster, &progress, None, at(100));
        cluster.status = Some(before.clone());
        let worker = progress
            .slots
            .iter_mut()
            .find(|state| !state.slot.is_control_plane())
            .unwrap();
        (worker.machine_ready, worker.machine) = (false, "Starting".into());
        assert!(worker.node.as_ref().unwrap().ready, "the tenant does not know yet");
        let after = derive(&cluster, &progress, None, at(200));
        assert_eq!((after.phase, after.nodes.as_deref()), (Phase::Degraded, Some("1/2")));
        let lost = milestones(&before.conditions, &after.conditions);
        let note = "customera-default-0: the virtual machine is Starting".to_owned();
        let reason = "NodesNotReady".to_owned();
        assert_eq!(
            lost,
            [Milestone {
                reached: false,
                reason,
                note
            }]
        );
    }

    #[test]
    fn status_milestones_name_what_is_lost_and_no_more() {
        let mut cluster = cluster(json!({"version": "v1.35.4"}));
        cluster.metadata.generation = Some(1);
        let before = derive(&cluster, &progress(&cluster), None, at(100)).conditions;
        let lost = |cluster: &TenantCluster, change: fn(&mut SlotState)| -> Vec<String> {
            let mut progress = progress(cluster);
            change(&mut progress.slots[0]);
            let after = derive(cluster, &progress, None, at(200)).conditions;
            let all = milestones(&before, &after).into_iter();
            all.map(|milestone| milestone.reason).collect()
        };
        // The rest waits for it.
        assert_eq!(
            lost(&cluster, |slot| slot.machine_ready = false),
            ["ControlPlaneNotReady"]
        );
        assert_eq!(lost(&cluster, |slot| slot.losing_data = true), ["NotReady"]);
        // A node that was asked for just now.
        cluster.metadata.generation = Some(2);
        assert!(lost(&cluster, |slot| slot.machine_ready = false).is_empty());
    }
}
