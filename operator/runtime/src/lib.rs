//! What every Kubernest process on the outer cluster needs and no kind of ours is part of: logs, metrics and health,
//! server-side apply that is silent at rest, a controller loop with back-off, conditions, events, leader election.
//!
//! It deliberately knows no TenantCluster, VirtualMachine or launcher; the controllers bring their types.

pub mod apply;
pub mod backoff;
pub mod conditions;
pub mod controller;
pub mod events;
pub mod json;
pub mod lease;
pub mod metrics;
pub mod process;
pub mod server;
pub mod telemetry;

pub use apply::{Applier, ApplyError};
pub use controller::{Settings, StepError};
pub use metrics::{ControllerMetrics, Metrics};
pub use tokio_util::sync::CancellationToken;
