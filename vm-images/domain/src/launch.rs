//! [`Launch`]: all that a launcher pod is told, written once by the machine controller into the pod's environment.
//!
//! The object is immutable: a pod is created atomically with everything its domain needs. What may change while the
//! machine runs (a Secret shared as a file system) arrives through a mount, never through this document.

use std::collections::BTreeMap;

use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use serde::{Deserialize, Serialize};

/// Environment variable of the container `compute` that holds a [`Launch`] as JSON.
pub const LAUNCH_ENV: &str = "KUBERNEST_LAUNCH";

/// What one launcher pod runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Launch {
    /// Metadata (name, namespace, uid, labels, annotations) and defaulted spec; no status.
    pub vmi: VirtualMachineInstance,
    /// What executes the guest's instructions; decided by the controller, never guessed by the launcher.
    pub accelerator: Accelerator,
    /// The PersistentVolumeClaims among the VMI's volumes, by volume name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, ClaimedVolume>,
    /// The VMI's interfaces, in its order; the CNI plugin has made one tap for each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<TapInterface>,
}

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The kernel's virtual machine monitor, through /dev/kvm.
    Kvm,
    /// qemu's own translator.
    Tcg,
}

/// A PersistentVolumeClaim as the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClaimedVolume {
    /// How the pod mounts it.
    pub mode: VolumeMode,
    /// Requested size in bytes.
    pub capacity: u64,
}

/// The claim's `volumeMode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeMode {
    /// A directory below [`crate::paths::CLAIMS`] that holds, or will hold, `disk.img`.
    Filesystem,
    /// A device below [`crate::paths::BLOCK_DEVICES`].
    Block,
}

/// A tap device in the pod's network namespace, made by the CNI plugin and owned by the launcher's user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TapInterface {
    /// Name of the VMI's interface that uses it.
    pub name: String,
    /// How the tap meets the network.
    pub kind: TapKind,
    /// Name of the device, for example `tap0`.
    pub tap: String,
    /// The guest's MAC address, lower case with colons.
    pub mac: String,
    /// MTU in bytes that the guest is offered.
    pub mtu: u32,
}

/// How a tap meets the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TapKind {
    /// Translated to the pod's own address; the launcher serves DHCP on it.
    Masquerade,
    /// A port of a bridge; addresses are the guest's own affair.
    Bridge,
}

/// Why a text is no launch document.
#[derive(Debug, thiserror::Error)]
pub enum ParseLaunchError {
    /// Not JSON of this shape.
    #[error("{LAUNCH_ENV} is not a launch document")]
    Shape(#[from] serde_path_to_error::Error<serde_json::Error>),
    /// A field that this launcher does not know.
    #[error("{0}: not supported")]
    Unsupported(String),
}

impl Launch {
    /// How many processors of its own the machine asks for, if any.
    pub fn dedicated(&self) -> Option<u32> {
        self.vmi.spec.domain.cpu.as_ref()?.dedicated()
    }

    /// Reads the JSON of [`LAUNCH_ENV`]; a field that is not known is refused by its path, not ignored.
    pub fn parse(json: &str) -> Result<Self, ParseLaunchError> {
        let mut unknown: Option<String> = None;
        let mut note = |path: serde_ignored::Path<'_>| {
            let path = path.to_string();
            // kube's objects carry their type without a field for it.
            if !matches!(path.as_str(), "vmi.apiVersion" | "vmi.kind") {
                unknown.get_or_insert(path);
            }
        };
        let mut track = serde_path_to_error::Track::new();
        let mut deserializer = serde_json::Deserializer::from_str(json);
        let tracked = serde_path_to_error::Deserializer::new(&mut deserializer, &mut track);
        match serde_ignored::deserialize(tracked, &mut note) {
            Err(source) => Err(ParseLaunchError::Shape(serde_path_to_error::Error::new(
                track.path(),
                source,
            ))),
            Ok(launch) => match unknown {
                Some(path) => Err(ParseLaunchError::Unsupported(path)),
                None => Ok(launch),
            },
        }
    }
}
