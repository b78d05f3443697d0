//! What DHCP tells a guest beyond its lease.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Numbers of options for private use that KubeVirt lets through (RFC 3942, section 4: 224 to 254).
pub const DHCP_PRIVATE: std::ops::RangeInclusive<i32> = 224..=254;
/// Most bytes of one option's value: its length is one byte (RFC 2132, section 2).
pub const DHCP_VALUE_BYTES: usize = 255;
/// Most bytes of all of them in an answer, so that it fits a frame: many clients, boot ROMs above all, put no fragments
/// together.
pub const DHCP_TOTAL_BYTES: usize = 768;

/// What DHCP tells a guest beyond its lease; masquerade only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DhcpOptions {
    /// Name of a boot file, option 67. At most 255 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_file_name: Option<String>,
    /// Name or address of the server that has it, option 66. At most 255 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tftp_server_name: Option<String>,
    /// IPv4 addresses of time servers, option 42.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ntp_servers: Option<Vec<String>>,
    /// Options for private use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_options: Option<Vec<DhcpPrivateOption>>,
}

/// An option for private use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DhcpPrivateOption {
    /// Number, 224 to 254.
    pub option: i32,
    /// Text. At most 255 bytes.
    pub value: String,
}

impl DhcpOptions {
    /// The texts with their paths below the options.
    pub fn texts(&self) -> impl Iterator<Item = (String, &str)> {
        let named = [
            ("bootFileName", &self.boot_file_name),
            ("tftpServerName", &self.tftp_server_name),
        ];
        let named = named
            .into_iter()
            .filter_map(|(name, text)| Some((name.to_owned(), text.as_deref()?)));
        let private = self.private_options.iter().flatten().enumerate();
        named.chain(private.map(|(index, one)| (format!("privateOptions[{index}].value"), one.value.as_str())))
    }

    /// Bytes that they take in an answer: each value with its number and length.
    pub fn bytes(&self) -> usize {
        let servers = self.ntp_servers.as_ref().map_or(0, |servers| 2 + 4 * servers.len());
        servers + self.texts().map(|(_, text)| 2 + text.len()).sum::<usize>()
    }
}
