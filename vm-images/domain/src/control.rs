//! The launcher's control protocol: what its mTLS port offers to `kubernest-api`, and the names in both certificates.
//!
//! HTTP/1.1 over TLS on [`crate::paths::CONTROL_PORT`]. Streams are upgrades (RFC 9110, section 7.8) to
//! [`STREAM_PROTOCOL`]: after `101 Switching Protocols` raw bytes flow both ways until one side closes. Commands are PUT
//! without a body. Questions are GET, answered in JSON of at most [`ANSWER_BYTES`]. 200 is done; 409 with a sentence as plain text is refused because of the guest's state; other codes
//! are faults, with a sentence too.

use std::net::IpAddr;
use std::time::Duration;

pub use kubernest_crds::kubevirt::v1::{
    GuestAgentCommand, GuestAgentInfo, GuestDisk, GuestFileSystem, GuestList, GuestOsInfo, GuestUser,
};
use serde::{Deserialize, Serialize};

/// `Upgrade:` of the streams.
pub const STREAM_PROTOCOL: &str = "kubernest-stream";
/// GET, upgrade: the serial console. A newer session ends an older one.
pub const CONSOLE: &str = "/v1/console";
/// GET, upgrade: the screen, as RFB. A newer session ends an older one, unless it asks for [`PRESERVE_SESSION`].
pub const VNC: &str = "/v1/vnc";
/// Query of [`VNC`] (`preserveSession=true`): refused with 409 while another session is open.
pub const PRESERVE_SESSION: &str = "preserveSession";
/// GET: a picture of the screen, as PNG of at most [`SCREENSHOT_BYTES`], whose number `Content-Length` tells.
pub const SCREENSHOT: &str = "/v1/screenshot";
/// Largest picture.
pub const SCREENSHOT_BYTES: u64 = 16 << 20;
/// PUT: the guest's processors stand still.
pub const PAUSE: &str = "/v1/pause";
/// PUT: they go on.
pub const UNPAUSE: &str = "/v1/unpause";
/// PUT: the guest is asked to reboot, through its agent or by ACPI.
pub const SOFT_REBOOT: &str = "/v1/softreboot";
/// PUT: the guest is reset as by its button; nothing is asked. A paused one stays paused.
pub const RESET: &str = "/v1/reset";

/// GET: [`AgentState`] as soon as it is another than that of [`AGENT_SEEN`], or after [`AGENT_WAIT`].
pub const AGENT: &str = "/v1/agent";
/// Query of [`AGENT`] (`seen=3`): the revision that is known.
pub const AGENT_SEEN: &str = "seen";
/// How long an answer to [`AGENT`] waits for news.
pub const AGENT_WAIT: Duration = Duration::from_secs(300);
/// GET: all that the guest agent tells, `GuestAgentInfo`.
pub const GUEST_INFO: &str = "/v1/agent/info";
/// GET: who is logged in, a list of `GuestUser`.
pub const GUEST_USERS: &str = "/v1/agent/users";
/// GET: what is mounted, a list of `GuestFileSystem`.
pub const GUEST_FILE_SYSTEMS: &str = "/v1/agent/filesystems";
/// Most bytes of an answer in JSON.
pub const ANSWER_BYTES: usize = 256 << 10;
/// Most bytes of an [`AgentState`].
pub const AGENT_STATE_BYTES: usize = 32 << 10;
/// Most bytes of each text of a guest.
pub const AGENT_TEXT_BYTES: usize = 256;

/// A text of the guest, printable and short. The launcher cuts what the guest says, and its client what the launcher says,
/// which may be somebody else's code.
pub fn guest_text(text: &str) -> String {
    let mut text: String = text.chars().filter(|letter| !letter.is_control()).collect();
    text.truncate(text.floor_char_boundary(AGENT_TEXT_BYTES));
    text.shrink_to_fit();
    text
}

/// An interface as the guest has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GuestInterface {
    /// Its name there.
    pub name: String,
    /// Its MAC address.
    pub mac: String,
    /// Its addresses, those of IPv4 first.
    pub addresses: Vec<String>,
}

