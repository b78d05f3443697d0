//! Reading a spec into its type. Fields that the type does not know come back by path, so that they are refused rather
//! than dropped; a value of the wrong type comes back with the path it stands at.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::path;

/// What became of a spec.
pub struct Parsed<T> {
    /// The typed value, or the path and the wording of what cannot be read.
    pub value: Result<T, (String, String)>,
    /// Paths of fields that the type does not know.
    pub unknown: Vec<String>,
}

/// Reads `object.<base>`.
pub fn parse<T: DeserializeOwned>(object: &Value, base: &str) -> Parsed<T> {
    let mut unknown = Vec::new();
    let Some(spec) = object.get(base) else {
        return Parsed {
            value: Err((base.to_owned(), "is required".to_owned())),
            unknown,
        };
    };
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(spec, &mut track);
    let value = serde_ignored::deserialize(tracked, |at| unknown.push(path::of_ignored(base, &at)));
    let value = value.map_err(|error: serde_json::Error| (path::of_error(base, &track.path()), error.to_string()));
    unknown.dedup();
    Parsed { value, unknown }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kubernest_crds::TenantClusterSpec;
    use serde_json::json;

    #[test]
    fn parse_reports_unknown_fields_by_path() {
        let object = json!({"spec": {"version": "v1.35.4", "nodePools": [{"name": "a", "sise": 1}], "x": {"y": 1}}});
        let parsed = parse::<TenantClusterSpec>(&object, "spec");
        assert!(parsed.value.is_ok());
        assert_eq!(parsed.unknown, ["spec.nodePools[0].sise", "spec.x"]);
    }

    #[test]
    fn parse_reports_wrong_types_by_path() {
        let object = json!({"spec": {"version": "v1.35.4", "nodePools": [{"name": "a", "cpu": "two"}]}});
        let (path, message) = parse::<TenantClusterSpec>(&object, "spec").value.unwrap_err();
        assert_eq!(path, "spec.nodePools[0].cpu");
        assert!(message.contains("expected i32"), "{message}");
    }
}
