//! What a VirtualMachineInstance's spec says once its gaps are filled, as KubeVirt 1.9 fills them (`pkg/defaults` and the
//! API's own `SetDefaults_*`). On raw JSON, so that fields that are refused afterwards by name are still there.
//!
//! `firmware.uuid`, which KubeVirt draws by chance, is left to whoever may draw.

use kubernest_crds::quantity::Quantity;
use serde_json::{Map, Value, json};

/// KubeVirt's default architecture.
pub const ARCHITECTURE: &str = "amd64";
/// KubeVirt's default machine.
pub const MACHINE: &str = "q35";
/// KubeVirt's default processor.
const CPU_MODEL: &str = "host-model";
/// Bus of a disk that names none.
const BUS: &str = "sata";
/// How many times what is there could be plugged in.
const HOTPLUG_RATIO: u64 = 4;
/// Least memory in bytes that could grow, and what it must be a multiple of.
const HOTPLUG_LEAST: u64 = 1 << 30;
const HOTPLUG_BLOCK: u64 = 2 << 20;

type Object = Map<String, Value>;

/// How an instance that says nothing of networks is bound to the pod network: KubeVirt's default.
pub const BRIDGE: &str = "bridge";
/// The same, as installations of KubeVirt may choose and as it is here, where nothing but that is supported.
pub const MASQUERADE: &str = "masquerade";

/// Fills the gaps of an instance's spec; `binding` is its default interface. What has another shape than it should is left
/// for validation to tell.
pub fn fill(spec: &mut Value, binding: &str) {
    network(spec, binding);
    fill_checked(spec);
}

/// The same but for the network: what an instance is checked as. Its own default for that is not supported here.
pub fn fill_checked(spec: &mut Value) {
    fill_template(spec);
    let Some(spec) = spec.as_object_mut() else { return };
    for probe in ["livenessProbe", "readinessProbe"] {
        if let Some(probe) = spec.get_mut(probe).and_then(Value::as_object_mut) {
            for (key, value) in [
                ("timeoutSeconds", 1),
                ("periodSeconds", 10),
                ("successThreshold", 1),
                ("failureThreshold", 3),
            ] {
                number(probe, key, value);
            }
        }
    }
    let Some(domain) = object(spec, "domain") else { return };
    features(domain);
    plugging(domain);
    if let Some(cpu) = object(domain, "cpu") {
        absent(cpu, "model", CPU_MODEL);
    }
    if let Some(timers) = domain.get_mut("clock").and_then(|clock| clock.get_mut("timer")) {
        for timer in timers.as_object_mut().into_iter().flat_map(Map::values_mut) {
            if let Some(timer) = timer.as_object_mut() {
                timer.entry("present").or_insert(json!(true));
            }
        }
    }
    if let Some(devices) = domain.get_mut("devices").and_then(Value::as_object_mut) {
        disks(devices);
        for input in devices
            .get_mut("inputs")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if let Some(input) = input.as_object_mut() {
                absent(input, "bus", "usb");
            }
        }
        if let Some(watchdog) = devices.get_mut("watchdog").and_then(Value::as_object_mut)
            && let Some(device) = object(watchdog, "i6300esb")
        {
            absent(device, "action", "reset");
        }
    }
}

/// What a machine's template is checked as: sizes and disks, not yet how the devices are.
pub fn fill_template(spec: &mut Value) {
    without_empty(spec);
    let Some(spec) = spec.as_object_mut() else { return };
    absent(spec, "architecture", ARCHITECTURE);
    absent(spec, "evictionStrategy", "None");
    images(spec);
    let volumes = names(spec.get("volumes"));
    let Some(domain) = object(spec, "domain") else { return };
    if let Some(machine) = object(domain, "machine") {
        absent(machine, "type", MACHINE);
    }
    requests(domain);
    memory(domain);
    processor(domain);
    if let Some(devices) = object(domain, "devices") {
        let used = [names(devices.get("disks")), names(devices.get("filesystems"))].concat();
        let unused = volumes.into_iter().filter(|name| !used.contains(name));
        let unused: Vec<Value> = unused.map(|name| json!({"name": name})).collect();
        if !unused.is_empty()
            && let Some(disks) = devices.entry("disks").or_insert_with(|| json!([])).as_array_mut()
        {
            disks.extend(unused);
        }
    }
}

