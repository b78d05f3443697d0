//! Answers of the guest agent (qemu's `qga/qapi-schema.json`) → what KubeVirt's API says of them. Pure.
//!
//! Everything in them is the guest's own word: texts are cut, lists are short, and no number is computed with.

use kubernest_domain::control::{
    GuestAgentCommand, GuestDisk, GuestFileSystem, GuestInterface, GuestOsInfo, GuestUser, guest_interfaces, guest_text,
};
use serde::Deserialize;

/// Most users, and most file systems.
const ITEMS: usize = 128;
/// Most commands of the agent; it has about 60.
const COMMANDS: usize = 256;
/// Most disks under one file system.
const DISKS: usize = 16;

/// The envelope of every answer.
#[derive(Debug, Deserialize)]
pub struct Return<T> {
    /// What it says.
    #[serde(rename = "return")]
    pub value: T,
}

fn or_nothing(told: Option<String>) -> String {
    told.as_deref().map(guest_text).unwrap_or_default()
}

/// `guest-info`.
#[derive(Debug, Deserialize)]
pub struct Agent {
    version: String,
    #[serde(default)]
    supported_commands: Vec<Command>,
}

#[derive(Debug, Deserialize)]
struct Command {
    name: String,
    #[serde(default)]
    enabled: bool,
}

impl Agent {
    /// Version and commands.
    pub fn told(self) -> (String, Vec<GuestAgentCommand>) {
        let command = |Command { name, enabled }| GuestAgentCommand {
            name: guest_text(&name),
            enabled,
        };
        let commands = self.supported_commands.into_iter().take(COMMANDS);
        (guest_text(&self.version), commands.map(command).collect())
    }
}

/// `guest-get-host-name`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Host {
    host_name: String,
}

impl Host {
    /// The name.
    pub fn told(self) -> String {
        guest_text(&self.host_name)
    }
}

/// `guest-get-osinfo`; a guest says as much as it likes.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Os {
    name: Option<String>,
    kernel_release: Option<String>,
    version: Option<String>,
    pretty_name: Option<String>,
    version_id: Option<String>,
    kernel_version: Option<String>,
    machine: Option<String>,
    id: Option<String>,
}

impl Os {
    /// As KubeVirt says it.
    pub fn told(self) -> GuestOsInfo {
        GuestOsInfo {
            name: or_nothing(self.name),
            kernel_release: or_nothing(self.kernel_release),
            version: or_nothing(self.version),
            pretty_name: or_nothing(self.pretty_name),
            version_id: or_nothing(self.version_id),
            kernel_version: or_nothing(self.kernel_version),
            machine: or_nothing(self.machine),
            id: or_nothing(self.id),
        }
    }
}

/// `guest-get-timezone`.
#[derive(Debug, Deserialize)]
pub struct Zone {
    zone: Option<String>,
    offset: i64,
}

impl Zone {
    /// Name and offset (KubeVirt's form).
    pub fn told(self) -> String {
        format!("{}, {}", or_nothing(self.zone), self.offset)
    }
}

/// Of `guest-get-users`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct User {
    user: String,
    domain: Option<String>,
    login_time: f64,
}

/// Who is logged in.
pub fn users(users: Vec<User>) -> Vec<GuestUser> {
    let told = |user: User| GuestUser {
        user_name: guest_text(&user.user),
        domain: or_nothing(user.domain),
        login_time: user.login_time,
    };
    users.into_iter().take(ITEMS).map(told).collect()
}

/// Of `guest-get-fsinfo`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileSystem {
    name: String,
    mountpoint: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    used_bytes: u64,
    #[serde(default)]
    total_bytes: u64,
    #[serde(default)]
    disk: Vec<Disk>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Disk {
    serial: Option<String>,
    bus_type: String,
}

/// What is mounted.
pub fn file_systems(all: Vec<FileSystem>) -> Vec<GuestFileSystem> {
    let disk = |disk: Disk| GuestDisk {
        serial: or_nothing(disk.serial),
        bus_type: guest_text(&disk.bus_type),
    };
    let told = |one: FileSystem| GuestFileSystem {
        disk_name: guest_text(&one.name),
        mount_point: guest_text(&one.mountpoint),
        file_system_type: guest_text(&one.kind),
        used_bytes: one.used_bytes,
        total_bytes: one.total_bytes,
        disk: one.disk.into_iter().take(DISKS).map(disk).collect(),
    };
    all.into_iter().take(ITEMS).map(told).collect()
}

/// Of `guest-network-get-interfaces`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Interface {
    name: String,
    #[serde(default)]
    hardware_address: String,
    #[serde(default)]
    ip_addresses: Vec<Address>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Address {
    ip_address: String,
}

/// What it is connected by.
pub fn interfaces(all: Vec<Interface>) -> Vec<GuestInterface> {
    let told = |one: Interface| GuestInterface {
        name: one.name,
        mac: one.hardware_address,
        addresses: one.ip_addresses.into_iter().map(|address| address.ip_address).collect(),
    };
    guest_interfaces(all.into_iter().map(told))
}

