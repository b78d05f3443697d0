//! The program `kubernest-testbed`. It deliberately does nothing but read the command line: see [`kubernest_testbed::cli`].

use std::process::ExitCode;

use clap::Parser;
use kubernest_testbed::cli::Args;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match Args::parse().run().await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kubernest-testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
