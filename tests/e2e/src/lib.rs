//! What the end-to-end stories share: the installed outer cluster, tenants and machines reached as users reach them, waiting on
//! conditions, and a list of all that a tenant may leave behind.
//!
//! The cluster is raised and Kubernest installed by `tests/tools/with-testbed`; this crate only uses it.

pub mod leftovers;
pub mod machine;
pub mod outer;
pub mod pods;
pub mod tenant;
pub mod wait;

pub use kubernest_integration::{PlainStream, StreamError};
pub use machine::Machine;
pub use outer::Outer;
pub use tenant::Tenant;
