//! Events on objects, as `kubectl describe` shows them. The same event on the same object is sent once in ten minutes.
//!
//! Events are for people: a failure to send one is logged and never fails a reconcile.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use kube::{
    Client, Resource,
    runtime::events::{Event, EventType, Reporter},
};

use crate::telemetry::truncate;

/// An equal event within this time is not sent again.
pub const QUIET: Duration = Duration::from_secs(600);
/// Longest note that the events API takes, in bytes (k8s.io/kubernetes pkg/apis/core/validation/events.go).
const NOTE_BYTES: usize = 1024;

type Sent = HashMap<(String, String, String), Instant>;

/// Sends events in a controller's name. Clones share what they remember.
#[derive(Clone)]
pub struct Recorder {
    inner: kube::runtime::events::Recorder,
    sent: Arc<Mutex<Sent>>,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").finish_non_exhaustive()
    }
}

impl Recorder {
    /// A recorder that reports as `controller` (for example `kubernest-tenant`).
    pub fn new(client: Client, controller: &str) -> Self {
        let reporter = Reporter {
            controller: controller.to_owned(),
            instance: Some(crate::process::identity()),
        };
        Self {
            inner: kube::runtime::events::Recorder::new(client, reporter),
            sent: Arc::default(),
        }
    }

    /// Something took place. `reason` and `action` in PascalCase.
    pub async fn normal<K>(&self, object: &K, reason: &str, action: &str, note: &str)
    where
        K: Resource,
        K::DynamicType: Default,
    {
        self.publish(object, EventType::Normal, reason, action, note).await;
    }

    /// Something did not work; `note` says what and what to do about it.
    pub async fn warning<K>(&self, object: &K, reason: &str, action: &str, note: &str)
    where
        K: Resource,
        K::DynamicType: Default,
    {
        self.publish(object, EventType::Warning, reason, action, note).await;
    }

    async fn publish<K>(&self, object: &K, type_: EventType, reason: &str, action: &str, note: &str)
    where
        K: Resource,
        K::DynamicType: Default,
    {
        let uid = object.meta().uid.clone().unwrap_or_default();
        let note = truncate(note, NOTE_BYTES);
        if !self.is_news((uid, reason.to_owned(), note.to_owned()), Instant::now()) {
            return;
        }
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note.to_owned()),
            action: action.to_owned(),
            secondary: None,
        };
        if let Err(error) = self
            .inner
            .publish(&event, &object.object_ref(&K::DynamicType::default()))
            .await
        {
            tracing::warn!(reason, %error, "cannot send an event");
        }
    }

    fn is_news(&self, key: (String, String, String), now: Instant) -> bool {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.retain(|_, at| now.duration_since(*at) < QUIET);
        if sent.contains_key(&key) {
            return false;
        }
        sent.insert(key, now);
        true
    }
}
