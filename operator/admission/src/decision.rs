//! What a decision is: causes with a field each, and the sentence that a user reads.
//!
//! It follows metav1.Status (apimachinery `pkg/apis/meta/v1/types.go`): code 422, reason Invalid, details.causes.

use serde::Serialize;

/// Values of a cause's reason (apimachinery `CauseType`).
pub mod reasons {
    /// The value is malformed, out of range or does not fit the rest.
    pub const INVALID: &str = "FieldValueInvalid";
    /// The field must be set.
    pub const REQUIRED: &str = "FieldValueRequired";
    /// The value occurs twice.
    pub const DUPLICATE: &str = "FieldValueDuplicate";
    /// The value or the field is not supported.
    pub const NOT_SUPPORTED: &str = "FieldValueNotSupported";
    /// The field must not be set or changed.
    pub const FORBIDDEN: &str = "FieldValueForbidden";
}

/// Most causes that are told. Nobody reads more, and a hostile object has some ten thousand.
const CAUSES: usize = 100;

/// One reason why an object is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cause {
    /// One of [`reasons`]; empty for a value that cannot be read as its type.
    pub reason: &'static str,
    /// Path of the field, for example `spec.nodePools[0].cpu`.
    pub field: String,
    /// A sentence.
    pub message: String,
}

/// The causes found so far, and warnings for an object that is let in all the same.
#[derive(Clone, Debug, Default)]
pub struct Report {
    causes: Vec<Cause>,
    more: bool,
    warnings: Vec<String>,
}

impl Report {
    /// Adds a cause, once.
    pub fn add(&mut self, reason: &'static str, field: impl Into<String>, message: impl Into<String>) {
        let cause = Cause {
            reason,
            field: field.into(),
            message: message.into(),
        };
        if self.causes.contains(&cause) {
            return;
        }
        if self.causes.len() < CAUSES {
            self.causes.push(cause);
        } else {
            self.more = true;
        }
    }

    /// Adds a cause of [`reasons::INVALID`].
    pub fn invalid(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.add(reasons::INVALID, field, message);
    }

    /// Adds a cause of [`reasons::NOT_SUPPORTED`].
    pub fn not_supported(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.add(reasons::NOT_SUPPORTED, field, message);
    }

    /// Whether a cause is about a field below `field`: what follows from that one's absence is then no news.
    pub fn mentions_below(&self, field: &str) -> bool {
        self.causes.iter().any(|cause| {
            cause
                .field
                .strip_prefix(field)
                .is_some_and(|rest| rest.starts_with('.'))
        })
    }

    /// How many causes there are.
    pub fn count(&self) -> usize {
        self.causes.len()
    }

    /// Warns without refusing.
    pub fn warn(&mut self, message: impl Into<String>) {
        self.warnings.push(message.into());
    }

    /// The decision, whose message is `message` of the causes.
    pub fn decide(self, message: fn(&[Cause]) -> String) -> Decision {
        let more = if self.more { ", and more" } else { "" };
        Decision {
            message: message(&self.causes) + more,
            causes: self.causes,
            warnings: self.warnings,
        }
    }
}

/// Whether an object is let in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Why not; empty when it is let in.
    pub causes: Vec<Cause>,
    /// What the user should know though it is let in.
    pub warnings: Vec<String>,
    /// The causes in one text; empty when it is let in.
    pub message: String,
}

impl Decision {
    /// Whether the object is let in.
    pub fn allowed(&self) -> bool {
        self.causes.is_empty()
    }
}

/// `field: sentence; field: sentence`, for our own kinds.
pub fn with_fields(causes: &[Cause]) -> String {
    let lines: Vec<_> = causes
        .iter()
        .map(|cause| format!("{}: {}", cause.field, cause.message))
        .collect();
    lines.join("; ")
}

/// Sentences joined by `, `, as KubeVirt's webhooks answer; their sentences carry the field themselves.
pub fn kubevirt_style(causes: &[Cause]) -> String {
    let lines: Vec<_> = causes.iter().map(|cause| cause.message.as_str()).collect();
    lines.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decision_tells_some_causes_of_many() {
        let mut report = Report::default();
        for number in 0..100 {
            report.invalid(format!("spec.a[{number}]"), "no");
            report.invalid("spec.a[0]", "no");
        }
        assert!(report.clone().decide(with_fields).message.ends_with("spec.a[99]: no"));
        report.invalid("spec.a[100]", "no");
        let decision = report.decide(with_fields);
        assert_eq!(decision.causes.len(), CAUSES);
        assert!(decision.message.ends_with("spec.a[99]: no, and more"));
    }
}
