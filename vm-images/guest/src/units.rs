//! systemd units: starting, restarting, and what is wrong with those that fail.
//!
//! It never waits for a unit: a unit that cannot start must not keep the guest from mending it.

use std::collections::BTreeMap;

use crate::command::{self, CommandError};

/// Lines of a failing unit's journal that are repeated on the console.
const JOURNAL_LINES: &str = "4";

/// Why systemd did not do as asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}", .units.join(", "))]
pub struct UnitError {
    what: &'static str,
    units: Vec<String>,
    #[source]
    source: CommandError,
}

/// Queues the start of units; those that run are left alone.
pub fn start(units: &[String]) -> Result<(), UnitError> {
    queue("start", units)
}

/// Queues the restart of those units that run.
pub fn restart(units: &[String]) -> Result<(), UnitError> {
    queue("try-restart", units)
}

fn queue(verb: &'static str, units: &[String]) -> Result<(), UnitError> {
    if units.is_empty() {
        return Ok(());
    }
    let mut args = vec!["--no-block", verb, "--"];
    args.extend(units.iter().map(String::as_str));
    command::run("systemctl", &args).map(drop).map_err(|source| UnitError {
        what: verb,
        units: units.to_vec(),
        source,
    })
}

/// Notices units that fail, each failure once.
#[derive(Default)]
pub struct Watch {
    seen: BTreeMap<String, Health>,
}

/// What systemd knows of a unit's failures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Health {
    restarts: u32,
    failed: bool,
    result: String,
}

/// A unit that failed since the last look.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// The unit.
    pub unit: String,
    /// For example `exit-code, 3 restarts`.
    pub what: String,
}

impl Watch {
    /// One look at `units`, one systemctl call.
    pub fn look(&mut self, units: &[String]) -> Result<Vec<Failure>, UnitError> {
        if units.is_empty() {
            return Ok(Vec::new());
        }
        let mut args = vec!["show", "--property=Id,ActiveState,Result,NRestarts", "--"];
        args.extend(units.iter().map(String::as_str));
        let shown = command::run("systemctl", &args).map_err(|source| UnitError {
            what: "look at",
            units: units.to_vec(),
            source,
        })?;
        Ok(self.compare(parse(&shown)))
    }

    fn compare(&mut self, now: BTreeMap<String, Health>) -> Vec<Failure> {
        let mut failures = Vec::new();
        for (unit, health) in now {
            let before = self.seen.get(&unit).cloned().unwrap_or_default();
            if health.restarts > before.restarts || (health.failed && !before.failed) {
                // While systemd starts it again, the result of the last run is no longer told.
                let result = if health.result == "success" {
                    "ended"
                } else {
                    &health.result
                };
                let what = format!("{result}, {} restarts", health.restarts);
                failures.push(Failure {
                    unit: unit.clone(),
                    what,
                });
            }
            self.seen.insert(unit, health);
        }
        failures
    }
}

/// Reads `systemctl show`: blocks of `Key=Value` lines, parted by empty lines.
fn parse(shown: &str) -> BTreeMap<String, Health> {
    let mut units = BTreeMap::new();
    for block in shown.split("\n\n") {
        let value = |key: &str| block.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        if let Some(id) = value("Id") {
            let health = Health {
                restarts: value("NRestarts").and_then(|text| text.parse().ok()).unwrap_or(0),
                failed: value("ActiveState") == Some("failed"),
                result: value("Result").unwrap_or_default().to_owned(),
            };
            units.insert(id.to_owned(), health);
        }
    }
    units
}

/// The last lines of a unit's journal.
pub fn last_words(unit: &str) -> Vec<String> {
    let args = [
        "--no-pager",
        "--quiet",
        "--output=cat",
        "--lines",
        JOURNAL_LINES,
        "--unit",
        unit,
    ];
    match command::run("journalctl", &args) {
        Ok(text) => text.lines().map(str::to_owned).collect(),
        Err(error) => vec![crate::console::chain(&error)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "NRestarts=2\nResult=exit-code\nId=etcd.service\nActiveState=activating\n\n\
                         NRestarts=0\nResult=success\nId=kubelet.service\nActiveState=active\n";

    #[test]
    fn units_watch_tells_each_failure_once() {
        let mut watch = Watch::default();
        let expected = Failure {
            unit: "etcd.service".to_owned(),
            what: "exit-code, 2 restarts".to_owned(),
        };
        assert_eq!(watch.compare(parse(SHOWN)), [expected]);
        assert_eq!(watch.compare(parse(SHOWN)), []);
        assert_eq!(
            watch.compare(parse(&SHOWN.replace("NRestarts=2", "NRestarts=3"))).len(),
            1
        );
    }

    #[test]
    fn units_watch_tells_a_unit_that_failed_for_good() {
        let mut watch = Watch::default();
        watch.compare(parse(SHOWN));
        let failed = SHOWN.replace("ActiveState=active\n", "ActiveState=failed\n");
        assert_eq!(watch.compare(parse(&failed))[0].unit, "kubelet.service");
    }
}