/// Names in a list of objects.
fn names(list: Option<&Value>) -> Vec<Value> {
    let list = list.and_then(Value::as_array).into_iter().flatten();
    list.map(|one| one.get("name").cloned().unwrap_or_else(|| json!("")))
        .collect()
}

/// Go leaves empty texts and lists out when it writes; only where they are the value itself do they say something.
fn without_empty(value: &mut Value) {
    const KEPT: [&str; 13] = [
        "name",
        "nodeSelectorTerms",
        "image",
        "claimName",
        "networkName",
        "key",
        "value",
        "topologyKey",
        "secretName",
        "timezone",
        "errorPolicy",
        "evictionStrategy",
        "startStrategy",
    ];
    /// Maps whose keys are not fields: Go leaves nothing out of them.
    const MAPS: [&str; 2] = ["nodeSelector", "matchLabels"];
    match value {
        Value::Object(object) => {
            object.retain(|key, value| {
                let empty = value.as_str() == Some("") || value.as_array().is_some_and(Vec::is_empty);
                !empty || KEPT.contains(&key.as_str())
            });
            let fields = object.iter_mut().filter(|(key, _)| !MAPS.contains(&key.as_str()));
            fields.for_each(|(_, value)| without_empty(value));
        }
        Value::Array(list) => list.iter_mut().for_each(without_empty),
        _ => {}
    }
}

/// The object at `key`, made if there is none; `None` if something else stands there.
pub fn object<'a>(parent: &'a mut Object, key: &str) -> Option<&'a mut Object> {
    let value = parent.entry(key).or_insert_with(|| json!({}));
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut()
}

fn absent(parent: &mut Object, key: &str, value: &str) {
    parent.entry(key).or_insert_with(|| json!(value));
}

/// A number that is missing or makes no sense.
fn number(parent: &mut Object, key: &str, value: i64) {
    let there = parent
        .get(key)
        .is_some_and(|found| found.as_i64().is_none_or(|found| found > 0));
    if !there {
        parent.insert(key.to_owned(), json!(value));
    }
}

/// Whether the image may have changed under its name.
fn images(spec: &mut Object) {
    for volume in spec
        .get_mut("volumes")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if let Some(capacity) = volume.get_mut("emptyDisk").and_then(|disk| disk.get_mut("capacity")) {
            *capacity = canonical(capacity);
        }
        let Some(disk) = volume.get_mut("containerDisk").and_then(Value::as_object_mut) else {
            continue;
        };
        let image = disk.get("image").and_then(Value::as_str).unwrap_or_default();
        let moves = image.ends_with(":latest") || !image.contains([':', '@']);
        absent(disk, "imagePullPolicy", if moves { "Always" } else { "IfNotPresent" });
    }
}

/// An instance that says nothing of networks is on the pod network.
fn network(spec: &mut Value, binding: &str) {
    let Some(spec) = spec.as_object_mut() else { return };
    let none = |list: Option<&Value>| list.and_then(Value::as_array).is_none_or(Vec::is_empty);
    let without = none(spec.get("networks"));
    let Some(devices) = spec.get_mut("domain").and_then(|domain| domain.get_mut("devices")) else {
        return;
    };
    if !without || !none(devices.get("interfaces")) || devices.get("autoattachPodInterface") == Some(&json!(false)) {
        return;
    }
    if let Some(devices) = devices.as_object_mut() {
        devices.insert("interfaces".to_owned(), json!([{"name": "default", binding: {}}]));
        spec.insert("networks".to_owned(), json!([{"name": "default", "pod": {}}]));
    }
}

/// A request of processor time that is missing follows from its limit; all quantities become canonical.
fn requests(domain: &mut Object) {
    let Some(resources) = object(domain, "resources") else {
        return;
    };
    for part in ["requests", "limits"] {
        for value in resources
            .get_mut(part)
            .and_then(Value::as_object_mut)
            .into_iter()
            .flat_map(Map::values_mut)
        {
            *value = canonical(value);
        }
    }
    let limit = resources.get("limits").and_then(|limits| limits.get("cpu")).cloned();
    if let Some(limit) = limit.filter(|limit| !is_zero(limit))
        && let Some(requests) = object(resources, "requests")
        && requests.get("cpu").is_none_or(is_zero)
    {
        requests.insert("cpu".to_owned(), limit);
    }
    resources.retain(|_, part| part.as_object().is_none_or(|part| !part.is_empty()));
}

