//! A real outer Kubernetes cluster of N nodes on one machine: etcd, kube-apiserver, controller manager and scheduler, and
//! per node its own kernel namespaces, file systems, containerd, kubelet and kube-proxy; Multus, CoreDNS, local volumes.
//!
//! Used by tests (this library) and by people (the program `kubernest-testbed`). Nodes are process groups, not machines:
//! they share the kernel, /dev and /usr, so it deliberately does not test what needs a kernel per node.

pub mod bed;
mod boot;
pub mod cgroup;
pub mod clean;
pub mod cli;
pub mod client;
pub mod components;
pub mod config;
mod diagnose;
mod fault;
pub mod group;
pub mod hosts;
pub mod images;
mod mounts;
pub mod net;
pub mod oci;
pub mod pki;
pub mod plan;
pub mod progress;
mod recycle;
pub mod run;
pub mod spec;
pub mod state;
pub mod supervisor;

pub use bed::{Error, Options, Testbed};
pub use progress::Progress;
