//! Subresources of a VirtualMachineInstance: its launcher is asked, or its ports are reached.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::{
    body::Bytes,
    extract::ws::WebSocketUpgrade,
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Api, Client, ResourceExt, api::PostParams};
use kubernest_crds::kubevirt::v1::{
    VirtualMachineInstance, VirtualMachineInstanceCondition as Condition, phase, vmi_conditions,
};
use kubernest_domain::{control, paths};
use serde::Deserialize;
use tokio::{
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::{
    FIELD_MANAGER, agents,
    answer::{Failure, Kind},
    launcher::{LauncherError, Launchers},
    lifecycle::is_dry_run,
    machine::{api, done, options},
    stream,
};

/// How often a condition is written anew because the status has changed meanwhile.
const TRIES: usize = 5;
/// What pause and softreboot say of a guest that does not run; all others say what the launcher says.
const NOT_RUNNING: &str = "VM is not running";
/// Query of `vnc/screenshot`, which KubeVirt 1.9 reads and forgets.
const MOVE_CURSOR: &str = "moveCursor";
/// How long a connection to a guest's port may take.
const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// Body of `pause` and `unpause`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PauseOptions {
    dry_run: Option<Vec<String>>,
}

/// The instance of a name, and how its launcher is reached.
pub struct Instances {
    api: Api<VirtualMachineInstance>,
    launchers: Launchers,
    name: String,
}

impl Instances {
    /// Of this name.
    pub fn new(client: &Client, launchers: &Launchers, namespace: &str, name: &str) -> Self {
        Self {
            api: api(client, namespace),
            launchers: launchers.clone(),
            name: name.to_owned(),
        }
    }

    /// Reads it.
    pub async fn get(&self) -> Result<VirtualMachineInstance, Failure> {
        let found = self.api.get_opt(&self.name).await;
        found
            .map_err(|error| Failure::internal("reading the instance", &error))?
            .ok_or_else(|| Failure::not_found(Kind::Instance, &self.name))
    }

    fn conflict(&self, why: &str) -> Failure {
        Failure::conflict(Kind::Instance, &self.name, why)
    }

    /// PUT `pause`.
    pub async fn pause(&self, body: &Bytes) -> Result<Response, Failure> {
        let (options, unknown) = options::<PauseOptions>(body)?;
        let dry_run = is_dry_run(options.dry_run.as_deref())?;
        let first = self.get().await?;
        if !runs(&first) {
            return Err(self.conflict(NOT_RUNNING));
        }
        // A ping is answered for a guest that is paused; other probes would have it stopped.
        let probe = first.spec.liveness_probe.as_ref();
        if probe.is_some_and(|probe| probe.guest_agent_ping.is_none()) {
            let why = "Pausing VMIs with a non-GuestAgentPing LivenessProbe is not supported";
            return Err(Failure::forbidden(Kind::Instance, &self.name, why));
        }
        if is_paused(&first) {
            return Err(self.conflict(control::ALREADY_PAUSED));
        }
        self.set_paused(first, true, dry_run).await?;
        Ok(done(StatusCode::OK, &unknown))
    }

    /// PUT `unpause`.
    pub async fn unpause(&self, body: &Bytes) -> Result<Response, Failure> {
        let (options, unknown) = options::<PauseOptions>(body)?;
        let dry_run = is_dry_run(options.dry_run.as_deref())?;
        let first = self.get().await?;
        self.set_paused(first, false, dry_run).await?;
        Ok(done(StatusCode::OK, &unknown))
    }

