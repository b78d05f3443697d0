//! Keeps a controller from deciding on a copy of an object that is older than its own last write to it.
//!
//! A watch lags behind the writes of its own process. Each write notes the resource version it produced; until the cache
//! has caught up, the object is left alone (the watch event that brings it up to date triggers the next reconcile).
//! Resource versions are compared as numbers, which Kubernetes guarantees since 1.35 (KEP-5504). An object that is
//! recreated under the same name has another uid and starts afresh.
//! Deliberately not here: any request, and anything about objects of other writers.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use kube::{Resource, ResourceExt};

/// The resource versions of our own last writes, by uid.
#[derive(Debug, Default)]
pub struct Freshness {
    written: Mutex<HashMap<String, u64>>,
}

impl Freshness {
    /// Notes the answer to one of our own writes.
    pub fn wrote<K: Resource>(&self, answer: &K) {
        if let (Some(uid), Some(version)) = (answer.uid(), version(answer)) {
            let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
            let newest = written.entry(uid).or_insert(version);
            *newest = version.max(*newest);
        }
    }

    /// Whether the cached copy is older than our last write. An object that has caught up is forgotten.
    pub fn is_stale<K: Resource>(&self, cached: &K) -> bool {
        let (Some(uid), Some(version)) = (cached.uid(), version(cached)) else {
            return false;
        };
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        match written.get(&uid) {
            Some(newest) if version < *newest => true,
            Some(_) => {
                written.remove(&uid);
                false
            }
            None => false,
        }
    }

    /// Forgets an object that is gone.
    pub fn forget<K: Resource>(&self, gone: &K) {
        if let Some(uid) = gone.uid() {
            self.written.lock().unwrap_or_else(PoisonError::into_inner).remove(&uid);
        }
    }
}

fn version<K: Resource>(object: &K) -> Option<u64> {
    object.resource_version()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::api::ObjectMeta;

    use super::*;

    fn object(uid: &str, version: &str) -> ConfigMap {
        ConfigMap {
            metadata: ObjectMeta {
                uid: Some(uid.into()),
                resource_version: Some(version.into()),
                ..ObjectMeta::default()
            },
            ..ConfigMap::default()
        }
    }

    #[test]
    fn freshness_holds_back_until_the_cache_has_our_write() {
        let freshness = Freshness::default();
        assert!(!freshness.is_stale(&object("a", "5")));
        freshness.wrote(&object("a", "10"));
        freshness.wrote(&object("a", "8"));
        assert!(freshness.is_stale(&object("a", "9")));
        assert!(!freshness.is_stale(&object("b", "1")), "another object of that name");
        assert!(!freshness.is_stale(&object("a", "10")));
        freshness.wrote(&object("a", "12"));
        freshness.forget(&object("a", "3"));
        assert!(!freshness.is_stale(&object("a", "3")));
    }
}
