//! Holds the shape of the repository: which crate may use which, and that every invariant names its test.
//!
//! It reads `cargo metadata`, ARCHITECTURE.md and the sources as text; it runs none of them.
