//! Reads from a set what it wants, or says what contradicts itself. Pure.

use kubernest_crds::kubevirt::v1::VirtualMachineInstanceReplicaSetSpec;
use kubernest_crds::{Selector, SelectorError};

/// What a set wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Goal {
    /// So many instances.
    pub replicas: usize,
    /// Which count.
    pub selector: Selector,
}

/// Why a set is left as it is. Admission refuses these; one that came around it must not make instances without end, or
/// take all that there are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// The selector means nothing.
    #[error("spec.selector: {0}")]
    Selector(SelectorError),
    /// Kubernetes' sentence.
    #[error("spec.selector: empty selector is invalid for a replica set")]
    Everything,
    /// A claim that all instances would write.
    #[error(
        "spec.template.spec.volumes: the instances would write to the claim of {0}; use ephemeral, or readOnly: true"
    )]
    Claim(String),
    /// Instances without labels.
    #[error("spec.template.metadata.labels: must not be empty")]
    NoLabels,
    /// KubeVirt's sentence.
    #[error("spec.selector: selector does not match labels.")]
    Mismatch,
}

/// What the set wants.
///
/// # Errors
/// [`Obstacle`], when its instances would not be told from others, or break each other's disk.
pub fn goal(spec: &VirtualMachineInstanceReplicaSetSpec) -> Result<Goal, Obstacle> {
    let selector = Selector::new(&spec.selector).map_err(Obstacle::Selector)?;
    if selector.is_empty() {
        return Err(Obstacle::Everything);
    }
    let mut volumes = spec.template.spec.volumes.iter().flatten();
    if let Some(volume) = volumes.find(|volume| volume.has_writable_claim()) {
        return Err(Obstacle::Claim(volume.name.clone()));
    }
    let labels = spec.template.metadata.as_ref().map(|metadata| &metadata.labels);
    let labels = labels.filter(|labels| !labels.is_empty()).ok_or(Obstacle::NoLabels)?;
    if !selector.matches(labels) {
        return Err(Obstacle::Mismatch);
    }
    let replicas = usize::try_from(spec.replicas).unwrap_or_default();
    Ok(Goal { replicas, selector })
}
