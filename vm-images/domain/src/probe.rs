//! Probes through the guest agent: what the kubelet runs in the pod, and what that asks the launcher.
//!
//! One line of JSON each way on [`crate::paths::PROBE_SOCKET`]: a [`Question`], then an [`Answer`].

use std::ffi::OsStr;

use kubernest_crds::kubevirt::v1::Probe;
use serde::{Deserialize, Serialize};

use crate::paths;

/// Subcommand of the launcher that asks.
pub const SUBCOMMAND: &str = "probe";
/// Seconds that a question may take where the probe names none (Kubernetes' default).
pub const DEFAULT_SECONDS: u32 = 1;
/// Most bytes of a question.
pub const QUESTION_BYTES: u64 = 128 << 10;
/// Most bytes of an answer.
pub const ANSWER_BYTES: u64 = 64 << 10;
/// Most bytes of what a command has said; the kubelet shows no more than 10 KiB.
pub const OUTPUT_BYTES: usize = 4 << 10;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Question {
    /// Seconds that it may take.
    pub seconds: u32,
    /// The program to run in the guest and its arguments; without it whether the agent answers is all that is asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Code that the command has exited with, 0 where there was none.
    pub code: i32,
    /// What it said, cut to [`OUTPUT_BYTES`]; or why the question was not answered.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub said: String,
}

/// What the kubelet runs in the pod for a probe, if it goes through the agent.
pub fn command(probe: &Probe) -> Option<Vec<String>> {
    if !probe.asks_the_agent() {
        return None;
    }
    let seconds = seconds(probe).to_string();
    let mut all: Vec<String> = [paths::LAUNCHER, SUBCOMMAND, "--timeout-seconds", &seconds]
        .map(str::to_owned)
        .into();
    // A command may look like flags.
    if let Some(exec) = &probe.exec {
        all.push("--".to_owned());
        all.extend(exec.command.iter().cloned());
    }
    Some(all)
}

/// Seconds that a probe may take.
pub fn seconds(probe: &Probe) -> u32 {
    let given = probe.timeout_seconds.and_then(|seconds| u32::try_from(seconds).ok());
    given.filter(|seconds| *seconds > 0).unwrap_or(DEFAULT_SECONDS)
}

/// Whether a launcher that was started with these arguments shall ask rather than run a machine.
pub fn is_asked<S: AsRef<OsStr>>(mut arguments: impl Iterator<Item = S>) -> bool {
    arguments.nth(1).is_some_and(|first| first.as_ref() == SUBCOMMAND)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(text: &str) -> Probe {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn plan_probe_runs_the_launcher_in_the_pod() {
        let ping = probe(r#"{"guestAgentPing": {}}"#);
        let launcher = [paths::LAUNCHER, "probe", "--timeout-seconds"];
        assert_eq!(command(&ping).unwrap(), [&launcher[..], &["1"]].concat());
        let exec = probe(r#"{"exec": {"command": ["--", "probe"]}, "timeoutSeconds": 7}"#);
        let wanted = [&launcher[..], &["7", "--", "--", "probe"]].concat();
        assert_eq!(command(&exec).unwrap(), wanted);
        assert_eq!(command(&probe(r#"{"tcpSocket": {"port": 1}}"#)), None);
        assert!(is_asked(wanted.iter()) && !is_asked(["kubernest-launcher"].iter()));
    }
}
