//! Guest agents: what they answer, and the condition AgentConnected with `status.guestOSInfo` and what they tell of
//! `status.interfaces`.
//!
//! ```text
//! guest ─► libvirt ─► launcher ──answers when something is new──► every replica ──writes what differs──► status
//! ```
//! A replica holds one idle connection to each launcher whose guest runs, so that news take a moment and nothing is asked,
//! and nothing written, at rest. The replicas know nothing of each other: who comes second reads that it is written.
//! Not the operator does this, which may make pods and Secrets everywhere and so speaks to nothing that a guest can reach.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{ObjectMeta, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use kubernest_crds::kubevirt::v1::{
    InterfaceStatus, VirtualMachineInstance, VirtualMachineInstanceCondition as Condition, VirtualMachineInstanceSpec,
    VirtualMachineInstanceStatus, vmi_conditions,
};
use kubernest_domain::control::{
    self, AgentState, GuestAgentInfo, GuestFileSystem, GuestInterface, GuestList, GuestUser,
};
use kubernest_runtime::{CancellationToken, telemetry::chain};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::FIELD_MANAGER;
use super::answer::Failure;
use super::instance::runs;
use super::launcher::{LauncherError, Launchers, Line};
use super::machine::api;

/// How long a launcher may be silent; it answers after [`control::AGENT_WAIT`] even without news.
const LISTEN_LIMIT: Duration = Duration::from_secs(control::AGENT_WAIT.as_secs() + 30);
/// Connections that are being opened at once, and how long one may take: none shall keep the others waiting.
const OPENING: usize = 64;
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// Least time between two questions to one launcher, whatever it answers.
const BREATH: Duration = Duration::from_secs(1);
/// Time to the next attempt to reach a launcher, or to write; doubled each time.
const RETRY: Duration = Duration::from_secs(1);
/// Most time between two attempts.
const RETRY_MAX: Duration = Duration::from_secs(60);
/// How often a status is written anew because it has changed meanwhile.
const TRIES: usize = 5;
/// Least time between the first two writes of one instance; doubled while its guest goes on so.
const PACE: Duration = Duration::from_secs(2);
/// Most time between two writes.
const PACE_MAX: Duration = Duration::from_secs(60);
/// A guest that was quiet for so long may begin anew.
const QUIET: Duration = Duration::from_secs(300);

/// What the agent of an instance answers to a subresource.
///
/// # Errors
/// When the launcher does not tell.
pub async fn ask(
    launchers: &Launchers,
    instance: &VirtualMachineInstance,
    subresource: &str,
) -> Result<Result<Response, Failure>, LauncherError> {
    let answer = match subresource {
        "guestosinfo" => {
            let info: GuestAgentInfo = launchers.ask(instance, control::GUEST_INFO).await?;
            Json(info).into_response()
        }
        "userlist" => {
            let users: GuestList<GuestUser> = launchers.ask(instance, control::GUEST_USERS).await?;
            Json(users).into_response()
        }
        "filesystemlist" => {
            let mounted: GuestList<GuestFileSystem> = launchers.ask(instance, control::GUEST_FILE_SYSTEMS).await?;
            Json(mounted).into_response()
        }
        _ => return Ok(Err(Failure::no_such_path())),
    };
    Ok(Ok(answer))
}

/// What a launcher says, cut to what ours would say: somebody else's code may be in its place, and this goes into the status.
fn bounded(mut state: AgentState) -> AgentState {
    for text in state.os.iter_mut().flat_map(|os| {
        [
            &mut os.name,
            &mut os.kernel_release,
            &mut os.version,
            &mut os.pretty_name,
            &mut os.version_id,
            &mut os.kernel_version,
            &mut os.machine,
            &mut os.id,
        ]
    }) {
        *text = control::guest_text(text);
    }
    state.interfaces = control::guest_interfaces(state.interfaces);
    state
}

