//! Rules of names, label keys and values, in the words of Kubernetes (apimachinery `pkg/util/validation/validation.go`),
//! since users know those.

/// Why `text` is no RFC 1123 label, if it isn't.
pub fn dns_label(text: &str) -> Option<String> {
    if text.len() > 63 {
        return Some("must be no more than 63 characters".to_owned());
    }
    (!is_dns_label(text)).then(|| {
        "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end \
         with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
         '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
            .to_owned()
    })
}

fn is_dns_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends = bytes.first().copied().is_some_and(inner) && bytes.last().copied().is_some_and(inner);
    ends && bytes.iter().all(|b| inner(*b) || *b == b'-')
}

/// Why `text` is no RFC 1123 subdomain, if it isn't.
pub fn dns_subdomain(text: &str) -> Option<String> {
    if text.len() > 253 {
        return Some("must be no more than 253 characters".to_owned());
    }
    (!text.split('.').all(is_dns_label)).then(|| {
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start \
         and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
         '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
            .to_owned()
    })
}

/// Why `text` is no RFC 1123 subdomain of labels of at most 63 characters, if it isn't.
pub fn dns_name(text: &str) -> Option<String> {
    if text.len() > 253 {
        return Some("must be no more than 253 characters".to_owned());
    }
    let valid = text.split('.').all(|label| label.len() <= 63 && is_dns_label(label));
    (!valid).then(|| {
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start \
         and end with an alphanumeric character (e.g. 'example.com')"
            .to_owned()
    })
}

/// Why `key` is no label or taint key, if it isn't.
pub fn label_key(key: &str) -> Option<String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if let Some(prefix) = prefix
        && let Some(why) = dns_name(prefix)
    {
        return Some(format!("prefix part {why}"));
    }
    if name.is_empty() {
        return Some("name part must be non-empty".to_owned());
    }
    if name.len() > 63 {
        return Some("name part must be no more than 63 characters".to_owned());
    }
    (!is_label_text(name)).then(|| {
        "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric \
         character (e.g. 'MyName',  or 'my.name',  or '123-abc')"
            .to_owned()
    })
}

/// Why `value` is no label or taint value, if it isn't.
pub fn label_value(value: &str) -> Option<String> {
    if value.len() > 63 {
        return Some("must be no more than 63 characters".to_owned());
    }
    (!value.is_empty() && !is_label_text(value)).then(|| {
        "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start \
         and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345')"
            .to_owned()
    })
}

fn is_label_text(text: &str) -> bool {
    let bytes = text.as_bytes();
    let end = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    end(bytes.first())
        && end(bytes.last())
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// Whether a kubelet may give itself this label: those of Kubernetes' own domains are reserved but for a few
/// (kubelet `pkg/apis/well_known_labels.go`).
pub fn kubelet_may_set(key: &str) -> bool {
    const ALLOWED_PREFIXES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];
    const ALLOWED: [&str; 8] = [
        "kubernetes.io/hostname",
        "kubernetes.io/arch",
        "kubernetes.io/os",
        "topology.kubernetes.io/region",
        "topology.kubernetes.io/zone",
        "failure-domain.beta.kubernetes.io/region",
        "failure-domain.beta.kubernetes.io/zone",
        "node.kubernetes.io/instance-type",
    ];
    let Some((prefix, _)) = key.split_once('/') else {
        return true;
    };
    let within = |domain: &str| prefix == domain || prefix.ends_with(&format!(".{domain}"));
    if !within("kubernetes.io") && !within("k8s.io") {
        return true;
    }
    ALLOWED.contains(&key) || ALLOWED_PREFIXES.into_iter().any(within)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("a", true)]
    #[case("a-1", true)]
    #[case("1a", true)]
    #[case("", false)]
    #[case("-a", false)]
    #[case("A", false)]
    #[case("a.b", false)]
    fn dns_label_rules(#[case] text: &str, #[case] valid: bool) {
        assert_eq!(dns_label(text).is_none(), valid);
    }

    #[rstest]
    #[case("example.com/zone", "a.b_c", true)]
    #[case("zone", "", true)]
    #[case("/zone", "a", false)]
    #[case("zone/", "a", false)]
    #[case("Example.com/zone", "a", false)]
    #[case("zone", "-a", false)]
    #[case("zone", "a b", false)]
    fn label_rules(#[case] key: &str, #[case] value: &str, #[case] valid: bool) {
        assert_eq!(label_key(key).is_none() && label_value(value).is_none(), valid);
    }

    #[rstest]
    #[case("team", true)]
    #[case("example.com/team", true)]
    #[case("node.kubernetes.io/team", true)]
    #[case("topology.kubernetes.io/zone", true)]
    #[case("node-role.kubernetes.io/control-plane", false)]
    #[case("kubernetes.io/team", false)]
    fn kubelet_label_rules(#[case] key: &str, #[case] allowed: bool) {
        assert_eq!(kubelet_may_set(key), allowed);
    }
}
