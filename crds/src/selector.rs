//! Label selectors as Kubernetes reads them: which labels they match, and their one written form, which the scale
//! subresource and lists of the API take.
//!
//! Source: apimachinery `pkg/apis/meta/v1/helpers.go` (LabelSelectorAsSelector) and `pkg/labels/selector.go`. Whether keys
//! and values are well formed is not looked at here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

/// What is asked of one label.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Demand {
    Equals(String),
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
}

/// A label selector that can be asked; its `Display` is the canonical form, ordered by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(Vec<(String, Demand)>);

/// Why a selector means nothing, in apimachinery's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// An operator that there is not.
    #[error("{0:?} is not a valid label selector operator")]
    Operator(String),
    /// `In` or `NotIn` of nothing.
    #[error("values: Invalid value: null: for 'in', 'notin' operators, values set can't be empty")]
    NoValues,
    /// `Exists` or `DoesNotExist` with values.
    #[error("values: Invalid value: {0}: values set must be empty for exists and does not exist")]
    Values(serde_json::Value),
}

impl Selector {
    /// Reads a selector; an empty one matches everything.
    ///
    /// # Errors
    /// [`SelectorError`] for the first demand that means nothing.
    pub fn new(selector: &LabelSelector) -> Result<Self, SelectorError> {
        let equal = selector.match_labels.iter().flatten();
        let equal = equal.map(|(key, value)| Ok((key.clone(), Demand::Equals(value.clone()))));
        let demands = selector.match_expressions.iter().flatten();
        let demands = demands.map(|expression| Ok((expression.key.clone(), demand(expression)?)));
        let mut all = equal.chain(demands).collect::<Result<Vec<_>, _>>()?;
        all.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(Self(all))
    }

    /// Whether nothing is asked, so that everything is meant.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an object with these labels is meant.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|(key, demand)| {
            let value = labels.get(key);
            match demand {
                Demand::Equals(wanted) => value == Some(wanted),
                Demand::In(wanted) => value.is_some_and(|value| wanted.contains(value)),
                Demand::NotIn(unwanted) => value.is_none_or(|value| !unwanted.contains(value)),
                Demand::Exists => value.is_some(),
                Demand::DoesNotExist => value.is_none(),
            }
        })
    }
}

fn demand(expression: &LabelSelectorRequirement) -> Result<Demand, SelectorError> {
    let values = expression.values.clone().unwrap_or_default();
    let some = || match values.is_empty() {
        true => Err(SelectorError::NoValues),
        false => Ok(values.iter().cloned().collect()),
    };
    let none = |demand| match values.is_empty() {
        true => Ok(demand),
        false => Err(SelectorError::Values(values.clone().into())),
    };
    match expression.operator.as_str() {
        "In" => some().map(Demand::In),
        "NotIn" => some().map(Demand::NotIn),
        "Exists" => none(Demand::Exists),
        "DoesNotExist" => none(Demand::DoesNotExist),
        other => Err(SelectorError::Operator(other.to_owned())),
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |values: &BTreeSet<String>| values.iter().map(String::as_str).collect::<Vec<_>>().join(",");
        for (at, (key, demand)) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str(",")?;
            }
            match demand {
                Demand::Equals(value) => write!(f, "{key}={value}"),
                Demand::In(values) => write!(f, "{key} in ({})", list(values)),
                Demand::NotIn(values) => write!(f, "{key} notin ({})", list(values)),
                Demand::Exists => write!(f, "{key}"),
                Demand::DoesNotExist => write!(f, "!{key}"),
            }?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn selector(value: Value) -> Result<Selector, SelectorError> {
        Selector::new(&serde_json::from_value(value).unwrap())
    }

    fn expression(operator: &str, values: &[&str]) -> Value {
        json!({"matchExpressions": [{"key": "tier", "operator": operator, "values": values}]})
    }

    #[rstest]
    #[case::everything(json!({}), "", &[], true)]
    #[case::labels(json!({"matchLabels": {"tier": "b", "app": "a"}}), "app=a,tier=b", &[("app", "a"), ("tier", "b"), ("x", "y")], true)]
    #[case::other_label(json!({"matchLabels": {"app": "a"}}), "app=a", &[("app", "b")], false)]
    #[case::no_label(json!({"matchLabels": {"app": "a"}}), "app=a", &[], false)]
    #[case::one_of(expression("In", &["b", "a"]), "tier in (a,b)", &[("tier", "b")], true)]
    #[case::one_of_without(expression("In", &["a"]), "tier in (a)", &[], false)]
    #[case::none_of(expression("NotIn", &["a"]), "tier notin (a)", &[("tier", "a")], false)]
    #[case::none_of_without(expression("NotIn", &["a"]), "tier notin (a)", &[], true)]
    #[case::exists(expression("Exists", &[]), "tier", &[("tier", "")], true)]
    #[case::exists_not(expression("DoesNotExist", &[]), "!tier", &[("tier", "")], false)]
    fn selector_matches_as_kubernetes_does(
        #[case] value: Value,
        #[case] written: &str,
        #[case] labels: &[(&str, &str)],
        #[case] expected: bool,
    ) {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let selector = selector(value).unwrap();
        assert_eq!(selector.matches(&labels), expected);
        assert_eq!(selector.to_string(), written);
        assert_eq!(selector.is_empty(), written.is_empty());
    }

    #[rstest]
    #[case(expression("Near", &[]), "\"Near\" is not a valid label selector operator")]
    #[case(expression("In", &[]), "values: Invalid value: null: for 'in', 'notin' operators, values set can't be empty")]
    #[case(expression("Exists", &["a", "b"]), "values: Invalid value: [\"a\",\"b\"]: values set must be empty for exists and does not exist")]
    fn selector_that_means_nothing_says_why(#[case] value: Value, #[case] why: &str) {
        assert_eq!(selector(value).unwrap_err().to_string(), why);
    }
}