/// `guest-exec`.
#[derive(Debug, Deserialize)]
pub struct Started {
    /// Its process in the guest.
    pub pid: i64,
}

/// `guest-exec-status`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Run {
    /// It is over.
    pub exited: bool,
    /// Its code, if it was not ended by a signal.
    pub exitcode: Option<i32>,
    /// The signal that has ended it.
    pub signal: Option<i32>,
    /// What it has said, base64.
    #[serde(default)]
    pub out_data: String,
}

#[cfg(test)]
mod tests {
    use kubernest_domain::control::AGENT_TEXT_BYTES;
    use serde_json::{Value, from_value, json};

    use super::*;

    fn told<T: serde::de::DeserializeOwned>(value: Value) -> T {
        from_value::<Return<T>>(json!({"return": value})).unwrap().value
    }

    #[test]
    fn answers_are_told_as_kubevirt_tells_them() {
        let agent: Agent = told(json!({"version": "7.2.22", "supported_commands": [
            {"enabled": true, "name": "guest-ping", "success-response": true}, {"enabled": false, "name": "guest-exec"},
        ]}));
        let (version, commands) = agent.told();
        assert_eq!(
            (version.as_str(), serde_json::to_value(commands).unwrap()),
            (
                "7.2.22",
                json!([{"name": "guest-ping", "enabled": true}, {"name": "guest-exec"}])
            )
        );
        let os: Os = told(json!({"pretty-name": "Tiny", "kernel-release": "6.1", "id": "tiny", "variant": "x"}));
        assert_eq!(
            serde_json::to_value(os.told()).unwrap(),
            json!({"prettyName": "Tiny", "kernelRelease": "6.1", "id": "tiny"})
        );
        let zone: Zone = told(json!({"offset": -3600}));
        assert_eq!(zone.told(), ", -3600");
        let all: Vec<User> = told(json!([{"user": "root", "login-time": 1763769600.5}]));
        assert_eq!(
            serde_json::to_value(users(all)).unwrap(),
            json!([{"userName": "root", "loginTime": 1763769600.5}])
        );
        let all: Vec<FileSystem> = told(
            json!([{"name": "vda1", "mountpoint": "/", "type": "ext4", "used-bytes": 5,
            "total-bytes": 9, "disk": [{"serial": "data", "bus-type": "virtio", "bus": 0, "dev": "/dev/vda"}]}]),
        );
        assert_eq!(
            serde_json::to_value(file_systems(all)).unwrap(),
            json!([{"diskName": "vda1", "mountPoint": "/", "fileSystemType": "ext4", "usedBytes": 5, "totalBytes": 9,
                "disk": [{"serial": "data", "busType": "virtio"}]}])
        );
    }

    #[test]
    fn answers_tell_of_interfaces_that_others_reach() {
        let address = |address: &str| json!({"ip-address": address, "ip-address-type": "any", "prefix": 24});
        let all: Vec<Interface> = told(json!([
            {"name": "lo", "hardware-address": "00:00:00:00:00:00", "ip-addresses": [address("127.0.0.1")]},
            {"name": "eth0", "hardware-address": "02:00:10:01:00:0A", "statistics": {"rx-bytes": 1},
             "ip-addresses": [address("fe80::1"), address("fd00::5"), address("10.1.0.5"), address("no"), address("::1")]},
            {"name": "sit0"}, {"name": "bad", "hardware-address": "02:00:10:01:00"},
        ]));
        let eth0 = GuestInterface {
            name: "eth0".to_owned(),
            mac: "02:00:10:01:00:0a".to_owned(),
            addresses: vec!["10.1.0.5".to_owned(), "fd00::5".to_owned()],
        };
        assert_eq!(interfaces(all), [eth0]);
        let one = json!({"name": "\u{1b}".repeat(9) + &"e".repeat(900), "hardware-address": "02-00-10-01-00-0b",
            "ip-addresses": vec![address("10.1.0.5"); 20]});
        let cut = interfaces(told(json!(vec![one; 40])));
        assert_eq!((cut.len(), cut[0].addresses.len(), cut[0].name.len()), (16, 8, 64));
        assert!(serde_json::to_vec(&cut).unwrap().len() < 8 << 10);
    }

    #[test]
    fn answers_are_cut() {
        let long = "ö\u{1b}[2J".repeat(1000);
        let many: Vec<Value> = vec![json!({"user": long, "login-time": 0.0}); 1000];
        let users = users(told(json!(many)));
        assert_eq!(users.len(), ITEMS);
        assert!(users[0].user_name.len() <= AGENT_TEXT_BYTES && !users[0].user_name.contains('\u{1b}'));
        assert_eq!(guest_text("\u{0}a\nb"), "ab");
    }
}
