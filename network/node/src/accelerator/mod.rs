//! Which accelerator the node's machines can use, found out by running a tiny guest and not by looking at /dev/kvm:
//! there are hosts where /dev/kvm opens, machines can be created and even 16-bit code runs, yet every kernel dies.
//!
//! The guest runs in a child process with a time limit, so that a KVM that hangs or kills hangs or kills only that.

#[cfg(target_arch = "x86_64")]
mod guest;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// The argument with which the agent's binary starts the guest instead of the agent.
pub const PROBE_ARGUMENT: &str = "probe-kvm";
/// How long the guest may take. It needs milliseconds where KVM works.
pub const LIMIT: Duration = Duration::from_secs(3);

/// What machines on this node run with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualization.
    Kvm,
    /// qemu's translation: always there, slower.
    Tcg,
}

impl Accelerator {
    /// As in the annotation of the Node and in the launch document.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Runs the guest in this process and ends it: with 0 if KVM works, else with 1 and the reason on standard error.
pub fn end_with_guest() -> ! {
    match run_guest() {
        Ok(()) => std::process::exit(0),
        Err(reason) => {
            eprintln!("{reason}");
            std::process::exit(1)
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn run_guest() -> Result<(), String> {
    guest::run().map_err(|error| {
        let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
        format!("{error}{}", source.unwrap_or_default())
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn run_guest() -> Result<(), String> {
    Err("the probe's guest exists for x86-64 only".into())
}

/// Runs the guest in a child process of `agent` (this program) within `limit`: the accelerator, and why it is not KVM.
pub async fn probe(agent: &Path, limit: Duration) -> (Accelerator, String) {
    let child = Command::new(agent)
        .arg(PROBE_ARGUMENT)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let child = match child {
        Ok(child) => child,
        Err(error) => return (Accelerator::Tcg, format!("the probe did not start: {error}")),
    };
    match tokio::time::timeout(limit, child.wait_with_output()).await {
        Ok(Ok(output)) if output.status.success() => (Accelerator::Kvm, "the probe's guest ran to its end".into()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            (
                Accelerator::Tcg,
                said.lines().last().unwrap_or("the probe was killed").to_owned(),
            )
        }
        Ok(Err(error)) => (Accelerator::Tcg, format!("the probe was lost: {error}")),
        Err(_) => (
            Accelerator::Tcg,
            format!("the probe's guest did not end within {} s", limit.as_secs()),
        ),
    }
}
