//! Leader election on a coordination.k8s.io Lease, by client-go's rules (k8s.io/client-go tools/leaderelection): a lease
//! is judged by how long ago *we saw it change*, never by the times written in it, so clocks may differ or jump.
//!
//! It stops nobody: who loses the lease must exit, which the caller does when [`Leadership::lost`] returns.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, api::PostParams};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::telemetry::chain;

/// Which lease, who asks, and client-go's three durations.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Who we are; unique among the candidates.
    pub identity: String,
    /// How long others wait after the last change they saw.
    pub duration: Duration,
    /// How long a holder tries to renew before it gives up; below `duration`.
    pub renew_deadline: Duration,
    /// Time between attempts.
    pub retry_period: Duration,
}

impl Settings {
    /// client-go's defaults: 15 s, 10 s, 2 s.
    pub fn new(namespace: &str, name: &str, identity: String) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            identity,
            duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }
}

/// The lease is ours until it is released or lost.
#[derive(Debug)]
pub struct Leadership {
    lost: CancellationToken,
    stop: CancellationToken,
    renewing: JoinHandle<()>,
}

impl Leadership {
    /// Returns once the lease is lost: the process must then exit at once.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Gives the lease up, so that another candidate need not wait for it to run out. Call it after the controllers
    /// have stopped.
    pub async fn release(self) {
        self.stop.cancel();
        if let Err(error) = self.renewing.await {
            tracing::warn!(%error, "the lease's task ended badly");
        }
    }
}

/// Waits until the lease is ours, then keeps renewing it. `None` when `shutdown` came first.
pub async fn acquire(client: Client, settings: Settings, shutdown: &CancellationToken) -> Option<Leadership> {
    let mut candidate = Candidate {
        api: Api::namespaced(client, &settings.namespace),
        settings,
        seen: None,
    };
    tracing::info!(
        lease = candidate.settings.name,
        identity = candidate.settings.identity,
        "waits for the lease"
    );
    loop {
        let deadline = Instant::now() + candidate.settings.renew_deadline;
        match timeout_at(deadline, candidate.attempt()).await {
            Ok(Ok(true)) => break,
            Ok(Ok(false)) => {}
            Ok(Err(error)) => tracing::warn!(error = chain(&error), "cannot acquire the lease, tries again"),
            Err(_) => tracing::warn!("the API server did not answer about the lease in time, tries again"),
        }
        tokio::select! {
            () = shutdown.cancelled() => return None,
            () = sleep(candidate.settings.retry_period) => {}
        }
    }
    tracing::info!(lease = candidate.settings.name, "leads");
    let (lost, stop) = (CancellationToken::new(), CancellationToken::new());
    let renewing = tokio::spawn(hold(candidate, lost.clone(), stop.clone()));
    Some(Leadership { lost, stop, renewing })
}

async fn hold(mut candidate: Candidate, lost: CancellationToken, stop: CancellationToken) {
    let mut deadline = Instant::now() + candidate.settings.renew_deadline;
    loop {
        tokio::select! {
            () = stop.cancelled() => return candidate.release().await,
            () = sleep(candidate.settings.retry_period) => {}
        }
        let started = Instant::now();
        match timeout_at(deadline, candidate.attempt()).await {
            Ok(Ok(true)) => deadline = started + candidate.settings.renew_deadline,
            Ok(Ok(false)) => {
                tracing::error!("the lease was taken by another");
                return lost.cancel();
            }
            Ok(Err(error)) => tracing::warn!(error = chain(&error), "cannot renew the lease, tries again"),
            Err(_) => {}
        }
        if Instant::now() >= deadline {
            tracing::error!("the lease could not be renewed in time");
            return lost.cancel();
        }
    }
}

/// The Lease as last seen, and when (by our monotonic clock) it last changed.
#[derive(Clone, Debug)]
struct Seen {
    lease: Lease,
    at: Instant,
}

struct Candidate {
    api: Api<Lease>,
    settings: Settings,
    seen: Option<Seen>,
}

