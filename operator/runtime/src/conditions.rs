//! Conditions as the Kubernetes API conventions want them: one per type, lastTransitionTime moving only when the
//! status does, so that a condition that did not change makes no write.
//!
//! Types and reasons are constants beside the kinds; this module knows none.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// A condition's status value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// `"True"`
    True,
    /// `"False"`
    False,
    /// `"Unknown"`
    Unknown,
}

impl Status {
    /// The value as it stands in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Status {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

/// Sets the condition `type_`, keeping its lastTransitionTime when the status stays. New conditions go to the end, so
/// the order is stable.
pub fn set(
    conditions: &mut Vec<Condition>,
    type_: &str,
    status: impl Into<Status>,
    reason: &str,
    message: &str,
    generation: Option<i64>,
) {
    set_at(
        conditions,
        type_,
        status.into(),
        reason,
        message,
        generation,
        Timestamp::now(),
    );
}

/// [`set`] with the clock passed in, for decisions that are pure.
pub fn set_at(
    conditions: &mut Vec<Condition>,
    type_: &str,
    status: Status,
    reason: &str,
    message: &str,
    generation: Option<i64>,
    now: Timestamp,
) {
    let wanted = Condition {
        type_: type_.to_owned(),
        status: status.as_str().to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: generation,
        // The API keeps whole seconds; more would differ after each round trip.
        last_transition_time: Time(Timestamp::from_second(now.as_second()).unwrap_or(now)),
    };
    match conditions.iter_mut().find(|condition| condition.type_ == type_) {
        Some(existing) if existing.status == wanted.status => {
            let since = existing.last_transition_time.clone();
            *existing = Condition {
                last_transition_time: since,
                ..wanted
            };
        }
        Some(existing) => *existing = wanted,
        None => conditions.push(wanted),
    }
}

/// The condition of this type.
pub fn get<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Whether the condition of this type is `True`.
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    get(conditions, type_).is_some_and(|condition| condition.status == Status::True.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn set_keeps_the_transition_time_while_the_status_stays() {
        let mut conditions = Vec::new();
        set_at(
            &mut conditions,
            "Ready",
            Status::False,
            "Booting",
            "waits",
            Some(1),
            at(10),
        );
        set_at(
            &mut conditions,
            "Ready",
            Status::False,
            "Joining",
            "waits more",
            Some(2),
            at(20),
        );
        assert_eq!(conditions.len(), 1);
        assert_eq!(conditions[0].last_transition_time.0, at(10));
        assert_eq!(
            (conditions[0].reason.as_str(), conditions[0].observed_generation),
            ("Joining", Some(2))
        );
        set_at(&mut conditions, "Ready", Status::True, "Ready", "", Some(2), at(30));
        assert_eq!(conditions[0].last_transition_time.0, at(30));
        assert!(is_true(&conditions, "Ready"));
    }
}
