//! How long to wait before an object that failed is reconciled again: exponential per object, capped, forgotten on
//! success, and never shorter than a Retry-After that the API server gave.
//!
//! It keeps no timers; the controller loop does.

use std::{
    collections::HashMap,
    error::Error,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Delay after the first failure.
pub const FIRST: Duration = Duration::from_millis(500);
/// Longest delay between attempts (before Retry-After is considered).
pub const CAP: Duration = Duration::from_secs(60);

/// Failures in a row by object.
#[derive(Debug)]
pub struct Failures<Key> {
    count: Mutex<HashMap<Key, u32>>,
}

impl<Key> Default for Failures<Key> {
    fn default() -> Self {
        Self {
            count: Mutex::default(),
        }
    }
}

impl<Key: Hash + Eq + Clone> Failures<Key> {
    /// Counts a failure of `key` and returns how long to wait.
    pub fn failed(&self, key: &Key, retry_after: Option<Duration>) -> Duration {
        let mut counts = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(key.clone()).or_insert(0);
        *count = count.saturating_add(1);
        delay(key, *count).max(retry_after.unwrap_or_default())
    }

    /// Forgets the failures of `key`.
    pub fn succeeded(&self, key: &Key) {
        self.count.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// How many objects wait for a retry.
    pub fn len(&self) -> usize {
        self.count.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether no object waits for a retry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Delay after the `failures`-th failure in a row: doubling from [`FIRST`] to [`CAP`], shortened by up to a fifth in a
/// way that differs by object, so that many objects that failed together do not come back together.
fn delay<Key: Hash>(key: &Key, failures: u32) -> Duration {
    let doubled = FIRST
        .saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX))
        .min(CAP);
    let mut hasher = DefaultHasher::new();
    (key, failures).hash(&mut hasher);
    let shorten = (hasher.finish() % 200) as u32;
    doubled.saturating_sub(doubled.saturating_mul(shorten) / 1000)
}

/// The Retry-After that the API server asked for, wherever in the chain of sources its answer is.
pub fn retry_after(error: &(dyn Error + 'static)) -> Option<Duration> {
    let mut next = Some(error);
    while let Some(current) = next {
        if let Some(kube::Error::Api(status)) = current.downcast_ref::<kube::Error>() {
            let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
            return (seconds > 0).then(|| Duration::from_secs(seconds.into()));
        }
        next = current.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_to_its_cap_and_forgets() {
        let failures = Failures::default();
        let first = failures.failed(&"a", None);
        assert!(first <= FIRST && first >= FIRST * 8 / 10);
        for _ in 0..40 {
            failures.failed(&"a", None);
        }
        let capped = failures.failed(&"a", None);
        assert!(capped <= CAP && capped >= CAP * 8 / 10, "{capped:?}");
        failures.succeeded(&"a");
        assert!(failures.is_empty());
        assert!(failures.failed(&"a", None) <= FIRST);
    }

    #[test]
    fn backoff_honours_retry_after() {
        let failures = Failures::default();
        assert_eq!(
            failures.failed(&"a", Some(Duration::from_secs(300))),
            Duration::from_secs(300)
        );
        let status: kube::core::Status = serde_json::from_value(
            serde_json::json!({"status": "Failure", "code": 429, "details": {"retryAfterSeconds": 7}}),
        )
        .unwrap();
        assert_eq!(
            retry_after(&kube::Error::Api(status.boxed())),
            Some(Duration::from_secs(7))
        );
    }
}
