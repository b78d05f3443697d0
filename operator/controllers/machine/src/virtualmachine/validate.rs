//! Reads from a VirtualMachine what it wants, or says by field what is not supported. Pure.

use kubernest_crds::kubevirt::v1::{VirtualMachineSpec, run_strategy};

/// What a machine wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// An instance at all times.
    Always,
    /// No instance.
    Halted,
    /// An instance once; what becomes of it is not of interest.
    Once,
    /// An instance, and another whenever one fails.
    RerunOnFailure,
    /// An instance when somebody asks for one, until somebody asks for its end.
    Manual,
}

impl Strategy {
    /// The value of `spec.runStrategy`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Always => run_strategy::ALWAYS,
            Self::Halted => run_strategy::HALTED,
            Self::Once => run_strategy::ONCE,
            Self::RerunOnFailure => run_strategy::RERUN_ON_FAILURE,
            Self::Manual => run_strategy::MANUAL,
        }
    }
}

/// Why a machine is left as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// No strategy.
    #[error("spec.runStrategy: {0}: not supported, use Always, RerunOnFailure, Manual, Once or Halted")]
    Strategy(String),
    /// KubeVirt's sentence.
    #[error(
        "Running and RunStrategy are mutually exclusive. Note that Running is deprecated, please use RunStrategy instead"
    )]
    Both,
    /// KubeVirt's sentence.
    #[error("RunStrategy must be specified")]
    Neither,
}

/// The run strategy, `running` included.
///
/// # Errors
/// [`Obstacle`], when it cannot be told or is not supported.
pub fn strategy(spec: &VirtualMachineSpec) -> Result<Strategy, Obstacle> {
    match (spec.running, spec.run_strategy.as_deref()) {
        (Some(_), Some(_)) => Err(Obstacle::Both),
        (None, None) => Err(Obstacle::Neither),
        (Some(true), None) | (None, Some(run_strategy::ALWAYS)) => Ok(Strategy::Always),
        (Some(false), None) | (None, Some(run_strategy::HALTED)) => Ok(Strategy::Halted),
        (None, Some(run_strategy::ONCE)) => Ok(Strategy::Once),
        (None, Some(run_strategy::RERUN_ON_FAILURE)) => Ok(Strategy::RerunOnFailure),
        (None, Some(run_strategy::MANUAL)) => Ok(Strategy::Manual),
        (None, Some(other)) => Err(Obstacle::Strategy(other.to_owned())),
    }
}
