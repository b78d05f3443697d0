//! What a new VirtualMachineInstance gets that it does not say itself: presets, defaults, the finalizer.

use kubernest_crds::kubevirt::v1::{PRESET_APPLIED, PRESET_CONFLICTS, PRESET_EXCLUDE, VMI_FINALIZER};
use serde_json::{Map, Value, json};

use super::defaults::{self, MASQUERADE};
use super::{interfaces, presets};
use crate::Decision;
use crate::decision::{Report, kubevirt_style};

/// Most characters of the note about presets that were left out.
const MAX_NOTE: usize = 1024;

/// A preset whose selector matches the instance.
#[derive(Clone, Debug, PartialEq)]
pub struct Preset {
    /// Its name.
    pub name: String,
    /// Its `spec.domain`.
    pub domain: Value,
}

/// An instance as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Mutation {
    /// The object.
    pub object: Value,
    /// What its user should know.
    pub warnings: Vec<String>,
}

/// Those that the instance has not got yet: one that is restored from its own manifest has, and its gaps are filled.
fn due(instance: &Value, presets: &[Preset]) -> Vec<Preset> {
    let annotation = |key: &str| instance.pointer("/metadata/annotations").and_then(|all| all.get(key));
    if annotation(PRESET_EXCLUDE).and_then(Value::as_str) == Some("true") {
        return Vec::new();
    }
    let due = presets
        .iter()
        .filter(|preset| annotation(&format!("{PRESET_APPLIED}{}", preset.name)).is_none());
    due.cloned().collect()
}

/// Writes MAC addresses with colons that have dots (`dead.beef.0001`): no CNI plugin reads those.
fn respell_macs(spec: &mut Value) {
    let interfaces = spec.pointer_mut("/domain/devices/interfaces");
    for interface in interfaces.and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(Value::String(text)) = interface.get_mut("macAddress")
            && text.contains('.')
            && let Some(bytes) = interfaces::mac(text)
        {
            let octets: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            *text = octets.join(":");
        }
    }
}

fn refusal(why: String) -> Decision {
    let mut report = Report::default();
    report.invalid("spec.domain", why);
    report.decide(kubevirt_style)
}