/// The guest's memory follows from what the pod has.
fn memory(domain: &mut Object) {
    let of = |part: &str| {
        let value = domain.get("resources")?.get(part)?.get("memory")?.clone();
        Some(value).filter(|value| !is_zero(value))
    };
    let from_pod = of("requests").or_else(|| of("limits"));
    let Some(memory) = object(domain, "memory") else { return };
    match (memory.get_mut("guest"), from_pod) {
        (Some(guest), _) => *guest = canonical(guest),
        (None, Some(value)) => drop(memory.insert("guest".to_owned(), value)),
        (None, None) => {}
    }
}

/// Topology from what the pod has, as sockets; the model of the host.
fn processor(domain: &mut Object) {
    const TOPOLOGY: [&str; 3] = ["sockets", "cores", "threads"];
    let of = |part: &str| domain.get("resources")?.get(part)?.get("cpu").map(whole);
    let from_pod = of("limits").or_else(|| of("requests"));
    let Some(cpu) = object(domain, "cpu") else { return };
    cpu.retain(|key, value| !TOPOLOGY.contains(&key.as_str()) || value.as_u64() != Some(0));
    if TOPOLOGY.iter().all(|key| !cpu.contains_key(*key)) {
        for (key, value) in [("sockets", from_pod.unwrap_or(1)), ("cores", 1), ("threads", 1)] {
            if value > 0 {
                cpu.insert(key.to_owned(), json!(value));
            }
        }
    }
}

/// How far processor and memory could grow; nothing here lets them.
fn plugging(domain: &mut Object) {
    if let Some(cpu) = object(domain, "cpu")
        && let Some(sockets) = cpu.get("sockets").and_then(Value::as_u64)
    {
        cpu.entry("maxSockets")
            .or_insert(json!(sockets.saturating_mul(HOTPLUG_RATIO)));
    }
    if let Some(memory) = object(domain, "memory") {
        let guest = memory.get("guest").map(whole).unwrap_or_default();
        if guest >= HOTPLUG_LEAST && guest % HOTPLUG_BLOCK == 0 {
            let most = Quantity(format!("{}Mi", (guest >> 20).saturating_mul(HOTPLUG_RATIO)));
            memory.entry("maxGuest").or_insert(json!(most.canonical()));
        }
    }
}

/// ACPI unless it is switched off; a feature that is named is on.
fn features(domain: &mut Object) {
    let Some(features) = object(domain, "features") else {
        return;
    };
    object(features, "acpi");
    for (name, feature) in features.iter_mut() {
        let Some(feature) = feature.as_object_mut() else {
            continue;
        };
        if !matches!(name.as_str(), "hyperv" | "hypervPassthrough" | "kvm") {
            feature.entry("enabled").or_insert(json!(true));
        }
    }
}

fn disks(devices: &mut Object) {
    for disk in devices
        .get_mut("disks")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let Some(disk) = disk.as_object_mut() else { continue };
        if !["disk", "cdrom", "lun"].iter().any(|kind| disk.contains_key(*kind)) {
            object(disk, "disk");
        }
        for kind in ["disk", "cdrom", "lun"] {
            if let Some(target) = disk.get_mut(kind).and_then(Value::as_object_mut) {
                absent(target, "bus", BUS);
            }
        }
        if let Some(cdrom) = disk.get_mut("cdrom").and_then(Value::as_object_mut) {
            cdrom.entry("readonly").or_insert(json!(true));
            absent(cdrom, "tray", "closed");
        }
    }
}

fn quantity(value: &Value) -> Option<Quantity> {
    serde_json::from_value(value.clone()).ok()
}

fn is_zero(value: &Value) -> bool {
    quantity(value).and_then(|quantity| quantity.milli().ok()) == Some(0)
}

/// The whole number that a quantity comes to, rounded up.
fn whole(value: &Value) -> u64 {
    let value = quantity(value).and_then(|quantity| quantity.value().ok());
    value.and_then(|value| u64::try_from(value).ok()).unwrap_or_default()
}

/// A quantity as it is written in one way only; another value as it is.
pub fn canonical(value: &Value) -> Value {
    quantity(value).map_or_else(|| value.clone(), |quantity| json!(quantity.canonical()))
}
