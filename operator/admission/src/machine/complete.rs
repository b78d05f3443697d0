//! What a new VirtualMachine gets that it does not say itself (KubeVirt 1.9: `vm-mutator.go`): architecture, machine type,
//! and its guest's UUID and serial number. All else stays out of the template: its instances are completed by
//! [`super::mutate`].
//!
//! No fields are touched that somebody has set, so whoever applies a manifest again changes nothing.

use serde_json::{Map, Value, json};

use super::defaults::{self, ARCHITECTURE, MACHINE};

/// Where the instance's spec stands.
const TEMPLATE: &str = "/spec/template";
/// What tells one computer from another.
const IDENTITY: [&str; 2] = ["uuid", "serial"];

/// Completes a machine that is created, or updated from `old`; `drawn` are its UUID and serial number, should it name none.
/// What has another shape than it should is left for validation to tell.
pub fn complete(machine: &Value, old: Option<&Value>, drawn: [&str; 2]) -> Value {
    let mut object = machine.clone();
    let going = object
        .pointer("/metadata/deletionTimestamp")
        .is_some_and(|time| !time.is_null());
    // To fill an old template because a label has changed would be news to the instance that runs.
    let as_before = old.is_some_and(|old| old.pointer(TEMPLATE) == object.pointer(TEMPLATE));
    if going || as_before {
        return object;
    }
    let template = object
        .pointer_mut(TEMPLATE)
        .and_then(|template| template.get_mut("spec"));
    let Some(spec) = template.and_then(Value::as_object_mut) else {
        return object;
    };
    missing(spec, "architecture", || Some(json!(ARCHITECTURE)));
    let Some(domain) = defaults::object(spec, "domain") else {
        return object;
    };
    if let Some(machine) = defaults::object(domain, "machine") {
        missing(machine, "type", || Some(json!(MACHINE)));
    }
    // A user who sends the whole object anew, without these, still means the same computer.
    let before = old.and_then(|old| old.pointer("/spec/template/spec/domain/firmware"));
    let identity = |number: usize| match old {
        Some(_) => before.and_then(|firmware| firmware.get(IDENTITY[number])).cloned(),
        None => Some(json!(drawn[number])),
    };
    let due = (0..IDENTITY.len()).any(|number| identity(number).is_some());
    if due && let Some(firmware) = defaults::object(domain, "firmware") {
        for (number, key) in IDENTITY.into_iter().enumerate() {
            missing(firmware, key, || identity(number));
        }
    }
    object
}

/// Fills a gap; an empty text is one to Go.
fn missing(object: &mut Map<String, Value>, key: &str, value: impl FnOnce() -> Option<Value>) {
    let there = object.get(key).is_some_and(|found| !found.is_null() && found != "");
    if !there && let Some(value) = value() {
        object.insert(key.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAWN: [&str; 2] = ["u", "s"];

    fn machine(domain: Value) -> Value {
        json!({"metadata": {"name": "a"}, "spec": {"runStrategy": "Halted", "template": {"spec": {"domain": domain}}}})
    }

    fn spec(machine: &Value) -> &Value {
        &machine["spec"]["template"]["spec"]
    }

    #[test]
    fn complete_fills_a_new_machines_gaps_once() {
        let done = complete(&machine(json!({"devices": {}})), None, DRAWN);
        let wanted = json!({"architecture": "amd64", "domain": {
            "devices": {}, "machine": {"type": "q35"}, "firmware": {"uuid": "u", "serial": "s"},
        }});
        assert_eq!(spec(&done), &wanted);
        assert_eq!(complete(&done, None, ["other", "other"]), done);
    }

    #[test]
    fn complete_keeps_what_is_said() {
        let said = json!({"machine": {"type": "pc-q35-7.2"}, "firmware": {"uuid": "mine", "serial": "mine"}});
        let done = complete(&machine(said.clone()), None, DRAWN);
        assert_eq!(spec(&done)["domain"], said);
        let empty = complete(
            &machine(json!({"machine": {"type": ""}, "firmware": {"uuid": ""}})),
            None,
            DRAWN,
        );
        assert_eq!(spec(&empty)["domain"]["machine"]["type"], "q35");
        assert_eq!(spec(&empty)["domain"]["firmware"]["uuid"], "u");
    }

    #[test]
    fn complete_leaves_a_template_that_does_not_change() {
        let old = machine(json!({"devices": {}}));
        let mut started = old.clone();
        started["spec"]["runStrategy"] = json!("Always");
        started["metadata"]["labels"] = json!({"a": "b"});
        assert_eq!(complete(&started, Some(&old), DRAWN), started);
        let mut going = machine(json!({"devices": {"rng": {}}}));
        going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert_eq!(complete(&going, Some(&old), DRAWN), going);
    }

    #[test]
    fn complete_keeps_the_computer_that_it_was() {
        let old = complete(&machine(json!({"devices": {}})), None, DRAWN);
        let sent = machine(json!({"devices": {"rng": {}}}));
        let done = complete(&sent, Some(&old), ["other", "other"]);
        assert_eq!(spec(&done)["domain"]["firmware"], json!({"uuid": "u", "serial": "s"}));
        assert_eq!(spec(&done)["domain"]["machine"]["type"], "q35");
        // One that never had any is another computer by no draw: its UUID follows from the machine.
        let done = complete(&sent, Some(&machine(json!({"devices": {}}))), DRAWN);
        assert_eq!(spec(&done)["domain"].get("firmware"), None);
    }

    #[test]
    fn complete_leaves_other_shapes_to_validation() {
        for odd in [
            json!({}),
            json!({"spec": {"template": 1}}),
            json!({"spec": {"template": {"spec": {"domain": 1, "architecture": "amd64"}}}}),
        ] {
            assert_eq!(complete(&odd, None, DRAWN), odd);
        }
    }
}
