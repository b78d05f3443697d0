//! Structured logs. One line an event on stderr, as JSON for machines or as text for people; `RUST_LOG` filters.
//!
//! It opens no trace exporter and never logs the content of Secrets: callers log names.

use std::error::Error;

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// One JSON object a line, span fields (controller, namespace, name) flattened into it.
    Json,
    /// Human-readable lines.
    Text,
}

/// What is logged when RUST_LOG says nothing else. kube's client logs every failed request as an error before its caller
/// has judged it; a tenant's API server that does not answer yet is no error. It warns with the whole of an answer that it
/// can't read, and its watcher with that of a refusal, however long: callers log both.
const DEFAULT_FILTER: &str = "info,kube_client=warn,kube_client::client=error,kube_client::client::tls=warn,\
    kube_client::client::builder=off,kube_runtime=warn,kube_runtime::watcher=error,tower=warn,hyper=warn";
/// Longest text of an error, in bytes: some sources repeat what others said.
const CHAIN_BYTES: usize = 4096;

/// Installs the process-wide subscriber. A second call is harmless and changes nothing.
pub fn init(format: Format) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let installed = match format {
        Format::Json => builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .try_init(),
        Format::Text => builder.try_init(),
    };
    if let Err(error) = installed {
        tracing::debug!(%error, "a log subscriber was installed before");
    }
}

/// An error and all its sources, joined by `: `, for a log line or a condition's message; the first 4 KiB.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    truncate(&words(error), CHAIN_BYTES).to_owned()
}

/// The whole chain. An API server's refusal is told in its own words: kube adds the debug text of the whole Status.
fn words(error: &(dyn Error + 'static)) -> String {
    if let Some(kube::Error::Api(status)) = error.downcast_ref() {
        return refusal(status);
    }
    let text = error.to_string();
    let Some(source) = error.source() else { return text };
    let (message, plain) = (source.to_string(), words(source));
    // Some libraries repeat their source in their own message; a reader wants it once.
    if !message.is_empty() && text.contains(&message) {
        text.replacen(&message, &plain, 1)
    } else if text.contains(&plain) {
        text
    } else {
        format!("{text}: {plain}")
    }
}

/// What an API server, or a proxy before it, answered instead of what was asked for.
pub fn refusal(status: &kube::core::Status) -> String {
    let said = status.message.trim();
    if said.starts_with('{') || said.starts_with('<') || said.is_empty() {
        // A document is for programs; kube gives it whole where it is no Status.
        return format!("HTTP status {} {}", status.code, status.reason)
            .trim_end()
            .to_owned();
    }
    said.to_owned()
}

/// The longest prefix of at most `bytes` bytes that ends between characters.
pub fn truncate(text: &str, bytes: usize) -> &str {
    if text.len() <= bytes {
        return text;
    }
    let end = (0..=bytes).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use super::*;

    #[test]
    fn truncate_ends_between_characters() {
        assert_eq!(truncate("äöü", 3), "ä");
        assert_eq!(truncate("abc", 3), "abc");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("cannot apply")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn chain_joins_sources_once() {
        let error = Outer(std::io::Error::other("disk full"));
        assert_eq!(chain(&error), "cannot apply: disk full");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("cannot watch: {0}")]
    struct Repeats(#[source] kube::Error);

    #[test]
    fn chain_tells_a_refusal_in_the_servers_words() {
        let refused = |message: &str, reason: &str| {
            let status = kube::core::Status::failure(message, reason).with_code(403);
            chain(&Repeats(kube::Error::Api(status.boxed())))
        };
        let text = refused("pods is forbidden: not yours", "Forbidden");
        assert_eq!(text, "cannot watch: pods is forbidden: not yours");
        let text = refused("{\"not\": \"a Status", "Failed to parse error data");
        assert_eq!(text, "cannot watch: HTTP status 403 Failed to parse error data");
    }

    #[test]
    fn chain_is_not_as_long_as_what_others_say() {
        let error = Outer(std::io::Error::other("ä".repeat(1_000_000)));
        let text = chain(&error);
        assert!(
            text.starts_with("cannot apply: ä") && text.len() <= CHAIN_BYTES,
            "{}",
            text.len()
        );
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(text)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn log_has_no_answer_as_a_whole() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new(DEFAULT_FILTER))
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(target: "kube_client::client", "the whole answer");
            tracing::warn!(target: "kube_runtime::watcher", "the whole refusal");
            tracing::warn!(target: "kube_client::client::tls", "the CA bundle");
            tracing::warn!(target: "kube_runtime::controller", "a controller");
        });
        let said = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(!said.contains("whole"), "{said}");
        assert!(
            said.contains("the CA bundle") && said.contains("a controller"),
            "{said}"
        );
    }
}
