//! `kubernest-guest`: makes a booted node image into the node that its bootstrap share describes.
//!
//! It mounts the share, sets names and addresses, prepares the data disk, writes files, starts systemd units in order
//! and keeps all of that up to date while the share changes. It is no Kubernetes client, knows no Kubernetes version,
//! and decides nothing that the document could say.

mod agent;
mod cni;
mod command;
mod console;
mod disk;
mod files;
mod network;
mod power;
mod probe;
mod share;
mod store;
mod system;
mod units;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    agent::run(agent::Args::parse())
}
