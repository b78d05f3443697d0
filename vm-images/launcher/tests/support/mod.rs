//! What the launcher's tests share.

#![allow(dead_code, reason = "each test program uses its part")]

pub mod client;
pub mod pod;
