//! Conditions in KubeVirt's shape: set one keeping its transition time while the status stays, find one, drop one.
//!
//! Types and reasons stand beside the kinds; times are whole seconds, as Kubernetes writes them.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kubernest_crds::kubevirt::v1::VirtualMachineInstanceCondition as Condition;

/// A condition's status.
pub const TRUE: &str = "True";
/// A condition's status.
pub const FALSE: &str = "False";

/// Sets the condition `type_`; new ones go to the end, so the order is stable.
pub fn set(all: &mut Vec<Condition>, type_: &str, status: &str, reason: &str, message: &str, now: Timestamp) {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let wanted = Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        last_probe_time: None,
        last_transition_time: Some(seconds(now)),
        reason: some(reason),
        message: some(message),
    };
    match all.iter_mut().find(|condition| condition.type_ == type_) {
        Some(existing) if existing.status == status => {
            let since = existing.last_transition_time.take().or(wanted.last_transition_time);
            *existing = Condition {
                last_transition_time: since,
                ..wanted
            };
        }
        Some(existing) => *existing = wanted,
        None => all.push(wanted),
    }
}

/// Removes the condition `type_`.
pub fn clear(all: &mut Vec<Condition>, type_: &str) {
    all.retain(|condition| condition.type_ != type_);
}

/// The condition `type_`.
pub fn get<'a>(all: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    all.iter().find(|condition| condition.type_ == type_)
}

/// The condition `type_`, if its status is False.
pub fn is_false<'a>(all: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    get(all, type_).filter(|condition| condition.status == FALSE)
}

/// Whether the condition `type_` is True.
pub fn is_true(all: &[Condition], type_: &str) -> bool {
    get(all, type_).is_some_and(|condition| condition.status == TRUE)
}

/// A time in whole seconds.
pub fn seconds(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(time))
}
