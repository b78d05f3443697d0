//! One pod, one libvirt domain. The container's only process of ours; everything it needs is in its environment.

use std::process::ExitCode;

use clap::Parser;
use kubernest_launcher::{Args, run};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_env_filter(tracing_subscriber::EnvFilter::new(&args.log_filter))
        .with_writer(std::io::stderr)
        .init();
    run(args).await
}
