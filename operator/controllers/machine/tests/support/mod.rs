//! What the stories stand on.

pub mod control_plane;
pub mod gate;
pub mod kubelet;
