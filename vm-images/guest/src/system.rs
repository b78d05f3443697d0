//! Kernel settings that every Kubernetes node needs, whatever its version.
//!
//! Settings of a component belong to the bootstrap document.

use std::fs;
use std::path::PathBuf;

use crate::command::{self, CommandError};

/// Not loaded on demand by what uses them: kube-proxy's sysctls and NodePorts over bridges need `br_netfilter`.
const MODULES: [&str; 2] = ["overlay", "br_netfilter"];

/// What the kubelet (`protectKernelDefaults`, pkg/kubelet/cm/container_manager_linux.go), kube-proxy, and programs
/// that watch many files expect.
const SYSCTLS: [(&str, &str); 9] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/bridge/bridge-nf-call-iptables", "1"),
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("vm/max_map_count", "262144"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_user_watches", "524288"),
];

/// Why the kernel did not take a setting.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// modprobe failed.
    #[error("cannot load kernel modules")]
    Modules(#[source] CommandError),
    /// A sysctl was refused.
    #[error("cannot set {}", .path.display())]
    Sysctl {
        /// File below /proc/sys.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// Loads modules and sets sysctls.
pub fn prepare() -> Result<(), SystemError> {
    let mut args = vec!["-a", "-q"];
    args.extend(MODULES);
    command::run("modprobe", &args).map_err(SystemError::Modules)?;
    for (name, value) in SYSCTLS {
        let path = PathBuf::from("/proc/sys").join(name);
        fs::write(&path, value).map_err(|source| SystemError::Sysctl { path, source })?;
    }
    Ok(())
}

/// Sets the kernel's host name.
pub fn set_hostname(name: &str) -> Result<(), SystemError> {
    let path = PathBuf::from("/proc/sys/kernel/hostname");
    fs::write(&path, name).map_err(|source| SystemError::Sysctl { path, source })
}
