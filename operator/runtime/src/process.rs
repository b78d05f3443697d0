//! The life of a process: a token that is cancelled on SIGTERM or SIGINT.
//!
//! It does not exit the process; the owner of the token returns from `main` once its tasks are done.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that is cancelled when the process is asked to stop.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn shutdown_token() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let cancel = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("asked to stop");
        cancel.cancel();
    });
    Ok(token)
}

/// Who this process is, for Leases and Events: the pod's name (`POD_NAME`), else the host name, with the process id so
/// that two processes on one host never share an identity.
pub fn identity() -> String {
    match std::env::var("POD_NAME") {
        Ok(pod) if !pod.is_empty() => pod,
        _ => {
            let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            format!("{}-{}", host.trim(), std::process::id())
        }
    }
}

/// The namespace that this process runs in: `POD_NAMESPACE`, else `fallback`.
pub fn namespace(fallback: &str) -> String {
    std::env::var("POD_NAMESPACE")
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| fallback.to_owned())
}
