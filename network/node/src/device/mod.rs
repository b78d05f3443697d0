//! The kubelet's device plugin: offers `devices.kubevirt.io/tun` and, where it works, `devices.kubevirt.io/kvm`.
//!
//! A device here is a right to open a device node, so there are as many as a node can have pods of; they are not counted
//! or told apart. What a pod gets is a device node of our own that only the launcher's user may open.

mod api;
mod nodes;
mod plugin;

pub use api::{AllocateRequest, AllocateResponse, ContainerAllocateRequest, DeviceSpec, Empty, ListAndWatchResponse};
pub use nodes::{NodeError, make};
pub use plugin::{Plugin, PluginError};

/// Devices of each kind, as KubeVirt's default `maxDevices`.
pub const COUNT: usize = 1000;
/// KubeVirt's name of the right to open /dev/kvm.
pub const KVM: &str = "devices.kubevirt.io/kvm";
/// KubeVirt's name of the right to open /dev/net/tun.
pub const TUN: &str = "devices.kubevirt.io/tun";
/// Where the kubelet listens for plugins and plugins listen for the kubelet, whatever its `--root-dir` is.
pub const FOLDER: &str = "/var/lib/kubelet/device-plugins";
