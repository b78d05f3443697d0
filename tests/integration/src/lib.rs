//! A real etcd and kube-apiserver for integration tests: on loopback ports of their own, with a PKI of their own, gone
//! when the test ends. No kubelet, scheduler or controller manager runs: what they do, a test does or does without.
//!
//! Tests that need more raise a whole cluster with `kubernest-testbed`.

mod binaries;
mod control_plane;
mod crds;
mod process;
mod stream;

pub use binaries::{Binaries, BinaryError};
pub use control_plane::{ControlPlane, StartError};
pub use crds::{CrdError, install_crds};
pub use process::{Process, ProcessError, free_port, wait_until};
pub use stream::{PlainStream, StreamError};
