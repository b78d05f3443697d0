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
    FIELD_MANAGER,
    answer::{Failure, Kind},
    launcher::{LauncherError, Launchers},
    lifecycle::is_dry_run,
    machine::{api, options},
    stream,
};

/// How often a condition is written anew because the status has changed meanwhile.
const TRIES: usize = 5;
/// How long a connection to a guest's port may take.
const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// Body of `pause` and `unpause`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct PauseOptions {
    #[serde(rename = "apiVersion")]
    _api_version: Option<String>,
    #[serde(rename = "kind")]
    _kind: Option<String>,
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

    async fn get(&self) -> Result<VirtualMachineInstance, Failure> {
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
        let options: PauseOptions = options(body)?;
        let instance = self.get().await?;
        if !runs(&instance) {
            return Err(self.conflict("VM is not running"));
        }
        if instance.spec.liveness_probe.is_some() {
            let why = "Pausing VMIs with LivenessProbe is currently not supported";
            return Err(Failure::forbidden(Kind::Instance, &self.name, why));
        }
        if is_paused(&instance) {
            return Err(self.conflict(control::ALREADY_PAUSED));
        }
        if !is_dry_run(options.dry_run.as_deref())? {
            match self.launchers.command(&instance, control::PAUSE).await {
                // Paused before, by a replica that died before it could say so.
                Err(LauncherError::Refused(why)) if why == control::ALREADY_PAUSED => {}
                other => other.map_err(|error| error.failure(&instance))?,
            }
            self.set_paused(true).await?;
        }
        Ok(StatusCode::OK.into_response())
    }

    /// PUT `unpause`.
    pub async fn unpause(&self, body: &Bytes) -> Result<Response, Failure> {
        let options: PauseOptions = options(body)?;
        let instance = self.get().await?;
        if !runs(&instance) {
            return Err(self.conflict(control::NOT_RUNNING));
        }
        if !is_paused(&instance) {
            return Err(self.conflict(control::NOT_PAUSED));
        }
        if !is_dry_run(options.dry_run.as_deref())? {
            match self.launchers.command(&instance, control::UNPAUSE).await {
                Err(LauncherError::Refused(why)) if why == control::NOT_PAUSED => {}
                other => other.map_err(|error| error.failure(&instance))?,
            }
            self.set_paused(false).await?;
        }
        Ok(StatusCode::OK.into_response())
    }

    /// PUT `softreboot`.
    pub async fn soft_reboot(&self) -> Result<Response, Failure> {
        let instance = self.get().await?;
        if !runs(&instance) {
            return Err(self.conflict("VM is not running"));
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
        let instance = self.get().await?;
        if instance.spec.domain.devices.autoattach_graphics_device == Some(false) {
            return Err(Failure::bad_request("No graphics devices are present."));
        }
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

    /// GET `portforward/{port}[/{protocol}]`.
    pub async fn port_forward(
        &self,
        target: &Uri,
        upgrade: WebSocketUpgrade,
        held: impl Send + 'static,
    ) -> Result<Response, Failure> {
        let (port, protocol) = port_of(target.path())?;
        let instance = self.get().await?;
        if is_paused(&instance) {
            return Err(self.conflict(control::PAUSED));
        }
        let address = SocketAddr::new(address_of(&instance)?, port);
        let dialed = |error: std::io::Error| Failure::internal("dialing VM", &error);
        match protocol {
            Protocol::Tcp => {
                let connected = timeout(DIAL_LIMIT, TcpStream::connect(address)).await;
                let connected = connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
                let connected = connected.map_err(dialed)?;
                connected.set_nodelay(true).map_err(dialed)?;
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

    /// GET `guestosinfo`, `userlist`, `filesystemlist`: only a guest agent knows, and none is ever connected, as machines
    /// have no channel for one.
    pub async fn guest_agent(&self) -> Result<Response, Failure> {
        let instance = self.get().await?;
        if !runs(&instance) {
            return Err(self.conflict(control::NOT_RUNNING));
        }
        Err(self.conflict("VMI does not have guest agent connected"))
    }

    /// Sets or clears the condition; the operator carries it on.
    async fn set_paused(&self, paused: bool) -> Result<(), Failure> {
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PostParams::default()
        };
        let mut tries = 1;
        loop {
            let mut instance = self.get().await?;
            if is_paused(&instance) == paused {
                return Ok(());
            }
            let status = instance.status.get_or_insert_default();
            status
                .conditions
                .retain(|condition| condition.type_ != vmi_conditions::PAUSED);
            if paused {
                status.conditions.push(paused_by_user());
            }
            match self.api.replace_status(&self.name, &params, &instance).await {
                Ok(_) => return Ok(()),
                Err(kube::Error::Api(answer)) if answer.code == 409 && tries < TRIES => tries += 1,
                Err(error) => return Err(Failure::internal("writing the condition Paused", &error)),
            }
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

fn runs(instance: &VirtualMachineInstance) -> bool {
    phase_of(instance) == phase::RUNNING
}

fn is_paused(instance: &VirtualMachineInstance) -> bool {
    let conditions = instance.status.iter().flat_map(|status| &status.conditions);
    conditions
        .into_iter()
        .any(|condition| condition.type_ == vmi_conditions::PAUSED && condition.status == "True")
}

/// Where the first interface is reached.
fn address_of(instance: &VirtualMachineInstance) -> Result<IpAddr, Failure> {
    let first = instance.status.as_ref().and_then(|status| status.interfaces.first());
    let first = first.ok_or_else(|| Failure::bad_request("no network interfaces are present"))?;
    let address = first.ip_address.as_deref().and_then(|address| address.parse().ok());
    address.ok_or_else(|| {
        let name = instance.name_any();
        Failure::bad_request(format!("the first interface of {name} has no address that is known"))
    })
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
