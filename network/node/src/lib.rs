//! The node agent: device plugin, accelerator probe, CNI server and the tenants' overlay on one node of the outer cluster.
//!
//! The only privileged part of Kubernest. It reads Nodes, NetworkAllocations and the outer API server's own addresses,
//! and writes nothing but labels and annotations of its own Node. It never opens a path inside a pod.

pub mod accelerator;
pub mod agent;
pub mod attach;
pub mod device;
pub mod install;
pub mod kubelet;
pub mod links;
pub mod metrics;
pub mod netns;
pub mod outer;
pub mod overlay;
pub mod records;
pub mod server;
pub mod tap;
