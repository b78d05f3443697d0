//! Starts the node agent, or the guest of its accelerator probe.

use clap::Parser;
use kubernest_node::{accelerator, agent};

/// The node agent of Kubernest.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    args: agent::Args,
}

fn main() -> anyhow::Result<()> {
    if std::env::args().nth(1).as_deref() == Some(accelerator::PROBE_ARGUMENT) {
        accelerator::end_with_guest();
    }
    let cli = Cli::parse();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(agent::run(cli.args))
}
