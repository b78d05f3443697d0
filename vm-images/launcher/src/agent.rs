//! The guest's agent (qemu-guest-agent): whether it is connected, and questions to it, which libvirt carries.
//!
//! ```text
//! kubernest-api ──► control port ──┐
//! kubelet ──► probe in the pod ────┼─► one question at a time ─► libvirt ─► the guest
//! on its own, now and then ────────┘
//! ```
//! A guest may answer anything, never, or endlessly. So there is one question at a time, each has a time, and of an
//! answer no more is looked at than [`ANSWER_BYTES`]; what libvirt itself reads is bounded too
//! ([`crate::hypervisor::Guest::ask_agent`]). Those of the control port, which users ask for, take turns before they
//! queue, so that a probe waits for one of them at most. Nothing of it decides about the domain.

mod answers;
pub mod probe;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kubernest_domain::control::{
    AGENT_WAIT, AgentState, GuestAgentInfo, GuestFileSystem, GuestInterface, GuestOsInfo, GuestUser, guest_text,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, oneshot, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::chain;
use crate::hypervisor::{Guest, HypervisorError};
use crate::queue::Queue;
use answers::Return;

/// Most bytes of an answer that are looked at.
const ANSWER_BYTES: usize = 256 << 10;
/// How long all questions of one request of the control port may take; less than its own limit of 15 s.
const REQUEST_LIMIT: Duration = Duration::from_secs(12);
/// How long the agent may take to tell the operating system, and as long for the interfaces.
const TELL_LIMIT: Duration = Duration::from_secs(5);
/// Time until it is asked again, as its guest may not have its addresses when it connects; doubled each time.
const LOOK: Duration = Duration::from_secs(5);
/// Most time until then: KubeVirt's for an operating system.
const LOOK_MAX: Duration = Duration::from_secs(120);
/// Least time between two states: a guest may open and close its channel all the time.
const PACE: Duration = Duration::from_secs(1);
/// Users and file systems in `guestosinfo` (KubeVirt's number).
const FEW: usize = 10;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The guest has not opened its end of the channel.
    #[error("the guest has no agent connected")]
    NotConnected,
    /// Others were asking all the time.
    #[error("the guest agent is busy with other questions")]
    Busy,
    /// It does not answer.
    #[error("the guest agent did not answer in time")]
    Slow,
    /// It says too much.
    #[error("the guest agent answered with more than {} KiB", ANSWER_BYTES >> 10)]
    TooLong,
    /// It says something else.
    #[error("the guest agent's answer is none to {question}")]
    Malformed {
        /// What was asked.
        question: &'static str,
        /// What was wrong.
        source: serde_json::Error,
    },
    /// libvirt.
    #[error(transparent)]
    Libvirt(#[from] HypervisorError),
}

impl AgentError {
    /// The agent is there and does not know such a question, or not in these words.
    fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Libvirt(HypervisorError::Agent(_)) | Self::Malformed { .. } | Self::TooLong
        )
    }
}

/// The agent of the one guest. Clones are the same.
#[derive(Clone, Debug)]
pub struct Agent(Arc<Inner>);

