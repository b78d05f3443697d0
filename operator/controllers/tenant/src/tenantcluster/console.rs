//! When to ask what a guest says on its console, and what of it to repeat. Pure.
//!
//! A machine whose node is not Ready is asked after a while and then now and again; one that is up is never asked, so
//! that nothing is written at rest.

use jiff::{SignedDuration, Timestamp};
use kube::{Resource, ResourceExt};
use kubernest_crds::{
    kubevirt::v1::{VirtualMachine, VirtualMachineInstance, printable_status},
    labels,
};

/// Age of a machine after which its guest is asked: twice what a boot takes without hardware virtualisation.
const PATIENCE: SignedDuration = SignedDuration::from_secs(150);
/// Time between two questions.
const INTERVAL: SignedDuration = SignedDuration::from_secs(60);
/// Lines that a message repeats.
const LINES: usize = 3;
/// Bytes of a line that a message repeats.
const LINE: usize = 160;

/// The token to ask with: the present one, a new one, or none yet. A token is the second in which it was made.
pub fn request(machine: Option<&VirtualMachine>, ready: bool, now: Timestamp) -> Option<String> {
    let machine = machine?;
    let present = machine.annotations().get(labels::CONSOLE_TAIL_REQUEST).cloned();
    if ready {
        return present;
    }
    let asked = present.as_deref().and_then(|token| token.parse().ok());
    let asked = asked.and_then(|second| Timestamp::from_second(second).ok());
    let due = match asked {
        Some(asked) => now.duration_since(asked) >= INTERVAL,
        None => crashes(machine) || age(machine, now).is_some_and(|age| age >= PATIENCE),
    };
    if due {
        Some(now.as_second().to_string())
    } else {
        present
    }
}

fn age(machine: &VirtualMachine, now: Timestamp) -> Option<SignedDuration> {
    Some(now.duration_since(machine.meta().creation_timestamp.as_ref()?.0))
}

fn crashes(machine: &VirtualMachine) -> bool {
    let status = machine
        .status
        .as_ref()
        .and_then(|status| status.printable_status.as_deref());
    status == Some(printable_status::CRASH_LOOP_BACK_OFF)
}

/// The guest's last lines for a message; empty when it was not asked or has not answered.
pub fn tail(instance: Option<&VirtualMachineInstance>) -> String {
    let tail = instance.and_then(|instance| instance.status.as_ref()?.console_tail.as_ref());
    let lines: Vec<&str> = tail
        .into_iter()
        .flat_map(|tail| &tail.lines)
        .map(|line| line.trim())
        .collect();
    let said = lines
        .iter()
        .rev()
        .filter(|line| !line.is_empty())
        .take(LINES)
        .collect::<Vec<_>>();
    said.into_iter()
        .rev()
        .map(|line| clip(line))
        .collect::<Vec<_>>()
        .join(" | ")
}

fn clip(line: &str) -> &str {
    let end = (0..=line.len().min(LINE)).rev().find(|end| line.is_char_boundary(*end));
    &line[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn machine(token: Option<&str>, status: &str) -> VirtualMachine {
        let annotations = token.map_or(json!({}), |token| json!({labels::CONSOLE_TAIL_REQUEST: token}));
        serde_json::from_value(json!({
            "metadata": {"name": "a", "creationTimestamp": "1970-01-01T00:00:00Z", "annotations": annotations},
            "spec": {"template": {"spec": {"domain": {"devices": {}}}}},
            "status": {"printableStatus": status},
        }))
        .unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn plan_console_asks_after_a_while_and_again() {
        let fresh = machine(None, "Running");
        assert_eq!(request(Some(&fresh), false, at(149)), None);
        assert_eq!(request(Some(&fresh), false, at(150)), Some("150".into()));
        let asked = machine(Some("150"), "Running");
        assert_eq!(request(Some(&asked), false, at(209)), Some("150".into()));
        assert_eq!(request(Some(&asked), false, at(210)), Some("210".into()));
    }

    #[test]
    fn plan_console_leaves_a_ready_node_alone_and_asks_a_crashing_one_at_once() {
        assert_eq!(
            request(Some(&machine(Some("150"), "Running")), true, at(9999)),
            Some("150".into())
        );
        assert_eq!(request(Some(&machine(None, "Running")), true, at(9999)), None);
        assert_eq!(
            request(Some(&machine(None, "CrashLoopBackOff")), false, at(5)),
            Some("5".into())
        );
    }

    #[test]
    fn plan_console_repeats_the_last_lines() {
        let instance: VirtualMachineInstance = serde_json::from_value(json!({
            "metadata": {"name": "a"},
            "spec": {"domain": {"devices": {}}},
            "status": {"consoleTail": {"request": "1", "lines": ["one", "two", "", "three ", "four"]}},
        }))
        .unwrap();
        assert_eq!(tail(Some(&instance)), "two | three | four");
        assert_eq!(tail(None), "");
    }
}