    /// Has the launcher do it, then writes the condition into the very status that was read before: whatever changed
    /// meanwhile makes both be done again, which changes nothing where it was done.
    async fn set_paused(&self, first: VirtualMachineInstance, paused: bool, dry_run: bool) -> Result<(), Failure> {
        let (command, done_before, not_running) = match paused {
            true => (control::PAUSE, control::ALREADY_PAUSED, NOT_RUNNING),
            false => (control::UNPAUSE, control::NOT_PAUSED, control::NOT_RUNNING),
        };
        let uid = first.uid();
        let (mut instance, mut asked) = (first, false);
        for _ in 0..TRIES {
            if !runs(&instance) || instance.uid() != uid {
                return Err(self.conflict(not_running));
            }
            if dry_run {
                return Ok(());
            }
            match self.launchers.command(&instance, command).await {
                // Done before, by a replica that died before it could say so. Only the launcher knows.
                Err(LauncherError::Refused(why)) if why == done_before => {
                    if is_paused(&instance) == paused && !asked {
                        return Err(self.conflict(done_before));
                    }
                }
                other => other.map_err(|error| error.failure(&instance))?,
            }
            asked = true;
            if is_paused(&instance) == paused || self.write_paused(&mut instance, paused).await? {
                return Ok(());
            }
            instance = self.get().await?;
        }
        Err(self.conflict("its status changes too often, try again"))
    }

    /// PUT `softreboot`.
    pub async fn soft_reboot(&self) -> Result<Response, Failure> {
        let instance = self.get().await?;
        if !runs(&instance) {
            return Err(self.conflict(NOT_RUNNING));
        }
        if is_paused(&instance) {
            return Err(self.conflict(control::PAUSED));
        }
        self.command(&instance, control::SOFT_REBOOT).await
    }

    /// PUT `reset`.
    pub async fn reset(&self) -> Result<Response, Failure> {
        let instance = self.get().await?;
        if !runs(&instance) {
            return Err(self.conflict(control::NOT_RUNNING));
        }
        self.command(&instance, control::RESET).await
    }

    async fn command(&self, instance: &VirtualMachineInstance, path: &str) -> Result<Response, Failure> {
        let done = self.launchers.command(instance, path).await;
        done.map_err(|error| error.failure(instance))?;
        Ok(StatusCode::OK.into_response())
    }

    /// GET `console`.
    pub async fn console(&self, upgrade: WebSocketUpgrade, held: impl Send + 'static) -> Result<Response, Failure> {
        let instance = self.get().await?;
        if instance.spec.domain.devices.autoattach_serial_console == Some(false) {
            return Err(Failure::bad_request("No serial consoles are present."));
        }
        if phase_of(&instance) == phase::FAILED {
            return Err(self.conflict("VMI is in failed status"));
        }
        self.streamed(&instance, control::CONSOLE, upgrade, held).await
    }

    /// GET `vnc`.
    pub async fn vnc(
        &self,
        query: Option<&str>,
        upgrade: WebSocketUpgrade,
        held: impl Send + 'static,
    ) -> Result<Response, Failure> {
        let instance = self.get_with_screen().await?;
        let preserve = query.is_some_and(|query| {
            query
                .split('&')
                .any(|pair| pair.split_once('=') == Some((control::PRESERVE_SESSION, "true")))
        });
        let path = match preserve {
            true => format!("{}?{}=true", control::VNC, control::PRESERVE_SESSION),
            false => control::VNC.to_owned(),
        };
        self.streamed(&instance, &path, upgrade, held).await
    }

    /// GET `vnc/screenshot`.
    pub async fn screenshot(&self, query: Option<&str>, held: impl Send + 'static) -> Result<Response, Failure> {
        if moves_cursor(query.unwrap_or_default()) {
            return Err(Failure::bad_request(format!("{MOVE_CURSOR}: not supported")));
        }
        let instance = self.get_with_screen().await?;
        if !runs(&instance) {
            return Err(Failure::bad_request(control::NOT_RUNNING));
        }
        let taken = self.launchers.screenshot(&instance).await;
        Ok(taken.map_err(|error| error.failure(&instance))?.answer(held))
    }

    async fn get_with_screen(&self) -> Result<VirtualMachineInstance, Failure> {
        let instance = self.get().await?;
        match instance.spec.domain.devices.autoattach_graphics_device {
            Some(false) => Err(Failure::bad_request("No graphics devices are present.")),
            _ => Ok(instance),
        }
    }

    async fn streamed(
        &self,
        instance: &VirtualMachineInstance,
        path: &str,
        upgrade: WebSocketUpgrade,
        held: impl Send + 'static,
    ) -> Result<Response, Failure> {
        if !runs(instance) {
            return Err(Failure::bad_request(control::NOT_RUNNING));
        }
        let opened = self.launchers.stream(instance, path).await;
        Ok(stream::answer(
            upgrade,
            opened.map_err(|error| error.failure(instance))?,
            held,
        ))
    }

