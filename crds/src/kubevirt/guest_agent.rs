//! What a guest agent says of its guest: answers of the subresources `guestosinfo`, `userlist` and `filesystemlist`, and
//! a part of an instance's status.
//!
//! All of it is the guest's own word, and its launcher's. What is always said is required, so that what is read takes little more
//! memory than what was sent.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A guest's operating system, as the agent's `guest-get-osinfo` tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GuestOsInfo {
    /// Name, for example `Debian GNU/Linux`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Release of the kernel.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kernel_release: String,
    /// Version.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// Name with version, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub pretty_name: String,
    /// Version, for programs.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub version_id: String,
    /// Version of the kernel.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kernel_version: String,
    /// Kind of processor, for example `x86_64`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub machine: String,
    /// Name, for programs.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
}

/// All that the agent tells (KubeVirt's `VirtualMachineInstanceGuestAgentInfo`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GuestAgentInfo {
    /// Version of the agent.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub guest_agent_version: String,
    /// Commands that it knows.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub supported_commands: Vec<GuestAgentCommand>,
    /// The guest's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    /// The operating system.
    pub os: GuestOsInfo,
    /// The time zone and its offset in seconds, for example `UTC, 0`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub timezone: String,
    /// The first ten who are logged in.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub user_list: Vec<GuestUser>,
    /// The first ten file systems.
    pub fs_info: GuestFileSystems,
    /// Whether the file systems stand still: `thawed` or `frozen`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fs_freeze_status: String,
}

/// A command of the agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAgentCommand {
    /// Its name.
    pub name: String,
    /// It may be used.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub enabled: bool,
}

/// Somebody who is logged in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestUser {
    /// Name.
    pub user_name: String,
    /// Domain, of Windows.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// When the first session began, in seconds since the epoch.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub login_time: f64,
}

fn is_zero(number: &f64) -> bool {
    *number == 0.0
}

/// File systems in [`GuestAgentInfo`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFileSystems {
    /// The file systems.
    pub disks: Vec<GuestFileSystem>,
}

/// A file system that is mounted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestFileSystem {
    /// Device in the guest.
    pub disk_name: String,
    /// Where it is mounted.
    pub mount_point: String,
    /// Its type.
    pub file_system_type: String,
    /// Bytes that are used.
    pub used_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Disks that it lies on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<GuestDisk>,
}

/// A disk under a file system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestDisk {
    /// Serial number.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub serial: String,
    /// Bus.
    pub bus_type: String,
}

/// A list of users or file systems, in the shape of a list of Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestList<T> {
    /// Nothing is ever in it.
    #[serde(default)]
    pub metadata: ListMetadata,
    /// What is listed.
    pub items: Vec<T>,
}

/// Metadata of a list that nothing continues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListMetadata {}

impl<T> From<Vec<T>> for GuestList<T> {
    fn from(items: Vec<T>) -> Self {
        Self {
            metadata: ListMetadata {},
            items,
        }
    }
}