/// The instance's interfaces as its status has them, with what its guest says of each in place of what it said before. That
/// one on a bridge has an address only the guest knows; what reaches any other is its pod's.
fn interfaces(instance: &VirtualMachineInstance, state: &AgentState) -> Vec<InterfaceStatus> {
    let status = instance.status.iter().flat_map(|status| &status.interfaces);
    let told = |before: &InterfaceStatus| {
        let mut now = before.clone();
        let its = |one: &&GuestInterface| before.mac.as_ref() == Some(&one.mac);
        // A bridge inside the guest may have the same, and the address.
        let theirs = state
            .interfaces
            .iter()
            .filter(its)
            .min_by_key(|one| one.addresses.is_empty());
        now.set_told_by_agent(theirs.is_some());
        now.interface_name = theirs.map(|one| one.name.clone());
        if instance.spec.is_bridged(before.name.as_deref().unwrap_or_default()) {
            now.ip_addresses = theirs.map(|one| one.addresses.clone()).unwrap_or_default();
            now.ip_address = now.ip_addresses.first().cloned();
        }
        now
    };
    status.map(told).collect()
}

/// Whether its status says that its agent is connected.
pub fn is_connected(instance: &VirtualMachineInstance) -> bool {
    let conditions = instance.status.iter().flat_map(|status| &status.conditions);
    conditions
        .into_iter()
        .any(|condition| condition.type_ == vmi_conditions::AGENT_CONNECTED && condition.status == "True")
}

/// Whether its status says what its launcher says.
fn agrees(instance: &VirtualMachineInstance, state: &AgentState) -> bool {
    let told = instance
        .status
        .as_ref()
        .and_then(|status| status.guest_os_info.as_ref());
    let known = instance.status.iter().flat_map(|status| &status.interfaces);
    is_connected(instance) == state.connected && told == state.os.as_ref() && known.eq(&interfaces(instance, state))
}

/// Has its status say what the launcher says. Where there is no agent there is no condition: KubeVirt's clients look
/// for the condition, not for its status.
fn correct(instance: &mut VirtualMachineInstance, state: &AgentState, now: Timestamp) {
    let interfaces = interfaces(instance, state);
    let status = instance.status.get_or_insert_default();
    status.interfaces = interfaces;
    let is = |condition: &Condition| condition.type_ == vmi_conditions::AGENT_CONNECTED;
    let said = status
        .conditions
        .iter()
        .any(|condition| is(condition) && condition.status == "True");
    if said != state.connected {
        status.conditions.retain(|condition| !is(condition));
        if state.connected {
            status.conditions.push(Condition {
                type_: vmi_conditions::AGENT_CONNECTED.to_owned(),
                status: "True".to_owned(),
                last_probe_time: Some(Time(now)),
                last_transition_time: Some(Time(now)),
                reason: None,
                message: None,
            });
        }
    }
    status.guest_os_info.clone_from(&state.os);
}

/// What is known of an instance whose launcher can be listened to: who it is, where, its interfaces, and what its status
/// says of the agent.
fn heard(instance: &VirtualMachineInstance) -> Option<VirtualMachineInstance> {
    let status = instance.status.as_ref()?;
    let address = status.launcher_address.clone().filter(|_| runs(instance))?;
    let agent = |condition: &&Condition| condition.type_ == vmi_conditions::AGENT_CONNECTED;
    let mut spec = VirtualMachineInstanceSpec::default();
    spec.domain.devices.interfaces = instance.spec.domain.devices.interfaces.clone();
    Some(VirtualMachineInstance {
        metadata: ObjectMeta {
            name: instance.metadata.name.clone(),
            namespace: instance.metadata.namespace.clone(),
            uid: instance.metadata.uid.clone(),
            ..ObjectMeta::default()
        },
        status: Some(VirtualMachineInstanceStatus {
            launcher_address: Some(address),
            conditions: status.conditions.iter().filter(agent).cloned().collect(),
            guest_os_info: status.guest_os_info.clone(),
            interfaces: status.interfaces.clone(),
            ..VirtualMachineInstanceStatus::default()
        }),
        spec,
    })
}

/// Listens to all launchers whose guest runs, until shutdown.
pub async fn keep(client: Client, launchers: Launchers, shutdown: CancellationToken) {
    let events = watcher(
        Api::<VirtualMachineInstance>::all(client.clone()),
        watcher::Config::default(),
    );
    let mut events = std::pin::pin!(events.default_backoff());
    let mut listeners = Listeners {
        client,
        launchers,
        opening: Arc::new(Semaphore::new(OPENING)),
        known: HashMap::new(),
        listed: HashSet::new(),
        tasks: JoinSet::new(),
    };
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => return,
            // Who is done listening is forgotten at once.
            Some(_) = listeners.tasks.join_next() => continue,
            event = events.next() => event,
        };
        match event {
            Some(Ok(event)) => listeners.follow(event),
            Some(Err(error)) => tracing::warn!(
                error = chain(&error),
                "the watch of instances failed, it is begun again"
            ),
            None => return,
        }
    }
}

