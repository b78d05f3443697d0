//! Decisions of the tenant network: names of devices, what a CNI call asks for, nft rules, and which forwarding entries
//! and devices are to be added or removed.
//!
//! Everything here is pure and synchronous. It opens no socket, reads no file and knows no Kubernetes client; the node
//! agent (`kubernest-node`) observes, asks this crate and carries out the answer.

pub mod cni;
pub mod guest;
pub mod names;
pub mod overlay;
pub mod rules;

pub use cni::{Attachment, Call, Command, L2, Masquerade, Pod, Ports, Refused};
pub use guest::{GuestNetwork, PodNetwork};
pub use names::{Mac, TapName, Vni};

/// UDP port of the tenants' VXLAN on the nodes. Not 4789 or 8472, so that the outer cluster's own overlay and the
/// overlays inside tenants never share a socket with it.
pub const VXLAN_PORT: u16 = 8479;
/// Bytes that VXLAN over IPv4 adds to a tenant's frame: IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14 (RFC 7348, section 5).
pub const VXLAN_OVERHEAD: u32 = 50;
/// User and group of the launcher and so of every tap, as in KubeVirt (`util.NonRootUID`).
pub const LAUNCHER_UID: u32 = 107;
/// The interface that the pod network's plugin makes; container runtimes always name it so.
pub const POD_INTERFACE: &str = "eth0";
/// Port of the launcher's health endpoint in the pod's network namespace; never passed to the guest.
pub const LAUNCHER_HEALTH_PORT: u16 = 49080;
/// Port kept for the launcher's mTLS endpoint; never passed to the guest.
pub const LAUNCHER_TLS_PORT: u16 = 49443;
