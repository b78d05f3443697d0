//! Start, stop and restart of a VirtualMachine: pure decisions from what is there to the patches that bring it about.
//!
//! | strategy | start | stop | restart |
//! |---|---|---|---|
//! | Halted | the strategy becomes Always; paused: a request | only with a shorter grace period: a request | no |
//! | Manual | a request | a request | a request |
//! | RerunOnFailure | a request, unless it has failed | a request | a request |
//! | Always | no | the strategy becomes Halted | a request |
//! | Once | no | the strategy becomes Halted | no |
//!
//! A TenantCluster's machine is not stopped: the cluster would start it again at once.
//!
//! A request is an entry of `status.stateChangeRequests`, carried out by the machine controllers. A grace period is written
//! into the instance after that: alone it would shorten another stop than the one that was asked for. Sentences are
//! upstream's (virt-api).

use kubernest_crds::{
    TenantCluster,
    kubevirt::v1::{VirtualMachine, VirtualMachineInstance, VirtualMachineStatus, phase, run_strategy},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::{Failure, Kind};

/// Body of `start`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StartOptions {
    /// Let the guest stand still until it is unpaused.
    pub paused: bool,
    /// `All`: change nothing.
    pub dry_run: Option<Vec<String>>,
}

/// Body of `stop`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StopOptions {
    /// Seconds that the guest has to shut down.
    pub grace_period: Option<i64>,
    /// `All`: change nothing.
    pub dry_run: Option<Vec<String>>,
}

/// Body of `restart`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RestartOptions {
    /// 0: ended at once.
    pub grace_period_seconds: Option<i64>,
    /// `All`: change nothing.
    pub dry_run: Option<Vec<String>>,
}

/// What to write: JSON patches (RFC 6902), valid only for what was read. In this order.
#[derive(Debug, Default, PartialEq)]
pub struct Change {
    /// Of the machine.
    pub machine: Option<Value>,
    /// Of the machine's status.
    pub status: Option<Value>,
    /// Of the instance.
    pub instance: Option<Value>,
}

/// What is there.
#[derive(Clone, Copy)]
pub struct Found<'a> {
    pub machine: &'a VirtualMachine,
    pub instance: Option<&'a VirtualMachineInstance>,
}

impl<'a> Found<'a> {
    fn name(&self) -> &'a str {
        self.machine.metadata.name.as_deref().unwrap_or_default()
    }

    fn conflict(&self, why: &str) -> Failure {
        Failure::conflict(Kind::Machine, self.name(), why)
    }

    /// The TenantCluster whose node it is.
    fn cluster(&self) -> Option<&'a str> {
        let mut owners = self.machine.metadata.owner_references.iter().flatten();
        let owner = owners.find(|owner| owner.controller == Some(true))?;
        TenantCluster::is_named_by(&owner.api_version, &owner.kind).then_some(owner.name.as_str())
    }

    fn strategy(&self) -> Result<&'a str, Failure> {
        let spec = &self.machine.spec;
        match (spec.run_strategy.as_deref(), spec.running) {
            (Some(strategy), None) => Ok(strategy),
            (None, Some(true)) => Ok(run_strategy::ALWAYS),
            (None, Some(false)) => Ok(run_strategy::HALTED),
            _ => Err(self.conflict("Running and RunStrategy are mutually exclusive and one must be set")),
        }
    }

    fn phase(&self) -> Option<&'a str> {
        let status = self.instance?.status.as_ref();
        Some(status.and_then(|status| status.phase.as_deref()).unwrap_or_default())
    }

    fn is_over(&self) -> bool {
        matches!(self.phase(), Some(phase::SUCCEEDED | phase::FAILED))
    }

    /// The instance, if it is not over.
    fn running(&self) -> Result<&'a VirtualMachineInstance, Failure> {
        let running = self.instance.filter(|_| !self.is_over());
        running.ok_or_else(|| self.conflict("VM is not running"))
    }

    fn set_running(&self, running: bool) -> Value {
        let spec = &self.machine.spec;
        let operation = if spec.run_strategy.is_some() {
            let strategy = if running {
                run_strategy::ALWAYS
            } else {
                run_strategy::HALTED
            };
            json!({"op": "replace", "path": "/spec/runStrategy", "value": strategy})
        } else {
            json!({"op": "replace", "path": "/spec/running", "value": running})
        };
        json!([unchanged(self.machine.metadata.resource_version.as_deref()), operation])
    }

    /// Adds requests. A stop takes the place of what was asked before; otherwise one thing goes after the other.
    fn request(&self, requests: &[Value]) -> Result<Value, Failure> {
        let status = self.machine.status.as_ref();
        let pending = status.is_some_and(|status| !status.state_change_requests.is_empty());
        let only_stop = matches!(requests, [request] if request["action"] == "Stop");
        if pending && !only_stop {
            return Err(self.conflict("unable to complete request: stop/start already underway"));
        }
        let mut operations = vec![unchanged(self.machine.metadata.resource_version.as_deref())];
        if status.is_none_or(|status| *status == VirtualMachineStatus::default()) {
            operations.push(json!({"op": "add", "path": "/status", "value": {"stateChangeRequests": requests}}));
        } else {
            operations.push(json!({"op": "add", "path": "/status/stateChangeRequests", "value": requests}));
            if status.is_some_and(|status| status.start_failure.is_some()) {
                operations.push(json!({"op": "remove", "path": "/status/startFailure"}));
            }
        }
        Ok(Value::Array(operations))
    }

    fn shorten(&self, instance: &VirtualMachineInstance, seconds: i64) -> Value {
        // Its status may change meanwhile; another instance of the name is none of this stop's.
        json!([
            {"op": "test", "path": "/metadata/uid", "value": instance.metadata.uid},
            {"op": "add", "path": "/spec/terminationGracePeriodSeconds", "value": seconds},
        ])
    }
}

