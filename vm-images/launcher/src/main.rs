//! One pod, one libvirt domain. Everything it needs is in its environment. The kubelet runs it once more for a probe that
//! goes through the guest agent.

use std::process::ExitCode;

use clap::Parser;
use kubernest_domain::probe::is_asked;
use kubernest_launcher::agent::probe::Asked;
use kubernest_launcher::{Args, run};

fn main() -> ExitCode {
    if is_asked(std::env::args_os()) {
        return Asked::parse().run();
    }
    machine()
}

#[tokio::main(flavor = "current_thread")]
async fn machine() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_env_filter(tracing_subscriber::EnvFilter::new(&args.log_filter))
        .with_writer(std::io::stderr)
        .init();
    run(args).await
}