    /// GET `portforward/{port}[/{protocol}]` of this instance.
    pub async fn port_forward(
        &self,
        instance: &VirtualMachineInstance,
        target: &Uri,
        upgrade: WebSocketUpgrade,
        held: impl Send + 'static,
    ) -> Result<Response, Failure> {
        let (port, protocol) = port_of(target.path())?;
        // The address of one that is over may be another pod's by now.
        if !runs(instance) {
            return Err(Failure::bad_request(control::NOT_RUNNING));
        }
        if is_paused(instance) {
            return Err(self.conflict(control::PAUSED));
        }
        let address = SocketAddr::new(address_of(instance)?, port);
        let dialed = |error: std::io::Error| Failure::internal("dialing VM", &error);
        match protocol {
            Protocol::Tcp => {
                let connected = timeout(DIAL_LIMIT, TcpStream::connect(address)).await;
                let connected = connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
                let connected = connected.map_err(dialed)?;
                stream::keep_alive(&connected).map_err(dialed)?;
                Ok(stream::answer(upgrade, connected, held))
            }
            Protocol::Udp => {
                let own: IpAddr = match address {
                    SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
                    SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
                };
                let socket = UdpSocket::bind((own, 0)).await.map_err(dialed)?;
                Ok(stream::answer_datagrams(upgrade, socket, address, held))
            }
        }
    }

    /// GET `guestosinfo`, `userlist`, `filesystemlist`: only a guest agent knows, and it is asked at once.
    pub async fn guest_agent(&self, subresource: &str) -> Result<Response, Failure> {
        let instance = self.get().await?;
        if !runs(&instance) {
            return Err(self.conflict(control::NOT_RUNNING));
        }
        if !agents::is_connected(&instance) {
            return Err(self.conflict(control::NO_AGENT));
        }
        let asked = agents::ask(&self.launchers, &instance, subresource).await;
        asked.unwrap_or_else(|error| Err(error.failure(&instance)))
    }

    /// Sets or clears the condition, which the operator carries on; false if the status is not what was read any more.
    async fn write_paused(&self, instance: &mut VirtualMachineInstance, paused: bool) -> Result<bool, Failure> {
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PostParams::default()
        };
        let status = instance.status.get_or_insert_default();
        status
            .conditions
            .retain(|condition| condition.type_ != vmi_conditions::PAUSED);
        if paused {
            status.conditions.push(paused_by_user());
        }
        match self.api.replace_status(&self.name, &params, instance).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => Ok(false),
            Err(error) => Err(Failure::internal("writing the condition Paused", &error)),
        }
    }
}

fn paused_by_user() -> Condition {
    Condition {
        type_: vmi_conditions::PAUSED.to_owned(),
        status: "True".to_owned(),
        last_probe_time: None,
        last_transition_time: Some(Time(Timestamp::now())),
        reason: Some("PausedByUser".to_owned()),
        message: Some("VMI was paused by user".to_owned()),
    }
}