/// Who listens, by the instance's uid. A listener ends when its sender is dropped.
struct Listeners {
    client: Client,
    launchers: Launchers,
    opening: Arc<Semaphore>,
    known: HashMap<String, watch::Sender<VirtualMachineInstance>>,
    /// Those of a list that has not come to its end.
    listed: HashSet<String>,
    tasks: JoinSet<()>,
}

impl Listeners {
    fn follow(&mut self, event: watcher::Event<VirtualMachineInstance>) {
        match event {
            watcher::Event::Apply(instance) => self.note(&instance),
            watcher::Event::Delete(instance) => drop(self.known.remove(&instance.uid().unwrap_or_default())),
            watcher::Event::Init => self.listed.clear(),
            watcher::Event::InitApply(instance) => {
                self.listed.insert(instance.uid().unwrap_or_default());
                self.note(&instance);
            }
            // Some may have gone while nobody watched.
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                self.known.retain(|uid, _| listed.contains(uid));
            }
        }
    }

    fn note(&mut self, instance: &VirtualMachineInstance) {
        let uid = instance.uid().unwrap_or_default();
        let Some(heard) = heard(instance) else {
            self.known.remove(&uid);
            return;
        };
        if let Some(known) = self.known.get(&uid).filter(|known| !known.is_closed()) {
            known.send_if_modified(|known| {
                let news = *known != heard;
                *known = heard;
                news
            });
            return;
        }
        let (sender, latest) = watch::channel(heard);
        self.known.insert(uid, sender);
        self.tasks.spawn(
            Listener {
                client: self.client.clone(),
                launchers: self.launchers.clone(),
                opening: Arc::clone(&self.opening),
                latest,
                state: None,
                written: None,
            }
            .listen(),
        );
    }
}

/// Listens to one launcher.
struct Listener {
    client: Client,
    launchers: Launchers,
    opening: Arc<Semaphore>,
    latest: watch::Receiver<VirtualMachineInstance>,
    /// What the launcher has said.
    state: Option<AgentState>,
    /// When the last write was, and the time that the next must keep from it.
    written: Option<(Instant, Duration)>,
}

impl Listener {
    async fn listen(mut self) {
        let mut retry = RETRY;
        loop {
            let began = Instant::now();
            match self.hear().await {
                Ok(()) => return,
                Err(Trouble::Gone) => return,
                // One of an earlier version, which will never know; another launcher has another address.
                Err(Trouble::Launcher(LauncherError::Absent(_))) => match self.latest.changed().await {
                    Ok(()) => {}
                    Err(_) => return,
                },
                Err(Trouble::Launcher(error)) => {
                    tracing::debug!(error = chain(&error), "listening to a launcher");
                }
                Err(Trouble::Write(error)) => {
                    tracing::warn!(error = chain(&error), "writing what a guest agent tells");
                }
            }
            self.state = None;
            // One that answers once and hangs up is no better than one that does not answer.
            retry = if began.elapsed() > RETRY_MAX {
                RETRY
            } else {
                RETRY_MAX.min(retry * 2)
            };
            tokio::select! {
                () = sleep(retry) => {}
                () = gone(self.latest.clone()) => return,
            }
        }
    }

    /// Opens a connection and writes what comes, until something fails.
    async fn hear(&mut self) -> Result<(), Trouble> {
        let instance = self.latest.borrow_and_update().clone();
        let mut line = {
            // Nobody closes the semaphore.
            let Ok(_place) = self.opening.acquire().await else {
                return Ok(());
            };
            let opened = timeout(OPEN_LIMIT, self.launchers.line(&instance)).await;
            opened.unwrap_or(Err(LauncherError::Slow(OPEN_LIMIT)))?
        };
        loop {
            let next = Instant::now() + BREATH;
            let state = self.news(&mut line).await?;
            self.state = Some(bounded(state));
            if self.due().is_some_and(|due| due <= Instant::now()) {
                self.write().await?;
            }
            sleep_until(next).await;
        }
    }

