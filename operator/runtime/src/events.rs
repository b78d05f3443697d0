//! Events on objects, as `kubectl describe` shows them. The same event on the same object is sent once in ten minutes; one
//! with another text is an event of its own, until there are many of them.
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
/// Notes of one reason that an object gets as events of their own within [`QUIET`]. Further ones are counted in the series of
/// one event, which keeps the text it began with: whatever changes all the time must not fill the outer cluster's etcd.
const NOTES: usize = 8;
/// Longest note that the events API takes, in bytes (k8s.io/kubernetes pkg/apis/core/validation/events.go).
const NOTE_BYTES: usize = 1024;

type Sent = HashMap<(String, String, String), Instant>;

/// Sends events in a controller's name. Clones share what they remember.
#[derive(Clone)]
pub struct Recorder {
    client: Client,
    reporter: Reporter,
    /// Sends what is over [`NOTES`].
    series: kube::runtime::events::Recorder,
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
            series: kube::runtime::events::Recorder::new(client.clone(), reporter.clone()),
            client,
            reporter,
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
        let recorder = match self.news((uid, reason.to_owned(), note.to_owned()), Instant::now()) {
            News::Known => return,
            // One that remembers no other event, to which it would add this one.
            News::New => kube::runtime::events::Recorder::new(self.client.clone(), self.reporter.clone()),
            News::OneOfMany => self.series.clone(),
        };
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note.to_owned()),
            action: action.to_owned(),
            secondary: None,
        };
        let reference = object.object_ref(&K::DynamicType::default());
        if let Err(error) = recorder.publish(&event, &reference).await {
            tracing::warn!(reason, %error, "cannot send an event");
        }
    }

    fn news(&self, key: (String, String, String), now: Instant) -> News {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.retain(|_, at| now.duration_since(*at) < QUIET);
        if sent.contains_key(&key) {
            return News::Known;
        }
        let same = sent.keys().filter(|(uid, reason, _)| (uid, reason) == (&key.0, &key.1));
        let news = if same.count() < NOTES {
            News::New
        } else {
            News::OneOfMany
        };
        sent.insert(key, now);
        news
    }
}

/// What an event is to those who read them.
#[derive(Debug, PartialEq)]
enum News {
    /// Its object has it.
    Known,
    /// An event of its own.
    New,
    /// One of many of its reason.
    OneOfMany,
}
