//! Rules of VirtualMachineInstancePreset, and how presets are laid over an instance. On raw JSON, as the gaps are filled.
//!
//! A preset that contradicts the instance in one value is left out whole; presets that contradict each other are for
//! nobody to choose between.

use kubernest_crds::kubevirt::v1::{VirtualMachineInstancePresetSpec, VirtualMachineInstanceSpec, Volume};
use serde_json::{Map, Value};

use super::{disks, hardware, mutate::Preset, read};
use crate::{
    Decision, Installation, Review,
    decision::{Report, kubevirt_style, reasons},
};

/// Settings that are taken or left whole, by their place below `domain`.
const WHOLE: [&str; 5] = ["/cpu", "/firmware", "/features", "/devices/watchdog", "/clock/timer"];
/// What KubeVirt says of the kind.
pub const DEPRECATED: &str =
    "kubevirt.io/v1 VirtualMachineInstancePresets is now deprecated and will be removed in v2.";

type Object = Map<String, Value>;

/// Decides upon a VirtualMachineInstancePreset.
pub fn decide(_: &Installation, review: Review<'_>) -> Decision {
    let mut report = Report::default();
    let Some(spec) = read::<VirtualMachineInstancePresetSpec>(&mut report, review.object) else {
        return report.decide(kubevirt_style);
    };
    let Some(domain) = spec.domain else {
        report.add(reasons::REQUIRED, "spec.domain", "missing domain.");
        return report.decide(kubevirt_style);
    };
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

/// Lays the presets over an instance's `domain` and says of each whether it was left out, and why.
///
/// # Errors
/// When presets contradict each other, in KubeVirt's words; `domain` is as it was then.
pub fn apply(domain: &mut Value, presets: &[Preset]) -> Result<Vec<(String, String)>, String> {
    let mut clashes = Vec::new();
    for (index, preset) in presets.iter().enumerate() {
        for visited in &presets[..index] {
            let found = conflicts(&preset.domain, &visited.domain);
            if !found.is_empty() {
                let (one, other) = (&preset.name, &visited.name);
                clashes.push(format!("presets '{one}' and '{other}' conflict: {}", found.join(", ")));
            }
        }
    }
    if !clashes.is_empty() {
        let clashes = clashes.join(", ");
        return Err(format!(
            "VirtualMachinePresets cannot be applied due to conflicts: {clashes}"
        ));
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
    let mut found = Vec::new();
    let mut compare = |name: &str, ours: Option<&Value>, theirs: Option<&Value>| {
        if let (Some(ours), Some(theirs)) = (set(ours), set(theirs))
            && ours != theirs
        {
            found.push(format!("spec.{name}: {ours} != {theirs}"));
        }
    };
    for (key, value) in requests(preset) {
        let theirs = other
            .pointer("/resources/requests")
            .and_then(|requests| requests.get(key));
        let name = format!("resources.requests[{key}]");
        let canonical = |value: &Value| super::defaults::canonical(value);
        compare(&name, Some(&canonical(value)), theirs.map(canonical).as_ref());
    }
    for path in WHOLE {
        let name = path.trim_start_matches('/').replace('/', ".");
        compare(&name, preset.pointer(path), other.pointer(path));
    }
    let offset = |domain: &Value| domain.get("clock").map(without_timer);
    compare("clock", offset(preset).as_ref(), offset(other).as_ref());
    found
}

fn merge(domain: &mut Value, preset: &Value) {
    for (key, value) in requests(preset) {
        set_absent(domain, &["resources", "requests", key], value);
    }
    for path in WHOLE {
        if let Some(value) = set(preset.pointer(path)) {
            let keys: Vec<&str> = path.split('/').skip(1).collect();
            set_absent(domain, &keys, value);
        }
    }
    let offset = preset.get("clock").map(without_timer);
    for (key, value) in offset.iter().filter_map(Value::as_object).flatten() {
        set_absent(domain, &["clock", key], value);
    }
}

fn requests(domain: &Value) -> impl Iterator<Item = (&String, &Value)> {
    let requests = domain.pointer("/resources/requests").and_then(Value::as_object);
    requests.into_iter().flatten()
}

/// What a clock says apart from its timers.
fn without_timer(clock: &Value) -> Value {
    let mut clock = clock.clone();
    if let Some(clock) = clock.as_object_mut() {
        clock.remove("timer");
    }
    clock
}

/// A value that says something.
fn set(value: Option<&Value>) -> Option<&Value> {
    value.filter(|value| !value.is_null() && value.as_object().is_none_or(|object| !object.is_empty()))
}

/// Sets what is absent, making the objects above it. What has another shape than it should stays for validation to tell.
fn set_absent(domain: &mut Value, path: &[&str], value: &Value) {
    let Some((last, above)) = path.split_last() else { return };
    let mut at: Option<&mut Object> = domain.as_object_mut();
    for key in above {
        at = at.and_then(|object| super::defaults::object(object, key));
    }
    if let Some(object) = at
        && set(object.get(*last)).is_none()
    {
        object.insert((*last).to_owned(), value.clone());
    }
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
        assert_eq!(
            left_out,
            [("a".to_owned(), r#"spec.cpu: {"cores":2} != {"cores":4}"#.to_owned())]
        );
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
             spec.cpu: {\"cores\":4} != {\"cores\":2}"
        );
        assert_eq!(domain, json!({"devices": {}}));
    }
}