/// Most interfaces of a guest.
const INTERFACES: usize = 16;
/// Most addresses of each.
const ADDRESSES: usize = 8;
/// Most bytes of its name; Linux has 15.
const INTERFACE_NAME_BYTES: usize = 64;

/// What is taken of a guest's interfaces: those with a MAC address, and of their addresses those that others can use. Cut
/// by the launcher and by its client, as [`guest_text`].
pub fn guest_interfaces(all: impl IntoIterator<Item = GuestInterface>) -> Vec<GuestInterface> {
    let told = |one: GuestInterface| {
        let mac = mac_address(&one.mac)?;
        let mut name = guest_text(&one.name);
        name.truncate(name.floor_char_boundary(INTERFACE_NAME_BYTES));
        let addresses = one.addresses.iter().filter_map(|address| address.parse().ok());
        let mut addresses: Vec<IpAddr> = addresses.filter(is_of_use).take(ADDRESSES).collect();
        addresses.sort_by_key(IpAddr::is_ipv6);
        let addresses = addresses.iter().map(ToString::to_string).collect();
        Some(GuestInterface { name, mac, addresses })
    };
    all.into_iter().filter_map(told).take(INTERFACES).collect()
}

/// Six octets, however written; `None` for none at all, as of a loopback.
fn mac_address(text: &str) -> Option<String> {
    let octets = text.split([':', '-']).map(|octet| u8::from_str_radix(octet, 16).ok());
    let octets: [u8; 6] = octets.take(7).collect::<Option<Vec<u8>>>()?.try_into().ok()?;
    (octets != [0; 6]).then(|| octets.map(|octet| format!("{octet:02x}")).join(":"))
}

fn is_of_use(address: &IpAddr) -> bool {
    let of_a_link = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(of_a_link || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

/// Whether a guest agent is connected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentState {
    /// Counts what has changed in this launcher's life.
    pub revision: u64,
    /// The guest has opened its end of the channel.
    pub connected: bool,
    /// What it runs, if its agent has told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<GuestOsInfo>,
    /// Its interfaces, as its agent tells.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<GuestInterface>,
}

/// Files of the launcher's key pair, and of those that it lets in, below [`crate::paths::CONTROL_TLS`]; keys of the Secret.
pub mod files {
    /// The launcher's certificate, PEM.
    pub const CERTIFICATE: &str = "tls.crt";
    /// Its key, PEM.
    pub const KEY: &str = "tls.key";
    /// The CA that signs the other side's certificate, PEM.
    pub const CA: &str = "ca.crt";
}

/// DNS name in the certificate of the only client that a launcher serves.
pub const CLIENT_NAME: &str = "api.launcher.kubernest.io";

/// Conflict: asked to pause what is paused (KubeVirt's sentence).
pub const ALREADY_PAUSED: &str = "VMI is already paused";
/// Conflict: asked to go on with what is not paused (KubeVirt's sentence).
pub const NOT_PAUSED: &str = "VMI is not paused";
/// Conflict: asked of a guest that stands still (KubeVirt's sentence).
pub const PAUSED: &str = "VMI is paused";
/// Conflict: the guest does not run, or not any more (KubeVirt's sentence).
pub const NOT_RUNNING: &str = "VMI is not running";
/// Conflict: the guest has no way to be asked (KubeVirt's sentence).
pub const NO_ACPI: &str = "VMI neither have the agent connected nor the ACPI feature enabled";
/// Conflict: nobody in the guest can be asked (KubeVirt's sentence).
pub const NO_AGENT: &str = "VMI does not have guest agent connected";
/// Conflict: a command waits for libvirt; one is carried out at a time.
pub const BUSY: &str = "another command is being carried out";
/// Conflict: another session is open and shall stay.
pub const SESSION_OPEN: &str = "another VNC session is open";

/// DNS name in the certificate of the launcher that runs the instance of this uid.
pub fn server_name(uid: &str) -> String {
    format!("{uid}.launcher.kubernest.io")
}