    /// The launcher's next word. Meanwhile the status is kept to the last.
    async fn news(&mut self, line: &mut Line) -> Result<AgentState, Trouble> {
        let path = match &self.state {
            Some(state) => format!("{}?{}={}", control::AGENT, control::AGENT_SEEN, state.revision),
            None => control::AGENT.to_owned(),
        };
        let mut asked = std::pin::pin!(line.ask(&path, LISTEN_LIMIT, control::AGENT_STATE_BYTES));
        // From when on the status may be corrected; `None` once it was, until it is another.
        let mut from = Some(Instant::now());
        loop {
            let due = from.and_then(|from| Some(self.due()?.max(from)));
            tokio::select! {
                biased;
                state = &mut asked => return Ok(state?),
                changed = self.latest.changed() => {
                    changed.map_err(|_| Trouble::Gone)?;
                    if due.is_none() {
                        // Another replica may have written what our own line is about to say.
                        from = Some(Instant::now() + BREATH);
                    }
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    from = None;
                    self.write().await?;
                }
            }
        }
    }

    /// When the status may be written next; `None` if it says what the launcher has said.
    fn due(&self) -> Option<Instant> {
        let state = self.state.as_ref()?;
        let now = Instant::now();
        (!agrees(&self.latest.borrow(), state)).then(|| self.written.map_or(now, |(last, pace)| last + pace))
    }

    /// Writes what the launcher has said, if the status says something else.
    async fn write(&mut self) -> Result<(), Trouble> {
        let known = self.latest.borrow_and_update().clone();
        let Some(state) = self.state.clone() else { return Ok(()) };
        if correct_status(&self.client, &known, &state).await? {
            let pace = match self.written {
                Some((last, pace)) if last.elapsed() < QUIET => PACE_MAX.min(pace * 2),
                _ => PACE,
            };
            self.written = Some((Instant::now(), pace));
        }
        Ok(())
    }
}

/// Waits until nobody wants the instance listened to any more.
async fn gone(mut latest: watch::Receiver<VirtualMachineInstance>) {
    while latest.changed().await.is_ok() {}
}