impl Candidate {
    /// One attempt to acquire or renew; whether the lease is ours now.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let current = self.api.get_opt(&self.settings.name).await?;
        self.seen = observe(self.seen.take(), current, Instant::now());
        let Some(wanted) = decide(self.seen.as_ref(), &self.settings, Instant::now(), Timestamp::now()) else {
            return Ok(false);
        };
        let written = match &self.seen {
            None => self.api.create(&PostParams::default(), &wanted).await,
            Some(_) => {
                self.api
                    .replace(&self.settings.name, &PostParams::default(), &wanted)
                    .await
            }
        };
        match written {
            Ok(lease) => {
                self.seen = Some(Seen {
                    lease,
                    at: Instant::now(),
                });
                Ok(true)
            }
            // Another wrote in between; whose it is shows at the next attempt.
            Err(kube::Error::Api(status)) if status.code == 409 && !self.was_ours() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn was_ours(&self) -> bool {
        self.seen
            .as_ref()
            .is_some_and(|seen| holder(&seen.lease) == Some(&self.settings.identity))
    }

    async fn release(self) {
        let Some(mut lease) = self.seen.map(|seen| seen.lease) else {
            return;
        };
        if let Some(spec) = lease.spec.as_mut() {
            spec.holder_identity = None;
            spec.lease_duration_seconds = Some(1);
            spec.renew_time = Some(MicroTime(Timestamp::now()));
        }
        let params = PostParams::default();
        let released = self.api.replace(&self.settings.name, &params, &lease);
        match tokio::time::timeout(self.settings.retry_period, released).await {
            Ok(Ok(_)) => tracing::info!(lease = self.settings.name, "released the lease"),
            Ok(Err(error)) => tracing::warn!(error = chain(&error), "cannot release the lease, it runs out by itself"),
            Err(_) => tracing::warn!("the API server did not answer in time, the lease runs out by itself"),
        }
    }
}

fn holder(lease: &Lease) -> Option<&String> {
    lease
        .spec
        .as_ref()?
        .holder_identity
        .as_ref()
        .filter(|holder| !holder.is_empty())
}

/// Keeps the time of the last change when the Lease is still the same version.
fn observe(seen: Option<Seen>, current: Option<Lease>, now: Instant) -> Option<Seen> {
    let lease = current?;
    match seen {
        Some(seen) if seen.lease.metadata.resource_version == lease.metadata.resource_version => Some(seen),
        _ => Some(Seen { lease, at: now }),
    }
}

/// The Lease to write in order to hold it; `None` while another holds it.
fn decide(seen: Option<&Seen>, settings: &Settings, now: Instant, time: Timestamp) -> Option<Lease> {
    let duration = i32::try_from(settings.duration.as_secs()).unwrap_or(i32::MAX);
    let acquired = |transitions: i32| LeaseSpec {
        holder_identity: Some(settings.identity.clone()),
        lease_duration_seconds: Some(duration),
        acquire_time: Some(MicroTime(time)),
        renew_time: Some(MicroTime(time)),
        lease_transitions: Some(transitions),
        ..LeaseSpec::default()
    };
    let Some(seen) = seen else {
        let metadata = ObjectMeta {
            namespace: Some(settings.namespace.clone()),
            name: Some(settings.name.clone()),
            ..ObjectMeta::default()
        };
        return Some(Lease {
            metadata,
            spec: Some(acquired(0)),
        });
    };
    let mut lease = seen.lease.clone();
    let spec = lease.spec.take().unwrap_or_default();
    let ours = holder(&seen.lease) == Some(&settings.identity);
    let valid_for = Duration::from_secs(u64::try_from(spec.lease_duration_seconds.unwrap_or(duration)).unwrap_or(0));
    if holder(&seen.lease).is_some() && !ours && now < seen.at + valid_for {
        return None;
    }
    lease.spec = Some(if ours {
        LeaseSpec {
            renew_time: Some(MicroTime(time)),
            lease_duration_seconds: Some(duration),
            ..spec
        }
    } else {
        acquired(spec.lease_transitions.unwrap_or(0).saturating_add(1))
    });
    Some(lease)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings::new("kubernest-system", "kubernest-operator", "me".to_owned())
    }

    fn held_by(who: &str, version: &str) -> Lease {
        Lease {
            metadata: ObjectMeta {
                resource_version: Some(version.to_owned()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(who.to_owned()),
                lease_duration_seconds: Some(15),
                // A clock that is years behind must not matter.
                renew_time: Some(MicroTime(Timestamp::UNIX_EPOCH)),
                lease_transitions: Some(3),
                ..LeaseSpec::default()
            }),
        }
    }

    #[test]
    fn lease_of_another_is_left_alone_until_it_did_not_change_for_its_duration() {
        let now = Instant::now();
        let seen = observe(None, Some(held_by("other", "1")), now);
        assert!(
            decide(
                seen.as_ref(),
                &settings(),
                now + Duration::from_secs(14),
                Timestamp::now()
            )
            .is_none()
        );
        let renewed = observe(seen.clone(), Some(held_by("other", "2")), now + Duration::from_secs(14));
        assert!(
            decide(
                renewed.as_ref(),
                &settings(),
                now + Duration::from_secs(20),
                Timestamp::now()
            )
            .is_none()
        );
        let unchanged = observe(seen, Some(held_by("other", "1")), now + Duration::from_secs(14));
        let taken = decide(
            unchanged.as_ref(),
            &settings(),
            now + Duration::from_secs(15),
            Timestamp::now(),
        )
        .unwrap();
        let spec = taken.spec.unwrap();
        assert_eq!(
            (spec.holder_identity.as_deref(), spec.lease_transitions),
            (Some("me"), Some(4))
        );
        assert_eq!(
            taken.metadata.resource_version.as_deref(),
            Some("1"),
            "the write must be conditional"
        );
    }

    #[test]
    fn lease_is_created_renewed_and_taken_when_released() {
        let now = Instant::now();
        let created = decide(None, &settings(), now, Timestamp::now()).unwrap();
        assert_eq!(created.metadata.name.as_deref(), Some("kubernest-operator"));
        let ours = observe(None, Some(held_by("me", "1")), now);
        let renewed = decide(ours.as_ref(), &settings(), now, Timestamp::now())
            .unwrap()
            .spec
            .unwrap();
        assert_eq!(renewed.lease_transitions, Some(3));
        assert_ne!(renewed.renew_time, Some(MicroTime(Timestamp::UNIX_EPOCH)));
        let released = observe(None, Some(held_by("", "1")), now);
        assert!(decide(released.as_ref(), &settings(), now, Timestamp::now()).is_some());
    }
}
