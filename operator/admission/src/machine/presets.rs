//! Rules of VirtualMachineInstancePreset, and how presets are laid over an instance. On raw JSON, as the gaps are filled.
//!
//! A preset that contradicts the instance in one value is left out whole; presets that contradict each other are for
//! nobody to choose between. Users write presets, so what they can cost is bounded: their size, how many of them one
//! instance gets, and what is said of contradictions, which names places and no values.

use std::collections::BTreeMap;

use kubernest_crds::Selector;
use kubernest_crds::kubevirt::v1::{VirtualMachineInstancePresetSpec, VirtualMachineInstanceSpec, Volume};
use serde_json::{Map, Value, json};

use super::{defaults, disks, hardware, mutate::Preset, read};
use crate::{
    Decision, Installation, Review,
    decision::{Report, kubevirt_style, reasons},
};

/// Settings that are taken or left whole, by their place below `domain`.
const WHOLE: [&str; 5] = ["/cpu", "/firmware", "/features", "/devices/watchdog", "/clock/timer"];
/// Most bytes of a preset's spec as JSON.
const MAX_BYTES: usize = 32 << 10;
/// Most presets that one instance gets.
const MAX_PRESETS: usize = 32;
/// Most characters of a name: it becomes the name of an annotation (kubernetes.io, "Annotations").
pub const MAX_NAME: usize = 63;
/// What KubeVirt says of the kind.
pub const DEPRECATED: &str =
    "kubevirt.io/v1 VirtualMachineInstancePresets is now deprecated and will be removed in v2.";

/// Decides upon a VirtualMachineInstancePreset.
pub fn decide(_: &Installation, review: Review<'_>) -> Decision {
    let mut report = Report::default();
    size(&mut report, review.object);
    let Some(spec) = read::<VirtualMachineInstancePresetSpec>(&mut report, review.object) else {
        return report.decide(kubevirt_style);
    };
    let Some(domain) = spec.domain else {
        report.add(reasons::REQUIRED, "spec.domain", "missing domain.");
        return report.decide(kubevirt_style);
    };
    if let Err(error) = Selector::new(&spec.selector) {
        report.invalid("spec.selector", format!("spec.selector: {error}"));
    }
    report.warn(DEPRECATED);
    for name in ignored(review.object) {
        report.warn(format!("spec.domain.{name}: presets do not apply it"));
    }
    if let Some(firmware) = &domain.firmware {
        hardware::check_firmware(&mut report, "spec.domain", firmware);
    }
    // Its disks are looked at as an instance's whose volumes are all there.
    let names = domain.devices.disks.iter().flatten().map(|disk| disk.name.clone());
    let volumes = names.map(|name| Volume {
        name,
        ..Volume::default()
    });
    let instance = VirtualMachineInstanceSpec {
        volumes: Some(volumes.collect()),
        domain,
        ..VirtualMachineInstanceSpec::default()
    };
    disks::check(&mut report, "spec", &instance);
    report.decide(kubevirt_style)
}

/// What would not fit where presets are kept and noted.
fn size(report: &mut Report, object: &Value) {
    let name = object
        .pointer("/metadata/name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if name.len() > MAX_NAME {
        let message =
            format!("metadata.name: must be no more than {MAX_NAME} characters, it becomes part of an annotation");
        report.invalid("metadata.name", message);
    }
    if object
        .get("spec")
        .is_some_and(|spec| spec.to_string().len() > MAX_BYTES)
    {
        report.invalid("spec", format!("spec: must be no more than {MAX_BYTES} bytes"));
    }
}

/// Settings of a preset that nobody gets.
fn ignored(object: &Value) -> Vec<String> {
    let at = |path: &str| {
        object
            .pointer(path)
            .and_then(Value::as_object)
            .into_iter()
            .flat_map(Map::keys)
    };
    let below = |path: &str, prefix: &str, known: &[&str]| -> Vec<String> {
        let others = at(path).filter(|name| !known.contains(&name.as_str()));
        others.map(|name| format!("{prefix}{name}")).collect()
    };
    let known = ["resources", "cpu", "firmware", "clock", "features", "devices"];
    let mut found = below("/spec/domain", "", &known);
    found.extend(below("/spec/domain/resources", "resources.", &["requests"]));
    found.extend(below("/spec/domain/devices", "devices.", &["watchdog"]));
    found
}