#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("the instance does not run any more")]
    Gone,
    #[error(transparent)]
    Launcher(#[from] LauncherError),
    #[error(transparent)]
    Write(#[from] Box<kube::Error>),
}

/// Has the status say what the launcher says, if the instance is the same and still runs. Whether anything was written.
async fn correct_status(
    client: &Client,
    known: &VirtualMachineInstance,
    state: &AgentState,
) -> Result<bool, Box<kube::Error>> {
    let instances = api::<VirtualMachineInstance>(client, &known.namespace().unwrap_or_default());
    let params = PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    let mut tries = 1;
    loop {
        let Some(mut instance) = instances.get_opt(&known.name_any()).await.map_err(Box::new)? else {
            return Ok(false);
        };
        if instance.uid() != known.uid() || !runs(&instance) || agrees(&instance, state) {
            return Ok(false);
        }
        correct(&mut instance, state, Timestamp::now());
        match instances.replace_status(&known.name_any(), &params, &instance).await {
            Ok(_) => return Ok(true),
            Err(kube::Error::Api(answer)) if answer.code == 404 => return Ok(false),
            Err(kube::Error::Api(answer)) if answer.code == 409 && tries < TRIES => tries += 1,
            Err(error) => return Err(Box::new(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use kubernest_domain::control::GuestOsInfo;
    use serde_json::{Value, json};

    use super::*;

    fn instance(status: serde_json::Value) -> VirtualMachineInstance {
        let spec = json!({"domain": {"devices": {}}});
        serde_json::from_value(json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
            "metadata": {"name": "a", "namespace": "n", "uid": "u"}, "spec": spec, "status": status}))
        .unwrap()
    }

    #[test]
    fn agents_answers_take_little_more_memory_than_they_had_bytes() {
        let empty = r#"{"items": [{}, {}, {}]}"#;
        assert!(serde_json::from_str::<GuestList<GuestFileSystem>>(empty).is_err());
        assert!(serde_json::from_str::<GuestList<GuestUser>>(empty).is_err());
        let os = json!({"prettyName": "\u{1b}[2J".repeat(4000), "id": "tiny"});
        let said = serde_json::from_value(json!({"revision": 1, "connected": true, "os": os})).unwrap();
        let os = bounded(said).os.unwrap();
        assert_eq!((os.pretty_name.len(), &*os.id), (control::AGENT_TEXT_BYTES, "tiny"));
        assert!(os.pretty_name.starts_with("[2J[2J"));
    }

    #[test]
    fn agents_status_says_what_the_launcher_says() {
        let paused = json!({"type": "Paused", "status": "True"});
        let mut instance = instance(json!({"phase": "Running", "launcherAddress": "10.0.0.1", "conditions": [paused]}));
        let connected = AgentState {
            revision: 3,
            connected: true,
            os: Some(GuestOsInfo {
                id: "tiny".into(),
                ..GuestOsInfo::default()
            }),
            ..AgentState::default()
        };
        assert!(!agrees(&instance, &connected) && agrees(&instance, &AgentState::default()));
        correct(&mut instance, &connected, Timestamp::UNIX_EPOCH);
        assert!(agrees(&instance, &connected) && is_connected(&instance));
        let once = instance.clone();
        correct(&mut instance, &connected, Timestamp::now());
        assert_eq!(instance, once, "at rest nothing changes");
        let kept = heard(&instance).unwrap();
        assert!(agrees(&kept, &connected));
        correct(&mut instance, &AgentState::default(), Timestamp::now());
        let status = serde_json::to_value(instance.status.unwrap()).unwrap();
        assert_eq!(
            status,
            json!({"phase": "Running", "launcherAddress": "10.0.0.1", "conditions": [paused]})
        );
    }

    #[test]
    fn agents_name_interfaces_and_tell_the_addresses_of_bridged_ones() {
        let nic = |name: &str, mac: &str, address: Value| json!({"name": name, "mac": mac, "ipAddress": address, "ipAddresses": [address], "infoSource": "domain, multus-status"});
        let status = json!({"phase": "Running", "launcherAddress": "10.0.0.1", "interfaces": [
            nic("pod", "02:00:00:00:00:01", json!("10.0.0.1")), {"name": "lan", "mac": "02:00:00:00:00:02", "infoSource": "domain"},
        ]});
        let mut instance = instance(status);
        let devices = json!([{"name": "pod", "masquerade": {}}, {"name": "lan", "bridge": {}}]);
        instance.spec.domain.devices.interfaces = serde_json::from_value(devices).unwrap();
        let silent = instance.clone();
        let guest = |name: &str, mac: &str, addresses: &[&str]| GuestInterface {
            name: name.to_owned(),
            mac: mac.to_owned(),
            addresses: addresses.iter().map(ToString::to_string).collect(),
        };
        let state = bounded(AgentState {
            connected: true,
            interfaces: vec![
                guest("enp1s0", "02-00-00-00-00-01", &["10.0.2.2", "127.0.0.1"]),
                guest("enp2s0", "02:00:00:00:00:02", &[]),
                guest("br0", "02:00:00:00:00:02", &["192.168.7.9", "fd00::9"]),
            ],
            ..AgentState::default()
        });
        assert!(!agrees(&instance, &state));
        correct(&mut instance, &state, Timestamp::UNIX_EPOCH);
        assert!(agrees(&instance, &state) && agrees(&heard(&instance).unwrap(), &state));
        let told = serde_json::to_value(&instance.status.as_ref().unwrap().interfaces).unwrap();
        let expected = json!([
            {"name": "pod", "mac": "02:00:00:00:00:01", "ipAddress": "10.0.0.1", "ipAddresses": ["10.0.0.1"],
             "interfaceName": "enp1s0", "infoSource": "domain, guest-agent, multus-status"},
            {"name": "lan", "mac": "02:00:00:00:00:02", "ipAddress": "192.168.7.9", "interfaceName": "br0",
             "ipAddresses": ["192.168.7.9", "fd00::9"], "infoSource": "domain, guest-agent"},
        ]);
        assert_eq!(told, expected);
        correct(&mut instance, &AgentState::default(), Timestamp::UNIX_EPOCH);
        assert_eq!(instance, silent, "of one that is gone nothing stays");
    }

    #[test]
    fn agents_are_heard_of_guests_that_run_only() {
        assert!(heard(&instance(json!({"phase": "Running", "launcherAddress": "10.0.0.1"}))).is_some());
        for status in [
            json!({"phase": "Running"}),
            json!({"phase": "Scheduled", "launcherAddress": "10.0.0.1"}),
            json!({"phase": "Succeeded", "launcherAddress": "10.0.0.1"}),
        ] {
            assert!(heard(&instance(status.clone())).is_none(), "{status}");
        }
    }
}
