//! Events on objects, as `kubectl describe` shows them. A complaint is sent once in ten minutes, a change of state each time.
//! One with another text is an event of its own, until there are many of them.
//!
//! Events are for people: a failure to send one is logged and never fails a reconcile.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use kube::{
    Client, Resource,
    runtime::events::{Event, EventType, Reporter},
};

use crate::telemetry::truncate;

/// An equal complaint within this time is not sent again.
pub const QUIET: Duration = Duration::from_secs(600);
/// Notes of one reason that an object gets as events of their own within [`QUIET`]. Further ones are counted in the series of
/// one event, which keeps the text it began with: whatever changes all the time must not fill the outer cluster's etcd.
const NOTES: usize = 8;
/// What is over this within [`QUIET`] is not sent at all, as client-go's spam filter does.
const MOST: usize = 64;
/// Longest note that the events API takes, in bytes (k8s.io/kubernetes pkg/apis/core/validation/events.go).
const NOTE_BYTES: usize = 1024;

/// Hashes of what was sent, and when, by object and reason.
type Sent = HashMap<(String, String), Vec<(Instant, u64)>>;

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
        self.publish(object, EventType::Normal, reason, action, note, false)
            .await;
    }

    /// A state was reached, or lost: news also in the same words as before.
    pub async fn transition<K>(&self, object: &K, reached: bool, reason: &str, action: &str, note: &str)
    where
        K: Resource,
        K::DynamicType: Default,
    {
        let type_ = if reached { EventType::Normal } else { EventType::Warning };
        self.publish(object, type_, reason, action, note, true).await;
    }

    /// Something did not work; `note` says what and what to do about it.
    pub async fn warning<K>(&self, object: &K, reason: &str, action: &str, note: &str)
    where
        K: Resource,
        K::DynamicType: Default,
    {
        self.publish(object, EventType::Warning, reason, action, note, false)
            .await;
    }

    async fn publish<K>(&self, object: &K, type_: EventType, reason: &str, action: &str, note: &str, again: bool)
    where
        K: Resource,
        K::DynamicType: Default,
    {
        let uid = object.meta().uid.clone().unwrap_or_default();
        let note = truncate(note, NOTE_BYTES);
        let recorder = match self.news((uid, reason.to_owned()), note, again, Instant::now()) {
            News::None => return,
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

    /// What an event is; `again` where one that was sent before is sent once more.
    fn news(&self, key: (String, String), note: &str, again: bool, now: Instant) -> News {
        let mut hasher = DefaultHasher::new();
        note.hash(&mut hasher);
        let note = hasher.finish();
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.retain(|_, notes| {
            notes.retain(|(at, _)| now.duration_since(*at) < QUIET);
            !notes.is_empty()
        });
        let notes = sent.entry(key).or_default();
        let known = notes.iter().any(|(_, one)| *one == note);
        if (known && !again) || notes.len() >= MOST {
            return News::None;
        }
        notes.push((now, note));
        if notes.len() <= NOTES {
            News::New
        } else {
            News::OneOfMany
        }
    }
}

/// What an event is to those who read them.
enum News {
    /// Its object has it, or has enough.
    None,
    /// An event of its own.
    New,
    /// One of many of its reason.
    OneOfMany,
}
