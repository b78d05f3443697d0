//! kubernest-operator: runs the controllers of both halves. It decides nothing itself.

mod args;
mod operator;

use clap::Parser;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = args::Args::parse();
    kubernest_runtime::telemetry::init(args.log_format);
    operator::run(args).await
}
