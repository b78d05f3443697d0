//! Pure half of a launcher: a VirtualMachineInstance becomes a libvirt domain and a list of files to prepare.
//!
//! This crate does no I/O, knows no libvirt binding and no Kubernetes client. The machine controller takes
//! [`Launch`], [`paths`] and [`Termination`] from here, the launcher the rest.

pub mod launch;
pub mod paths;
pub mod termination;

pub use launch::{Accelerator, ClaimedVolume, LAUNCH_ENV, Launch, TapInterface, TapKind, VolumeMode};
pub use termination::{Termination, TerminationReason};