/// Lays the presets over an instance's `domain` and says of each whether it was left out, and where it contradicts.
///
/// # Errors
/// When presets contradict each other, in KubeVirt's words, or are too many; `domain` is as it was then.
pub fn apply(domain: &mut Value, presets: &[Preset]) -> Result<Vec<(String, String)>, String> {
    if presets.len() > MAX_PRESETS {
        let many = presets.len();
        return Err(format!(
            "VirtualMachinePresets cannot be applied: {many} match, at most {MAX_PRESETS} may"
        ));
    }
    let mut together = json!({});
    for (index, preset) in presets.iter().enumerate() {
        if let Some(place) = conflicts(&preset.domain, &together).first() {
            let name = &preset.name;
            let contradicts = |other: &&Preset| !conflicts(&preset.domain, &other.domain).is_empty();
            let other = presets[..index]
                .iter()
                .find(contradicts)
                .map_or("another", |other| &other.name);
            return Err(format!(
                "VirtualMachinePresets cannot be applied due to conflicts: presets '{name}' and '{other}' conflict: {place}"
            ));
        }
        merge(&mut together, &preset.domain);
    }
    let asked = domain.clone();
    let mut left_out = Vec::new();
    for preset in presets {
        let found = conflicts(&preset.domain, &asked);
        if found.is_empty() {
            merge(domain, &preset.domain);
        } else {
            left_out.push((preset.name.clone(), found.join(", ")));
        }
    }
    Ok(left_out)
}

/// Where two domains say different things.
fn conflicts(preset: &Value, other: &Value) -> Vec<String> {
    let (preset, other) = (settings(preset), settings(other));
    let different = |(place, value): (&String, &Value)| other.get(place).is_some_and(|theirs| theirs != value);
    let places = preset.iter().filter(|one| different(*one)).map(|(place, _)| place);
    places
        .map(|place| format!("spec.{}", place.trim_start_matches('/').replace('/', ".")))
        .collect()
}

/// What a domain says of that which presets can say, by place. The firmware's UUID is each machine's own.
fn settings(domain: &Value) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    for (key, value) in domain
        .pointer("/resources/requests")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        all.insert(format!("/resources/requests/{key}"), defaults::canonical(value));
    }
    for place in WHOLE {
        let mut value = domain.pointer(place).cloned().unwrap_or_default();
        if let (Some(firmware), "/firmware") = (value.as_object_mut(), place) {
            firmware.remove("uuid");
        }
        all.insert(place.to_owned(), value);
    }
    let mut clock = domain.get("clock").cloned().unwrap_or_default();
    if let Some(clock) = clock.as_object_mut() {
        clock.remove("timer");
    }
    all.insert("/clock".to_owned(), clock);
    all.retain(|_, value| says(value));
    all
}

fn merge(domain: &mut Value, preset: &Value) {
    let there = settings(domain);
    for (place, value) in settings(preset) {
        if there.contains_key(&place) {
            continue;
        }
        // A key of the requests may have slashes of its own.
        let path: Vec<&str> = match place.strip_prefix("/resources/requests/") {
            Some(key) => vec!["resources", "requests", key],
            None => place.split('/').skip(1).collect(),
        };
        let Some((last, above)) = path.split_last() else {
            continue;
        };
        let mut at = domain.as_object_mut();
        for key in above {
            at = at.and_then(|object| defaults::object(object, key));
        }
        let Some(at) = at else { continue };
        match (at.get_mut(*last).and_then(Value::as_object_mut), value) {
            // Beside what only an instance has: its UUID, or timers that no preset has an opinion of.
            (Some(there), Value::Object(value)) => there.extend(value),
            (_, value) => drop(at.insert((*last).to_owned(), value)),
        }
    }
}

