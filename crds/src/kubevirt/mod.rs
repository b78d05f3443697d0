//! The supported subset of KubeVirt's API, group `kubevirt.io`.
//!
//! Source of shapes: KubeVirt 1.9, `staging/src/kubevirt.io/api/core/v1`. A field of KubeVirt that stands nowhere here
//! is not supported: the CRD keeps it so that admission can refuse it by its path.

pub mod clock;
pub mod dhcp;
pub mod domain;
pub mod guest_agent;
pub mod guest_network;
pub mod virtualmachine;
pub mod virtualmachineinstance;
pub mod virtualmachineinstancepreset;
pub mod virtualmachineinstancereplicaset;
pub mod volume;

/// Plural names of all kinds.
pub const PLURALS: [&str; 4] = [
    "virtualmachines",
    "virtualmachineinstances",
    "virtualmachineinstancepresets",
    "virtualmachineinstancereplicasets",
];

/// Version `v1` of the API.
pub mod v1 {
    pub use super::clock::*;
    pub use super::dhcp::*;
    pub use super::domain::*;
    pub use super::guest_agent::*;
    pub use super::guest_network::*;
    pub use super::virtualmachine::*;
    pub use super::virtualmachineinstance::*;
    pub use super::virtualmachineinstancepreset::*;
    pub use super::virtualmachineinstancereplicaset::*;
    pub use super::volume::*;
}