fn unchanged(version: Option<&str>) -> Value {
    json!({"op": "test", "path": "/metadata/resourceVersion", "value": version})
}

fn stop_of(instance: &VirtualMachineInstance) -> Value {
    json!({"action": "Stop", "uid": instance.metadata.uid})
}

/// Decides about a start.
///
/// # Errors
/// 409 when there is nothing to start or the strategy has no manual start.
pub fn start(found: Found<'_>, options: &StartOptions) -> Result<Change, Failure> {
    let strategy = found.strategy()?;
    let phase = found.phase();
    if phase.is_some_and(|phase| !found.is_over() && !matches!(phase, "" | phase::UNKNOWN)) {
        return Err(found.conflict("VM is already running"));
    }
    let request = if options.paused {
        json!({"action": "Start", "data": {"paused": "true"}})
    } else {
        json!({"action": "Start"})
    };
    match strategy {
        run_strategy::HALTED if options.paused => Ok(Change {
            status: Some(found.request(&[request])?),
            ..Change::default()
        }),
        run_strategy::HALTED => Ok(Change {
            machine: Some(found.set_running(true)),
            ..Change::default()
        }),
        run_strategy::RERUN_ON_FAILURE if phase == Some(phase::FAILED) => {
            Err(found.conflict("RerunOnFailure does not support starting VM from failed state"))
        }
        run_strategy::MANUAL | run_strategy::RERUN_ON_FAILURE => {
            let requests = match found.instance.filter(|_| found.is_over()) {
                Some(instance) => vec![stop_of(instance), request],
                None => vec![request],
            };
            Ok(Change {
                status: Some(found.request(&requests)?),
                ..Change::default()
            })
        }
        other => Err(found.conflict(&format!("{other} does not support manual start requests"))),
    }
}

/// Decides about a stop.
///
/// # Errors
/// 409 when nothing runs or the machine is a tenant's node, which would start again at once; 400 for a grace period below
/// zero.
pub fn stop(found: Found<'_>, options: &StopOptions) -> Result<Change, Failure> {
    let strategy = found.strategy()?;
    if options.grace_period.is_some_and(|seconds| seconds < 0) {
        return Err(Failure::bad_request("gracePeriod has to be greater or equal to 0"));
    }
    if let Some(cluster) = found.cluster() {
        return Err(found.conflict(&format!(
            "it is a node of TenantCluster {cluster}, which keeps it running: restart it, or change or delete the TenantCluster"
        )));
    }
    let runs = found.instance.filter(|_| !found.is_over());
    let shortened = runs.zip(options.grace_period);
    let mut change = Change {
        instance: shortened.map(|(instance, seconds)| found.shorten(instance, seconds)),
        ..Change::default()
    };
    match strategy {
        run_strategy::HALTED => {
            let instance = found.running()?;
            let before = instance.spec.termination_grace_period_seconds;
            let shorter = |seconds: i64| before.is_none_or(|before| seconds < before);
            if !options.grace_period.is_some_and(shorter) {
                let why = "Halted only supports manual stop requests with a shorter graceperiod";
                return Err(found.conflict(why));
            }
            change.status = Some(found.request(&[stop_of(instance)])?);
        }
        run_strategy::MANUAL | run_strategy::RERUN_ON_FAILURE => {
            change.status = Some(found.request(&[stop_of(found.running()?)])?);
        }
        _ => change.machine = Some(found.set_running(false)),
    }
    Ok(change)
}

/// Decides about a restart.
///
/// # Errors
/// 409 when nothing runs or the strategy knows no restart, 400 for a grace period other than 0.
pub fn restart(found: Found<'_>, options: &RestartOptions) -> Result<Change, Failure> {
    match options.grace_period_seconds {
        Some(seconds) if seconds > 0 => {
            let why = "For force restart, only gracePeriod=0 is supported for now";
            return Err(Failure::bad_request(why));
        }
        Some(seconds) if seconds < 0 => {
            return Err(Failure::bad_request("gracePeriod has to be greater or equal to 0"));
        }
        _ => {}
    }
    let strategy = found.strategy()?;
    if matches!(strategy, run_strategy::HALTED | run_strategy::ONCE) {
        // Upstream's spelling.
        let why = format!("RunStategy {strategy} does not support manual restart requests");
        return Err(found.conflict(&why));
    }
    let Some(instance) = found.instance else {
        return Err(found.conflict("VM is not running: Halted"));
    };
    let forced = options.grace_period_seconds.filter(|_| !found.is_over());
    Ok(Change {
        instance: forced.map(|seconds| found.shorten(instance, seconds)),
        machine: None,
        status: Some(found.request(&[stop_of(instance), json!({"action": "Start"})])?),
    })
}

/// Whether `dryRun` asks that nothing be written.
///
/// # Errors
/// 400 for anything but `All`.
pub fn is_dry_run(dry_run: Option<&[String]>) -> Result<bool, Failure> {
    match dry_run.unwrap_or_default() {
        [] => Ok(false),
        [all] if all == "All" => Ok(true),
        other => {
            let why = format!("dryRun: Invalid value: {other:?}: must be \"All\"");
            Err(Failure::bad_request(why))
        }
    }
}

#[cfg(test)]
mod tests;
