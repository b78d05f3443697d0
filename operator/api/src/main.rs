//! kubernest-api: admission webhooks, the aggregated API of virtual machines, and `admit`, which gives the same answers to files without a cluster.
//!
//! It keeps no state of its own; any number of replicas serve side by side.

mod admit;
mod args;
mod bodies;
mod bundles;
mod certificate;
mod convert;
mod presets;
mod review;
mod rotation;
mod routes;
mod serve;
mod subresources;
mod trust;

use clap::Parser;

fn main() -> anyhow::Result<std::process::ExitCode> {
    let args = args::Args::parse();
    kubernest_runtime::telemetry::init(args.log_format);
    match args.command {
        Some(args::Command::Admit(ref files)) => admit::run(&args.installation(), files),
        None => tokio::runtime::Runtime::new()?.block_on(serve::run(args)),
    }
}