struct Inner {
    guest: OnceLock<Queue<Guest>>,
    /// Of whoever asks.
    turn: Arc<Semaphore>,
    /// Of those who ask through the control port.
    request: Semaphore,
    connected: watch::Receiver<bool>,
    state: watch::Sender<AgentState>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Agent {
    /// That of a guest that does not run yet; `connected` is libvirt's word.
    pub fn new(connected: watch::Receiver<bool>) -> Self {
        Self(Arc::new(Inner {
            guest: OnceLock::new(),
            turn: Arc::new(Semaphore::new(1)),
            request: Semaphore::new(1),
            connected,
            state: watch::Sender::default(),
        }))
    }

    /// The guest runs from now on.
    ///
    /// # Errors
    /// When no thread can be started for the questions to libvirt.
    pub(crate) fn attach(&self, guest: Guest) -> std::io::Result<()> {
        let queue = Queue::start("libvirt-agent", guest)?;
        // There is one domain in a launcher's life.
        let _ = self.0.guest.set(queue);
        tokio::spawn(self.clone().follow());
        Ok(())
    }

    /// Whether the guest has opened its end of the channel.
    pub fn is_connected(&self) -> bool {
        *self.0.connected.borrow()
    }

    /// Has libvirt make a call of its own to the agent, which may take as long as it likes: after the question that is
    /// under way, and nothing but questions waits for it.
    pub(crate) fn call(&self, call: impl FnOnce(&Guest) + Send + 'static) {
        if let Some(guest) = self.0.guest.get() {
            guest.call(call);
        }
    }

    /// Its state, as soon as it is another than that of the revision `seen`, or after [`AGENT_WAIT`].
    pub async fn news(&self, seen: Option<u64>) -> AgentState {
        let mut state = self.0.state.subscribe();
        let news = state.wait_for(|state| Some(state.revision) != seen);
        // An error would mean that the sender is gone, which `self` holds.
        let _ = timeout(AGENT_WAIT, news).await.is_ok();
        self.0.state.borrow().clone()
    }

    /// All that it tells.
    pub async fn info(&self) -> Result<GuestAgentInfo, AgentError> {
        let (by, _turn) = self.request().await?;
        let agent: answers::Agent = self.ask("guest-info", Value::Null, by).await?;
        let host: Option<answers::Host> = self.may_tell("guest-get-host-name", by).await?;
        let os: Option<answers::Os> = self.may_tell("guest-get-osinfo", by).await?;
        let zone: Option<answers::Zone> = self.may_tell("guest-get-timezone", by).await?;
        let users: Option<Vec<answers::User>> = self.may_tell("guest-get-users", by).await?;
        let disks: Option<Vec<answers::FileSystem>> = self.may_tell("guest-get-fsinfo", by).await?;
        let frozen: Option<String> = self.may_tell("guest-fsfreeze-status", by).await?;
        let (guest_agent_version, supported_commands) = agent.told();
        let mut info = GuestAgentInfo {
            guest_agent_version,
            supported_commands,
            hostname: host.map(answers::Host::told).unwrap_or_default(),
            os: os.map(answers::Os::told).unwrap_or_default(),
            timezone: zone.map(answers::Zone::told).unwrap_or_default(),
            user_list: answers::users(users.unwrap_or_default()),
            fs_freeze_status: frozen.as_deref().map(guest_text).unwrap_or_default(),
            ..GuestAgentInfo::default()
        };
        info.fs_info.disks = answers::file_systems(disks.unwrap_or_default());
        info.user_list.truncate(FEW);
        info.fs_info.disks.truncate(FEW);
        Ok(info)
    }

    /// Who is logged in.
    pub async fn users(&self) -> Result<Vec<GuestUser>, AgentError> {
        let (by, _turn) = self.request().await?;
        let users = self.ask("guest-get-users", Value::Null, by).await?;
        Ok(answers::users(users))
    }

    /// What is mounted.
    pub async fn file_systems(&self) -> Result<Vec<GuestFileSystem>, AgentError> {
        let (by, _turn) = self.request().await?;
        let disks = self.ask("guest-get-fsinfo", Value::Null, by).await?;
        Ok(answers::file_systems(disks))
    }

    /// The time and turn of a request of the control port.
    async fn request(&self) -> Result<(Instant, SemaphorePermit<'_>), AgentError> {
        let by = Instant::now() + REQUEST_LIMIT;
        let turn = timeout_at(by, self.0.request.acquire()).await;
        // Nobody closes the semaphore.
        let turn = turn.map_err(|_| AgentError::Busy)?.map_err(|_| AgentError::Busy)?;
        Ok((by, turn))
    }

    /// The answer to a question that not every agent knows.
    async fn may_tell<T: DeserializeOwned>(
        &self,
        question: &'static str,
        by: Instant,
    ) -> Result<Option<T>, AgentError> {
        match self.ask(question, Value::Null, by).await {
            Ok(told) => Ok(Some(told)),
            Err(error) if error.is_refusal() => {
                tracing::debug!(question, error = chain(&error), "the guest agent does not tell");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Asks one question, when it is its turn.
    async fn ask<T: DeserializeOwned>(
        &self,
        question: &'static str,
        arguments: Value,
        by: Instant,
    ) -> Result<T, AgentError> {
        let guest = self.0.guest.get().filter(|_| self.is_connected());
        let guest = guest.ok_or(AgentError::NotConnected)?;
        let turn = timeout_at(by, Arc::clone(&self.0.turn).acquire_owned()).await;
        // Nobody closes the semaphore.
        let turn: OwnedSemaphorePermit = turn.map_err(|_| AgentError::Busy)?.map_err(|_| AgentError::Busy)?;
        let mut command = json!({"execute": question});
        if !arguments.is_null() {
            command["arguments"] = arguments;
        }
        let (command, limit) = (command.to_string(), by.saturating_duration_since(Instant::now()));
        let (reply, answer) = oneshot::channel();
        guest.call(move |guest| {
            let said = guest.ask_agent(&command, limit);
            // The turn of one that libvirt has not come back from stays taken.
            drop(turn);
            // Who has asked may have gone.
            let _ = reply.send(said);
        });
        let said = timeout_at(by, answer).await.map_err(|_| AgentError::Slow)?;
        // The thread lives as long as the queue.
        let said = said.map_err(|_| AgentError::NotConnected)??;
        if said.len() > ANSWER_BYTES {
            return Err(AgentError::TooLong);
        }
        let told: Result<Return<T>, _> = serde_json::from_str(&said);
        told.map(|told| told.value)
            .map_err(|source| AgentError::Malformed { question, source })
    }

    /// Tells the state, with what the agent says of operating system and interfaces, for as long as the domain lives.
    async fn follow(self) {
        let mut connected = self.0.connected.clone();
        let (mut told, mut wait) = (Told::default(), LOOK);
        loop {
            let is = *connected.borrow_and_update();
            if is && let Err(error) = self.look(&mut told).await {
                tracing::info!(error = chain(&error), "the guest agent does not tell what it runs on");
            }
            // It may have gone while it was asked.
            self.tell(is && self.is_connected(), told.clone());
            sleep(PACE).await;
            tokio::select! {
                changed = connected.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    (told, wait) = (Told::default(), LOOK);
                }
                () = sleep(wait), if is => wait = LOOK_MAX.min(wait * 2),
            }
        }
    }

    /// Asks anew. What is not told, as by a guest that stands still, stays as it was told last.
    async fn look(&self, told: &mut Told) -> Result<(), AgentError> {
        let by = || Instant::now() + TELL_LIMIT;
        let os: Option<answers::Os> = self.may_tell("guest-get-osinfo", by()).await?;
        let interfaces: Option<Vec<answers::Interface>> = self.may_tell("guest-network-get-interfaces", by()).await?;
        told.os = os.map(answers::Os::told).or(told.os.take());
        if let Some(interfaces) = interfaces {
            told.interfaces = answers::interfaces(interfaces);
        }
        Ok(())
    }

    fn tell(&self, connected: bool, told: Told) {
        let told = if connected { told } else { Told::default() };
        self.0.state.send_if_modified(|state| {
            let known = state.os == told.os && state.interfaces == told.interfaces;
            let news = state.revision == 0 || state.connected != connected || !known;
            if news {
                let revision = state.revision + 1;
                tracing::info!(connected, ?told, "guest agent");
                *state = AgentState {
                    revision,
                    connected,
                    os: told.os,
                    interfaces: told.interfaces,
                };
            }
            news
        });
    }
}

/// What the agent has told since it connected.
#[derive(Clone, Debug, Default)]
struct Told {
    os: Option<GuestOsInfo>,
    interfaces: Vec<GuestInterface>,
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn agent_tells_what_is_new_only() {
        let (_libvirt, connected) = watch::channel(false);
        let agent = Agent::new(connected);
        assert_eq!(agent.news(None).await, AgentState::default());
        assert!(agent.news(Some(0)).now_or_never().is_none());
        let os = GuestOsInfo {
            id: "tiny".into(),
            ..GuestOsInfo::default()
        };
        let told = Told {
            os: Some(os.clone()),
            interfaces: Vec::new(),
        };
        agent.tell(true, told.clone());
        let state = agent.news(Some(0)).await;
        assert_eq!(
            (state.revision, state.connected, state.os.clone()),
            (1, true, Some(os.clone()))
        );
        agent.tell(true, told.clone());
        assert!(agent.news(Some(1)).now_or_never().is_none());
        let addressed = Told {
            interfaces: vec![GuestInterface::default()],
            ..told
        };
        agent.tell(true, addressed.clone());
        assert_eq!(agent.news(Some(1)).await.interfaces, addressed.interfaces);
        // Of one that is gone nothing is told.
        agent.tell(false, addressed);
        let state = agent.news(Some(2)).await;
        assert_eq!((state.revision, state.connected, state.os), (3, false, None));
        assert!(state.interfaces.is_empty());
    }

    #[tokio::test]
    async fn agent_that_is_not_connected_is_not_asked() {
        let (_libvirt, connected) = watch::channel(true);
        let agent = Agent::new(connected);
        // There is no domain yet.
        assert!(matches!(agent.info().await, Err(AgentError::NotConnected)));
    }
}
