//! cloud-init data: one source of user data, at most one of network data, inline data small enough for the object.

use kubernest_crds::kubevirt::v1::CloudInitSource;

use crate::decision::Report;

/// Most inline bytes (KubeVirt: larger data belongs into a Secret).
const INLINE_BYTES: usize = 2048;

/// Checks the source at `at`; `kind` is its field's name.
pub fn check(report: &mut Report, at: &str, kind: &str, source: &CloudInitSource) {
    let user = [source.user_data.as_deref(), source.user_data_base64.as_deref()];
    // One without a name is none.
    let user_secret = source.secret_ref.as_ref().is_some_and(|secret| !secret.name.is_empty());
    let network_secret = source.network_data_secret_ref.as_ref();
    let network_secret = network_secret.is_some_and(|secret| !secret.name.is_empty());
    let user_sources = set(user) + usize::from(user_secret);
    let network = [source.network_data.as_deref(), source.network_data_base64.as_deref()];
    let network_sources = set(network) + usize::from(network_secret);
    if user_sources > 1 {
        report.invalid(at, format!("{at} must have only one userdatasource set."));
    }
    if network_sources > 1 {
        report.invalid(at, format!("{at} must have only one networkdata source set."));
    }
    if user_sources + network_sources == 0 {
        report.invalid(
            at,
            format!("{at} must have at least one userdatasource or one networkdatasource set."),
        );
    }
    data(report, at, kind, "userData", "userdata", "UserDataSecretRef", user);
    data(
        report,
        at,
        kind,
        "networkData",
        "networkdata",
        "NetworkDataSecretRef",
        network,
    );
}

fn set(sources: [Option<&str>; 2]) -> usize {
    sources
        .iter()
        .filter(|source| source.is_some_and(|text| !text.is_empty()))
        .count()
}

fn data(report: &mut Report, at: &str, kind: &str, field: &str, word: &str, secret: &str, sources: [Option<&str>; 2]) {
    let [plain, encoded] = sources.map(|source| source.unwrap_or_default());
    let decoded = decoded_length(encoded);
    if decoded.is_none() {
        // KubeVirt repeats the source's name in the sentence; clients know it so.
        let message = format!("{at}.{field}Base64.{kind}.{field}Base64 is not a valid base64 value.");
        report.invalid(format!("{at}.{field}Base64"), message);
    }
    if plain.len() > INLINE_BYTES || decoded.unwrap_or(0) > INLINE_BYTES {
        report.invalid(
            at,
            format!("{at} {word} exceeds {INLINE_BYTES} byte limit. Should use {secret} for larger data."),
        );
    }
}

/// How many bytes standard base64 text stands for; `None` when it is none (RFC 4648 section 4; line breaks are skipped
/// as Go's decoder does).
fn decoded_length(text: &str) -> Option<usize> {
    let digits: Vec<u8> = text.bytes().filter(|b| !matches!(b, b'\r' | b'\n')).collect();
    let padding = digits.iter().rev().take_while(|b| **b == b'=').count();
    let body = &digits[..digits.len() - padding];
    let valid = body
        .iter()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/'));
    (valid && padding <= 2 && digits.len().is_multiple_of(4)).then(|| digits.len() / 4 * 3 - padding)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoded_length_follows_rfc_4648() {
        assert_eq!(decoded_length("aGk="), Some(2));
        assert_eq!(decoded_length(""), Some(0));
        assert_eq!(decoded_length("aGk"), None);
        assert_eq!(decoded_length("a*k="), None);
    }
}