/// Whether a value says anything.
fn says(value: &Value) -> bool {
    !value.is_null() && value.as_object().is_none_or(|object| !object.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn preset(name: &str, domain: Value) -> Preset {
        Preset {
            name: name.to_owned(),
            domain,
        }
    }

    #[test]
    fn apply_fills_what_the_instance_leaves_open() {
        let mut domain = json!({"resources": {"requests": {"cpu": "1"}}, "devices": {}});
        let presets = [
            preset(
                "a",
                json!({"resources": {"requests": {"memory": "64Mi", "cpu": "1000m"}}, "devices": {"disks": [{"name": "x"}]}}),
            ),
            preset(
                "b",
                json!({"clock": {"utc": {}, "timer": {"rtc": {}}}, "devices": {"watchdog": {"name": "w"}}}),
            ),
        ];
        assert_eq!(apply(&mut domain, &presets), Ok(vec![]));
        let wanted = json!({
            "resources": {"requests": {"cpu": "1", "memory": "64Mi"}},
            "clock": {"utc": {}, "timer": {"rtc": {}}},
            "devices": {"watchdog": {"name": "w"}},
        });
        assert_eq!(domain, wanted);
    }

    #[test]
    fn apply_leaves_a_preset_out_whole() {
        let asked = json!({"cpu": {"cores": 4}, "devices": {}});
        let mut domain = asked.clone();
        let presets = [preset(
            "a",
            json!({"cpu": {"cores": 2}, "firmware": {"serial": "s"}, "devices": {}}),
        )];
        let left_out = apply(&mut domain, &presets).unwrap();
        assert_eq!(domain, asked);
        assert_eq!(left_out, [("a".to_owned(), "spec.cpu".to_owned())]);
    }

    #[test]
    fn apply_refuses_presets_that_contradict_each_other() {
        let mut domain = json!({"devices": {}});
        let presets = [
            preset("a", json!({"cpu": {"cores": 2}})),
            preset("b", json!({"cpu": {"cores": 4}})),
        ];
        let error = apply(&mut domain, &presets).unwrap_err();
        assert_eq!(
            error,
            "VirtualMachinePresets cannot be applied due to conflicts: presets 'b' and 'a' conflict: \
             spec.cpu"
        );
        assert_eq!(domain, json!({"devices": {}}));
    }

    #[test]
    fn apply_leaves_the_uuid_of_a_firmware_alone() {
        let mut domain = json!({"firmware": {"uuid": "u"}, "devices": {}});
        let presets = [preset(
            "a",
            json!({"firmware": {"uuid": "p", "serial": "s"}, "cpu": {"cores": 2}}),
        )];
        assert_eq!(apply(&mut domain, &presets), Ok(vec![]));
        let wanted = json!({"firmware": {"uuid": "u", "serial": "s"}, "cpu": {"cores": 2}, "devices": {}});
        assert_eq!(domain, wanted);
    }

    #[test]
    fn apply_is_bounded() {
        let many: Vec<Preset> = (0..=MAX_PRESETS)
            .map(|number| preset(&number.to_string(), json!({})))
            .collect();
        assert!(apply(&mut json!({}), &many).unwrap_err().contains("at most 32"));
    }

    #[test]
    fn admit_preset_refuses_what_would_not_fit() {
        let name = "a".repeat(MAX_NAME + 1);
        let features: Vec<Value> = (0..2000)
            .map(|number| json!({"name": format!("feature-{number}")}))
            .collect();
        let expression = json!({"key": "a", "operator": "Like"});
        let object = json!({"metadata": {"name": name}, "spec": {
            "selector": {"matchExpressions": [expression]}, "domain": {"devices": {}, "cpu": {"features": features}},
        }});
        let installation = Installation {
            versions: Vec::new(),
            node_cidr_pool: "100.64.0.0/10".parse().unwrap(),
            base_domain: String::new(),
        };
        let review = Review {
            object: &object,
            old: None,
            own_request: false,
        };
        let decision = decide(&installation, review);
        let fields: Vec<&str> = decision.causes.iter().map(|cause| cause.field.as_str()).collect();
        assert_eq!(fields, ["metadata.name", "spec", "spec.selector"]);
    }
}
