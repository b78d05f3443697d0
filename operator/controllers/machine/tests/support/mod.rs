//! What the stories stand on.

pub mod gate;
pub mod kubelet;
pub mod stage;