/// Completes a new instance; `uuid` is its firmware's, should it name none. What has another shape than it should is left
/// for validation to tell.
///
/// # Errors
/// When presets contradict each other: nothing of them can be applied.
pub fn mutate(instance: &Value, presets: &[Preset], uuid: &str) -> Result<Mutation, Decision> {
    let mut object = instance.clone();
    let mut warnings = Vec::new();
    let presets = due(instance, presets);
    if !presets.is_empty()
        && let Some(domain) = object.pointer_mut("/spec/domain")
    {
        let left_out = presets::apply(domain, &presets).map_err(refusal)?;
        let applied = presets
            .iter()
            .filter(|preset| left_out.iter().all(|(name, _)| *name != preset.name));
        let mut notes: Map<String, Value> = applied
            .map(|preset| (format!("{PRESET_APPLIED}{}", preset.name), json!("kubevirt.io/v1")))
            .collect();
        warnings.push(presets::DEPRECATED.to_owned());
        if !left_out.is_empty() {
            let said: Vec<String> = left_out.iter().map(|(name, why)| format!("{name}: {why}")).collect();
            let said: String = said.join("; ").chars().take(MAX_NOTE).collect();
            warnings.push(format!("presets that contradict the instance were left out: {said}"));
            notes.insert(PRESET_CONFLICTS.to_owned(), json!(said));
        }
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut)
            && let Some(annotations) = defaults::object(metadata, "annotations")
        {
            annotations.append(&mut notes);
        }
    }
    if let Some(spec) = object.get_mut("spec") {
        defaults::fill(spec, MASQUERADE);
        respell_macs(spec);
        let domain = spec.get_mut("domain").and_then(Value::as_object_mut);
        if let Some(firmware) = domain.and_then(|domain| defaults::object(domain, "firmware")) {
            firmware.entry("uuid").or_insert_with(|| json!(uuid));
        }
    }
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        let finalizers = metadata.entry("finalizers").or_insert_with(|| json!([]));
        if let Some(finalizers) = finalizers.as_array_mut()
            && !finalizers.contains(&json!(VMI_FINALIZER))
        {
            finalizers.push(json!(VMI_FINALIZER));
        }
    }
    Ok(Mutation { object, warnings })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance() -> Value {
        json!({
            "metadata": {"name": "a"},
            "spec": {"domain": {"devices": {}, "resources": {"requests": {"memory": "64Mi"}}}},
        })
    }

    fn cores(cores: u32) -> Preset {
        Preset {
            name: "p".to_owned(),
            domain: json!({"cpu": {"cores": cores}, "devices": {}}),
        }
    }

    #[test]
    fn mutate_completes_an_instance_once() {
        let first = mutate(&instance(), &[cores(2)], "u").unwrap();
        let spec = &first.object["spec"];
        assert_eq!(spec["domain"]["cpu"]["cores"], 2);
        assert_eq!(spec["domain"]["memory"]["guest"], "64Mi");
        assert_eq!(spec["domain"]["firmware"]["uuid"], "u");
        assert_eq!(
            spec["domain"]["devices"]["interfaces"],
            json!([{"name": "default", "masquerade": {}}])
        );
        assert_eq!(first.object["metadata"]["finalizers"], json!([VMI_FINALIZER]));
        let annotations = &first.object["metadata"]["annotations"];
        assert_eq!(annotations["virtualmachinepreset.kubevirt.io/p"], "kubevirt.io/v1");
        assert_eq!(first.warnings.len(), 1);
        for presets in [vec![], vec![cores(2)]] {
            assert_eq!(mutate(&first.object, &presets, "other").unwrap().object, first.object);
        }
    }

    #[test]
    fn mutate_spells_macs_with_colons() {
        let mut asked = instance();
        let all = ["dead.Beef.0001", "DE-AD-BE-EF-00-01", "dead.beef"];
        let all = all.map(|mac| json!({"name": mac, "bridge": {}, "macAddress": mac}));
        asked["spec"]["domain"]["devices"]["interfaces"] = json!(all);
        let done = mutate(&asked, &[], "u").unwrap().object;
        let interfaces = done["spec"]["domain"]["devices"]["interfaces"].as_array().unwrap();
        let macs: Vec<&Value> = interfaces.iter().map(|interface| &interface["macAddress"]).collect();
        // The second is read everywhere, the third is refused.
        assert_eq!(macs, ["de:ad:be:ef:00:01", "DE-AD-BE-EF-00-01", "dead.beef"]);
    }

    #[test]
    fn mutate_tells_of_presets_left_out() {
        let mut asked = instance();
        asked["spec"]["domain"]["cpu"] = json!({"cores": 1});
        let done = mutate(&asked, &[cores(2)], "u").unwrap();
        assert_eq!(done.object["spec"]["domain"]["cpu"]["cores"], 1);
        let told = "p: spec.cpu";
        assert_eq!(done.object["metadata"]["annotations"], json!({PRESET_CONFLICTS: told}));
        assert!(done.warnings[1].ends_with(told), "{:?}", done.warnings);
    }

    #[test]
    fn mutate_leaves_those_that_want_no_preset_alone() {
        let mut asked = instance();
        asked["metadata"]["annotations"] = json!({PRESET_EXCLUDE: "true"});
        let done = mutate(&asked, &[cores(2), cores(4)], "u").unwrap();
        assert_eq!(done.object["metadata"]["annotations"], asked["metadata"]["annotations"]);
    }

    #[test]
    fn mutate_keeps_labels_without_a_value() {
        let mut asked = instance();
        asked["spec"]["nodeSelector"] = json!({"node-role.kubernetes.io/worker": ""});
        let term = json!({"labelSelector": {"matchLabels": {"a": ""}}, "topologyKey": "zone"});
        asked["spec"]["affinity"] =
            json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}});
        let done = mutate(&asked, &[], "u").unwrap().object;
        assert_eq!(done["spec"]["nodeSelector"], asked["spec"]["nodeSelector"]);
        assert_eq!(done["spec"]["affinity"], asked["spec"]["affinity"]);
    }
}
