//! API types of Kubernest: the tenant half (`kubernest.io`) and the supported subset of KubeVirt's API (`kubevirt.io`).
//!
//! One file per kind. Labels, annotations, finalizers, condition types and reasons stand as constants beside the kind
//! they belong to. This crate has no client and does no I/O; decisions live in the crates that use it.

// kube takes one `printcolumn(…)` attribute per column; clippy reads their repeated `type_` as a mistake.
#![allow(clippy::duplicated_attributes)]

pub mod kubevirt;
pub mod labels;
mod networkallocation;
pub mod quantity;
mod schema;
mod selector;
mod tenantcluster;

pub use networkallocation::{AllocationOwner, NetworkAllocation, NetworkAllocationSpec};
pub use schema::{all_crds, keep_unknown_fields};
pub use selector::{Selector, SelectorError};
pub use tenantcluster::{
    Access, CONTROL_PLANE_POOL, Certificate, Cni, ControlPlane, IngressRoute, Issuer, NodePool, Phase, Pki, Slot,
    SlotRole, Storage, TENANT_FINALIZER, Taint, TaintEffect, TenantCluster, TenantClusterSpec, TenantClusterStatus,
    TenantNetwork, conditions, reasons,
};
