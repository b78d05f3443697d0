//! What DHCP tells a guest beyond its lease.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use kubernest_crds::kubevirt::v1::{DHCP_PRIVATE, DHCP_TOTAL_BYTES, DHCP_VALUE_BYTES, Interface};

use super::unsupported;
use crate::decision::Report;

/// Checks `dhcpOptions` of the interface at `at` in the spec at `f`.
pub fn check(report: &mut Report, f: &str, at: &str, interface: &Interface) {
    let Some(options) = &interface.dhcp_options else { return };
    let at = format!("{at}.dhcpOptions");
    if interface.bridge.is_some() {
        // Who is on the network's layer 2 asks that network's own DHCP server.
        unsupported(report, at.clone());
    }
    // KubeVirt names the whole spec for these two.
    let private = options.private_options.as_deref().unwrap_or_default();
    let numbers: BTreeSet<i32> = private.iter().map(|one| one.option).collect();
    if numbers.len() < private.len() {
        report.invalid(f, "Found Duplicates: you have provided duplicate DHCPPrivateOptions");
    }
    if numbers.iter().any(|number| !DHCP_PRIVATE.contains(number)) {
        let message = "provided DHCPPrivateOptions are out of range, must be in range 224 to 254";
        report.invalid(f, message);
    }
    for (index, server) in options.ntp_servers.iter().flatten().enumerate() {
        if server.parse::<Ipv4Addr>().is_err() {
            let message = "NTP servers must be a list of valid IPv4 addresses.";
            report.invalid(format!("{at}.ntpServers[{index}]"), message);
        }
    }
    // KubeVirt has no such rules; its server sends what no client can read.
    for (path, _) in options.texts().filter(|(_, text)| text.len() > DHCP_VALUE_BYTES) {
        let field = format!("{at}.{path}");
        let message = format!("{field} must not have more than {DHCP_VALUE_BYTES} bytes");
        report.invalid(field, message);
    }
    if options.bytes() > DHCP_TOTAL_BYTES {
        let message = format!("{at} must not take more than {DHCP_TOTAL_BYTES} bytes in an answer");
        report.invalid(at, message);
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::decision::kubevirt_style;

    const AT: &str = "spec.domain.devices.interfaces[1]";

    /// Fields and sentences; `[1]` in a field stands for the interface.
    #[rstest]
    #[case::good(json!({"bootFileName": "a", "tftpServerName": "b", "ntpServers": ["127.0.0.1"],
        "privateOptions": [{"option": 224, "value": "x"}, {"option": 254, "value": ""}]}), &[])]
    #[case::low(json!({"privateOptions": [{"option": 223, "value": "x"}]}),
        &[("spec", "provided DHCPPrivateOptions are out of range, must be in range 224 to 254")])]
    #[case::high(json!({"privateOptions": [{"option": 255, "value": "x"}]}),
        &[("spec", "provided DHCPPrivateOptions are out of range, must be in range 224 to 254")])]
    #[case::twice(json!({"privateOptions": [{"option": 240, "value": "x"}, {"option": 240, "value": "y"}]}),
        &[("spec", "Found Duplicates: you have provided duplicate DHCPPrivateOptions")])]
    #[case::servers(json!({"ntpServers": ["::1", "10.0.0.1", "hostname"]}), &[
        ("[1].dhcpOptions.ntpServers[0]", "NTP servers must be a list of valid IPv4 addresses."),
        ("[1].dhcpOptions.ntpServers[2]", "NTP servers must be a list of valid IPv4 addresses.")])]
    #[case::long(json!({"privateOptions": [{"option": 240, "value": "ä".repeat(128)}]}),
        &[("[1].dhcpOptions.privateOptions[0].value", "must not have more than 255 bytes")])]
    #[case::much(json!({"ntpServers": vec!["10.0.0.1"; 192]}),
        &[("[1].dhcpOptions", "must not take more than 768 bytes in an answer")])]
    fn admit_dhcp_options(#[case] options: Value, #[case] expected: &[(&str, &str)]) {
        let interface = json!({"name": "default", "masquerade": {}, "dhcpOptions": options});
        let mut report = Report::default();
        check(&mut report, "spec", AT, &serde_json::from_value(interface).unwrap());
        let causes = report.decide(kubevirt_style).causes;
        assert_eq!(causes.len(), expected.len(), "{causes:?}");
        for (cause, (field, message)) in causes.iter().zip(expected) {
            assert_eq!(cause.field, field.replace("[1]", AT));
            assert!(cause.message.ends_with(message), "{}", cause.message);
        }
    }

    #[test]
    fn admit_dhcp_options_behind_masquerade_only() {
        let interface = json!({"name": "default", "bridge": {}, "dhcpOptions": {"bootFileName": "a"}});
        let mut report = Report::default();
        check(&mut report, "spec", AT, &serde_json::from_value(interface).unwrap());
        let message = format!("{AT}.dhcpOptions: not supported");
        assert_eq!(report.decide(kubevirt_style).message, message);
    }
}
