//! The termination message: the last words of a launcher, which the machine controller reads from the pod's status.
//!
//! Kubernetes keeps at most 4096 bytes of it (`MaxContainerTerminationMessageLength` in its kubelet).

use serde::{Deserialize, Serialize};

/// Most bytes Kubernetes keeps of a termination message.
pub const MAX_BYTES: usize = 4096;

/// Why a launcher ended, with what the guest said last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Termination {
    /// For machines.
    pub reason: TerminationReason,
    /// For people: one sentence.
    pub message: String,
    /// The last lines of the serial console, oldest first.
    #[serde(default)]
    pub serial: Vec<String>,
}

/// Why a launcher ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TerminationReason {
    /// The guest powered off by itself. Exit code 0.
    GuestShutdown,
    /// The guest or qemu died.
    GuestCrashed,
    /// qemu paused itself on an error that it can't continue from (a KVM that can't run this kernel, a full disk).
    GuestPaused,
    /// The pod was asked to stop, and the guest is gone. Exit code 0.
    Stopped,
    /// The domain never ran.
    LaunchFailed,
}

impl TerminationReason {
    /// Exit code of the launcher: 0 when the guest ended as it should.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::GuestShutdown | Self::Stopped => 0,
            Self::GuestCrashed => 1,
            Self::GuestPaused => 2,
            Self::LaunchFailed => 3,
        }
    }
}

impl Termination {
    /// JSON of at most [`MAX_BYTES`]: the oldest serial lines go first, then the end of the message.
    pub fn to_json(&self) -> String {
        let mut fitted = self.clone();
        loop {
            let json = serde_json::to_string(&fitted).unwrap_or_default();
            if json.len() <= MAX_BYTES {
                return json;
            }
            if fitted.serial.is_empty() {
                // Escaping makes a byte of message at most six bytes of JSON.
                let keep = fitted.message.len().min(MAX_BYTES / 6 - 64);
                fitted.message.truncate(fitted.message.floor_char_boundary(keep));
            } else {
                fitted.serial.remove(0);
            }
        }
    }

    /// Reads what [`Self::to_json`] wrote.
    pub fn from_json(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_termination_fits_the_kubelets_limit() {
        let termination = Termination {
            reason: TerminationReason::GuestCrashed,
            message: "\u{1}".repeat(9000),
            serial: (0..100).map(|i| format!("{i} {}", "ä".repeat(90))).collect(),
        };
        let json = termination.to_json();
        assert!(json.len() <= MAX_BYTES, "{} bytes", json.len());
        assert_eq!(
            Termination::from_json(&json).unwrap().reason,
            TerminationReason::GuestCrashed
        );
        let short = Termination {
            message: "it died".into(),
            ..termination
        };
        let kept = Termination::from_json(&short.to_json()).unwrap();
        assert!(
            kept.serial.len() > 10 && kept.serial.last() == short.serial.last(),
            "{kept:?}"
        );
    }
}