fn phase_of(instance: &VirtualMachineInstance) -> &str {
    let status = instance.status.as_ref();
    status.and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// Whether its guest runs.
pub(super) fn runs(instance: &VirtualMachineInstance) -> bool {
    phase_of(instance) == phase::RUNNING
}

fn is_paused(instance: &VirtualMachineInstance) -> bool {
    let conditions = instance.status.iter().flat_map(|status| &status.conditions);
    conditions
        .into_iter()
        .any(|condition| condition.type_ == vmi_conditions::PAUSED && condition.status == "True")
}

/// Where the first interface is reached: at its pod, and nowhere else, whatever the status or its guest says.
fn address_of(instance: &VirtualMachineInstance) -> Result<IpAddr, Failure> {
    let first = instance.status.as_ref().and_then(|status| status.interfaces.first());
    let first = first.ok_or_else(|| Failure::bad_request("no network interfaces are present"))?;
    let bridged = instance.spec.is_bridged(first.name.as_deref().unwrap_or_default());
    let address = first.ip_address.as_deref().filter(|_| !bridged);
    let address = address.and_then(|address| address.parse().ok());
    address.filter(is_a_pods).ok_or_else(|| {
        let name = instance.name_any();
        Failure::bad_request(format!(
            "the first interface of {name} has no address that is reached from here"
        ))
    })
}

/// Whether a pod can have the address: none of this process's own machine, of a link, or of many.
fn is_a_pods(address: &IpAddr) -> bool {
    let of_a_link = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local() || address.to_ipv4_mapped().is_some(),
    };
    !(of_a_link || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

/// Whether a picture is wanted of a screen that was woken; anything but Go's words for false says so.
fn moves_cursor(query: &str) -> bool {
    let asked = query.split('&').filter_map(|pair| pair.split_once('='));
    asked
        .filter(|(name, _)| *name == MOVE_CURSOR)
        .any(|(_, value)| !matches!(value, "" | "0" | "f" | "F" | "false" | "FALSE" | "False"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

/// What stands behind `portforward/`.
fn port_of(path: &str) -> Result<(u16, Protocol), Failure> {
    let tail = path
        .rsplit_once("/portforward")
        .map(|(_, tail)| tail)
        .unwrap_or_default();
    let mut parts = tail.trim_start_matches('/').split('/');
    let port = parts.next().filter(|port| !port.is_empty());
    let port = port.ok_or_else(|| Failure::bad_request("port must not be empty"))?;
    let number = port.parse().ok().filter(|number| *number > 0);
    let number: u16 = number.ok_or_else(|| Failure::bad_request(format!("port {port:?}: must be 1 to 65535")))?;
    if [paths::HEALTH_PORT, paths::CONTROL_PORT].contains(&number) {
        let why = format!("port {number} is the launcher's own: nothing of the guest is reached there");
        return Err(Failure::bad_request(why));
    }
    let protocol = match (parts.next(), parts.next()) {
        (None | Some("tcp"), None) => Protocol::Tcp,
        (Some("udp"), None) => Protocol::Udp,
        (other, _) => {
            let other = other.unwrap_or_default();
            return Err(Failure::bad_request(format!("protocol {other:?}: must be tcp or udp")));
        }
    };
    Ok((number, protocol))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_addresses_are_those_of_pods() {
        let dialled = |address: &str| is_a_pods(&address.parse().unwrap());
        assert!(dialled("10.240.128.5") && dialled("fd00::5"));
        for wrong in [
            "127.0.0.1",
            "::1",
            "169.254.169.254",
            "0.0.0.0",
            "224.0.0.1",
            "fe80::1",
            "::ffff:127.0.0.1",
        ] {
            assert!(!dialled(wrong), "{wrong}");
        }
    }

    #[test]
    fn instance_addresses_are_not_what_a_guest_tells() {
        let reached = |binding: &str| {
            let instance: VirtualMachineInstance = serde_json::from_value(serde_json::json!({
                "metadata": {"name": "a"},
                "spec": {"domain": {"devices": {"interfaces": [{"name": "nic", (binding): {}}]}}},
                "status": {"interfaces": [{"name": "nic", "ipAddress": "10.240.128.5"}]},
            }))
            .unwrap();
            address_of(&instance).is_ok()
        };
        assert!(reached("masquerade") && !reached("bridge"));
    }

    #[test]
    fn instance_screens_are_not_woken() {
        assert!(moves_cursor("moveCursor=true") && moves_cursor("a=b&moveCursor=1"));
        assert!(!moves_cursor("") && !moves_cursor("moveCursor=false") && !moves_cursor("moveCursor"));
    }

    #[test]
    fn instance_ports_are_read_from_the_path() {
        let base = "/apis/g/v1/namespaces/n/virtualmachineinstances/a/portforward";
        let port = |tail: &str| port_of(&format!("{base}{tail}"));
        assert_eq!(port("/22").unwrap(), (22, Protocol::Tcp));
        assert_eq!(port("/53/udp").unwrap(), (53, Protocol::Udp));
        for wrong in ["", "/", "/0", "/65536", "/22/sctp", "/22/tcp/x", "/49443"] {
            assert_eq!(port(wrong).unwrap_err().code, StatusCode::BAD_REQUEST, "{wrong}");
        }
    }
}
