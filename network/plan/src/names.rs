//! Names and numbers that identify a tenant network and its devices. Only parsing and deriving; nothing is looked up.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What the kernel allows for a device name, without the closing zero (`IFNAMSIZ`, linux/if.h).
pub const MAX_DEVICE_NAME: usize = 15;
/// Every bridge of a tenant network on a node starts with this.
pub const BRIDGE_PREFIX: &str = "kn-b";
/// Every VXLAN device of a tenant network on a node starts with this.
pub const VXLAN_PREFIX: &str = "kn-x";
/// Every node-side end of a pod's cable starts with this.
pub const PORT_PREFIX: &str = "kn-v";
/// Bridges inside launcher pods start with this, as KubeVirt's do.
pub const POD_BRIDGE_PREFIX: &str = "k6t-";

/// Why a name or number was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A VNI outside 1..=16777215.
    #[error("VNI {0} is outside 1 to 16777215")]
    Vni(u32),
    /// A tap name that is not `tap` and a number of at most three digits.
    #[error("interface {0:?} is not named tap0 to tap999")]
    Tap(String),
    /// Not six bytes in hexadecimal.
    #[error("{0:?} is not a MAC address like 02:00:00:00:00:01")]
    Mac(String),
    /// A group or all-zero address, which no interface may have.
    #[error("{0} is not a unicast MAC address")]
    MacNotUnicast(String),
}

/// A VXLAN network identifier: 24 bits, never 0 (RFC 7348, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vni(u32);

impl Vni {
    /// The number on the wire.
    pub fn get(self) -> u32 {
        self.0
    }

    /// The tenant's bridge on a node.
    pub fn bridge(self) -> String {
        format!("{BRIDGE_PREFIX}{}", self.0)
    }

    /// The tenant's VXLAN device on a node.
    pub fn vxlan(self) -> String {
        format!("{VXLAN_PREFIX}{}", self.0)
    }

    /// The name of the NetworkAllocation that says whose this VNI is.
    pub fn allocation(self) -> String {
        format!("vni-{}", self.0)
    }

    /// The VNI of a bridge or VXLAN device name made by us; `None` for any other device.
    pub fn of_device(name: &str) -> Option<Self> {
        let digits = name
            .strip_prefix(BRIDGE_PREFIX)
            .or_else(|| name.strip_prefix(VXLAN_PREFIX))?;
        let vni: Self = digits.parse::<u32>().ok()?.try_into().ok()?;
        // "kn-b007" is not ours: the name must be the one we would give.
        (vni.0.to_string() == digits).then_some(vni)
    }
}

impl TryFrom<u32> for Vni {
    type Error = NameError;

    fn try_from(vni: u32) -> Result<Self, NameError> {
        if (1..1 << 24).contains(&vni) {
            Ok(Self(vni))
        } else {
            Err(NameError::Vni(vni))
        }
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> u32 {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Name of a tap in a launcher pod: `tap` and the index of the VMI's interface. A closed form, so that an attachment can
/// never name the pod's own `eth0` or `lo`, nor smuggle anything into a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TapName(String);

impl TapName {
    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The bridge beside the tap, inside the pod.
    pub fn bridge(&self) -> String {
        format!("{POD_BRIDGE_PREFIX}{}", self.0)
    }

    /// The pod's end of the cable to the node's bridge.
    pub fn cable(&self) -> String {
        format!("net-{}", self.0)
    }

    /// The nft table with the rules of this tap.
    pub fn table(&self) -> String {
        format!("kubernest-{}", self.0)
    }
}

impl TryFrom<String> for TapName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        let digits = name.strip_prefix("tap").unwrap_or_default();
        if matches!(digits.len(), 1..=3) && digits.bytes().all(|b| b.is_ascii_digit()) {
            Ok(Self(name))
        } else {
            Err(NameError::Tap(name))
        }
    }
}

impl FromStr for TapName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        name.to_owned().try_into()
    }
}

impl From<TapName> for String {
    fn from(name: TapName) -> String {
        name.0
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A unicast MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

impl Mac {
    /// The six bytes in the order of the wire.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for Mac {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let bad = || NameError::Mac(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split([':', '-']);
        for octet in &mut octets {
            let part = parts
                .next()
                .filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *octet = u8::from_str_radix(part.ok_or_else(bad)?, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        if octets[0] & 1 == 1 || octets == [0; 6] {
            return Err(NameError::MacNotUnicast(text.to_owned()));
        }
        Ok(Self(octets))
    }
}

impl TryFrom<String> for Mac {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The node's end of the cable to one interface of one pod sandbox: the same for the same pair on every call, so that DEL
/// finds it without any record.
pub fn node_port(container_id: &str, tap: &TapName) -> String {
    let hash = Sha256::new()
        .chain_update(container_id)
        .chain_update([0])
        .chain_update(tap.as_str())
        .finalize();
    let hex: String = hash.iter().take(5).map(|byte| format!("{byte:02x}")).collect();
    format!("{PORT_PREFIX}{hex}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plan_device_names_fit_the_kernel() {
        let vni = Vni::try_from((1 << 24) - 1).unwrap();
        let tap: TapName = "tap999".parse().unwrap();
        for name in [
            vni.bridge(),
            vni.vxlan(),
            tap.bridge(),
            tap.cable(),
            node_port("c", &tap),
        ] {
            assert!(name.len() <= MAX_DEVICE_NAME, "{name}");
        }
    }

    #[test]
    fn plan_vni_range() {
        assert_eq!(Vni::try_from(0), Err(NameError::Vni(0)));
        assert_eq!(Vni::try_from(1 << 24), Err(NameError::Vni(1 << 24)));
        assert_eq!(Vni::of_device("kn-b4097"), Vni::try_from(4097).ok());
        assert_eq!(Vni::of_device("kn-b04097"), None);
        assert_eq!(Vni::of_device("kn-v4097"), None);
        assert_eq!(Vni::of_device("eth0"), None);
    }

    #[test]
    fn plan_tap_names_are_a_closed_form() {
        for name in ["eth0", "tap", "tap0; flush ruleset", "tap1234", "lo", "tap-1", ""] {
            assert_eq!(name.parse::<TapName>(), Err(NameError::Tap(name.into())));
        }
    }

    #[test]
    fn plan_mac_refuses_what_no_interface_may_have() {
        assert_eq!(
            "02:00:10:01:00:0A".parse::<Mac>().unwrap().to_string(),
            "02:00:10:01:00:0a"
        );
        assert!(matches!(
            "ff:ff:ff:ff:ff:ff".parse::<Mac>(),
            Err(NameError::MacNotUnicast(_))
        ));
        assert!(matches!(
            "01:00:5e:00:00:01".parse::<Mac>(),
            Err(NameError::MacNotUnicast(_))
        ));
        for text in [
            "",
            "02:00",
            "02:00:00:00:00:00:00",
            "02:00:00:00:00:+1",
            "0200.0000.0001",
        ] {
            assert!(matches!(text.parse::<Mac>(), Err(NameError::Mac(_))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn plan_parsers_never_panic(text in ".{0,40}") {
            let _ = text.parse::<Mac>();
            let _ = text.parse::<TapName>();
            let _ = Vni::of_device(&text);
        }

        #[test]
        fn plan_mac_round_trips(octets in proptest::array::uniform6(0u8..)) {
            let mac = Mac([octets[0] & 0xfe | 2, octets[1], octets[2], octets[3], octets[4], octets[5]]);
            prop_assert_eq!(mac.to_string().parse::<Mac>(), Ok(mac));
        }
    }
}
