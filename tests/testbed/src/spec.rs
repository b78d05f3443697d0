//! What a group of processes is: the document that `up` writes and the supervisor ([`crate::supervisor`]) carries out.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// One group: the control plane, or one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The name in the group's UTS namespace.
    pub hostname: String,
    /// The bed's directory.
    pub bed: PathBuf,
    /// A node's own /etc, /opt, /run and /var come from here; the control plane has none.
    pub root: Option<PathBuf>,
    /// The PATH of all tasks.
    pub path: String,
    /// Programs that are kept running.
    pub tasks: Vec<Task>,
    /// The kubeconfig with which released PersistentVolumes are emptied and made available again.
    pub recycler: Option<PathBuf>,
}

/// One program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its short name.
    pub name: String,
    /// Its command line.
    pub argv: Vec<String>,
    /// The file that takes what it writes.
    pub log: PathBuf,
    /// What must answer before it starts.
    pub after: Option<After>,
}

/// Something that must accept connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum After {
    /// A TCP port.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}
