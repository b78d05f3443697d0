//! `kubernest-api admit`: the webhooks' answers for manifests in files, without a cluster. For CI of those who write
//! manifests, and for the examples of the documentation.
//!
//! It judges creation only. The API server's own schema checks come before admission and are not repeated here.

use std::{
    io::{Read, Write},
    path::Path,
    process::ExitCode,
};

use anyhow::Context;
use kubernest_admission::{Decision, Installation, Review};
use kubernest_crds::TenantClusterSpec;
use serde_json::{Value, json};

use crate::{args::AdmitArgs, routes::complete_machine};

/// Prints one line of JSON a manifest; fails when any was refused.
pub fn run(installation: &Installation, args: &AdmitArgs) -> anyhow::Result<ExitCode> {
    let mut all_allowed = true;
    let mut out = std::io::stdout().lock();
    for file in &args.files {
        let text = read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let manifests = parse(&text).with_context(|| format!("cannot parse {}", file.display()))?;
        for manifest in manifests {
            let line = judge(installation, &manifest);
            all_allowed &= line["allowed"] == true;
            writeln!(out, "{line}")?;
        }
    }
    Ok(if all_allowed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn read(file: &Path) -> std::io::Result<String> {
    if file != Path::new("-") {
        return std::fs::read_to_string(file);
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    Ok(text)
}

/// All manifests of a text: JSON values one after the other, or YAML documents; lists are unfolded.
fn parse(text: &str) -> anyhow::Result<Vec<Value>> {
    let documents: Vec<Value> = if text.trim_start().starts_with(['{', '[']) {
        serde_json::Deserializer::from_str(text)
            .into_iter()
            .collect::<Result<_, _>>()?
    } else {
        serde_saphyr::from_multiple(text)?
    };
    let mut manifests = Vec::new();
    for document in documents {
        match document {
            Value::Null => {}
            Value::Array(items) => manifests.extend(items),
            Value::Object(mut list) if list.get("kind").and_then(Value::as_str) == Some("List") => {
                if let Some(Value::Array(items)) = list.remove("items") {
                    manifests.extend(items);
                }
            }
            other => manifests.push(other),
        }
    }
    Ok(manifests)
}

/// The answer to one manifest, or to a case `{name, kind, manifest}` that has one in it.
fn judge(installation: &Installation, document: &Value) -> Value {
    let manifest = document.get("manifest").unwrap_or(document);
    let name = document
        .get("name")
        .or_else(|| manifest.pointer("/metadata/name"))
        .cloned()
        .unwrap_or_default();
    let kind = document.get("kind").and_then(Value::as_str).unwrap_or_default();
    let review = Review {
        object: manifest,
        old: None,
        own_request: false,
    };
    let Some(decision) = kubernest_admission::admit(installation, kind, review) else {
        let message = format!("no matches for kind {kind:?}");
        return json!({"name": name, "kind": kind, "allowed": false, "code": 404, "reason": "NotFound", "message": message});
    };
    answer(name, kind, &decision, defaulted(kind, manifest))
}

fn answer(name: Value, kind: &str, decision: &Decision, defaulted: Option<Value>) -> Value {
    let mut line = json!({"name": name, "kind": kind, "allowed": decision.allowed(), "warnings": decision.warnings});
    if decision.allowed() {
        line["defaultedSpec"] = defaulted.unwrap_or_default();
    } else {
        line["code"] = json!(422);
        line["reason"] = json!("Invalid");
        line["message"] = json!(decision.message);
        line["causes"] = json!(decision.causes);
    }
    line
}

/// The spec with its gaps filled. Of a VirtualMachine's few are: its instances are completed when they are made.
fn defaulted(kind: &str, manifest: &Value) -> Option<Value> {
    match kind {
        "TenantCluster" => {
            let spec: TenantClusterSpec = serde_json::from_value(manifest.get("spec")?.clone()).ok()?;
            serde_json::to_value(spec).ok()
        }
        "VirtualMachineInstance" => {
            let mut spec = kubernest_admission::defaulted_instance(manifest)?;
            let firmware = spec
                .get_mut("domain")?
                .as_object_mut()?
                .entry("firmware")
                .or_insert(json!({}));
            let firmware = firmware.as_object_mut()?;
            firmware.entry("uuid").or_insert_with(|| json!(uuid::Uuid::new_v4()));
            Some(spec)
        }
        "VirtualMachine" => complete_machine(manifest, None).get("spec").cloned(),
        _ => manifest.get("spec").cloned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn installation() -> Installation {
        Installation {
            versions: vec!["v1.35.4".to_owned()],
            node_cidr_pool: "100.64.0.0/10".parse().unwrap(),
            base_domain: "kubernest.local".to_owned(),
        }
    }

    #[test]
    fn admit_reads_yaml_json_and_json_lines() {
        let yaml = "# comment\nkind: A\n---\nkind: List\nitems: [{kind: B}, {kind: C}]\n";
        let kinds = |text: &str| -> Vec<String> {
            parse(text)
                .unwrap()
                .iter()
                .map(|m| m["kind"].as_str().unwrap().to_owned())
                .collect()
        };
        assert_eq!(kinds(yaml), ["A", "B", "C"]);
        assert_eq!(kinds("{\"kind\": \"A\"}\n{\"kind\": \"B\"}\n"), ["A", "B"]);
        assert_eq!(kinds("[{\"kind\": \"A\"}]"), ["A"]);
    }

    #[test]
    fn admit_prints_a_machine_as_it_is_stored() {
        let template = json!({"spec": {"domain": {"devices": {}, "memory": {"guest": "64Mi"}}}});
        let spec = json!({"runStrategy": "Halted", "template": template});
        let manifest = json!({"kind": "VirtualMachine", "metadata": {"name": "a"}, "spec": spec});
        let spec = &judge(&installation(), &manifest)["defaultedSpec"]["template"]["spec"];
        assert_eq!(spec["domain"]["machine"]["type"], "q35");
        assert!(spec["domain"]["firmware"]["uuid"].is_string());
        assert_eq!(spec["domain"].get("cpu"), None);
    }

    #[test]
    fn admit_answers_one_line_a_manifest() {
        let manifest = json!({"kind": "TenantCluster", "metadata": {"name": "a"}, "spec": {"version": "v1.35.4"}});
        let line = judge(&installation(), &manifest);
        assert_eq!(line["allowed"], true);
        assert_eq!(line["defaultedSpec"]["controlPlane"]["memory"], "2Gi");
        let case = json!({"name": "case", "kind": "TenantCluster", "manifest": {"metadata": {"name": "a"}, "spec": {"version": "v1.0.0"}}});
        let line = judge(&installation(), &case);
        assert_eq!(
            (line["name"].as_str(), line["code"].as_i64()),
            (Some("case"), Some(422))
        );
        assert_eq!(line["causes"][0]["field"], "spec.version");
    }
}
