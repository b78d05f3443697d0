//! Asking an API server whether it is ready, in the same way wherever it runs.

use std::time::{Duration, Instant};

use kube::{Client, Config};

/// Between two questions: small against what is measured, and the same for both sides of a ratio.
const PAUSE: Duration = Duration::from_millis(250);
/// A server that is being started may take a connection and never answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Asks until the answer is "ok"; when that was.
pub async fn wait(config: Config) -> anyhow::Result<Instant> {
    let client = Client::try_from(config)?;
    loop {
        let question = http::Request::get("/readyz").body(Vec::new())?;
        if let Ok(Ok(_)) = tokio::time::timeout(PATIENCE, client.request_text(question)).await {
            return Ok(Instant::now());
        }
        tokio::time::sleep(PAUSE).await;
    }
}
