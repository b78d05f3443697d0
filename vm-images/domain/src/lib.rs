//! Pure half of a launcher: a VirtualMachineInstance becomes a libvirt domain and a list of files to prepare.
//!
//! `Launch` (what the machine controller asks) → [`plan::machine`] → [`machine::Machine`] → [`xml::domain`].
//! This crate does no I/O, knows no libvirt binding and no Kubernetes client. The machine controller takes
//! [`Launch`], [`paths`] and [`Termination`] from here, the launcher the rest.

pub mod control;
pub mod emulation;
pub mod fat;
pub mod launch;
pub mod machine;
pub mod paths;
pub mod plan;
pub mod probe;
pub mod processors;
pub mod termination;
pub mod xml;

pub use launch::{Accelerator, ClaimedVolume, LAUNCH_ENV, Launch, ParseLaunchError, TapInterface, TapKind, VolumeMode};
pub use termination::{Termination, TerminationReason};
