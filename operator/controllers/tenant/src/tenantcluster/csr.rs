//! Which certificate requests of a tenant's kubelets are signed. Pure: `signer.rs` carries it out.
//!
//! Requests for other signers, and of machines that are no slot (yet), are left alone.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kubernest_pki::{LEAF_VALIDITY, Leaf, San, SigningRequest};

use super::build::pki::{BOOTSTRAP_GROUP, bootstrap_user};

/// Signer of kubelets' client certificates (k8s.io/api/certificates/v1).
const CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// Signer of kubelets' serving certificates.
const SERVING: &str = "kubernetes.io/kubelet-serving";
/// Prefix of nodes' user names.
const NODE_USER: &str = "system:node:";
/// Group of nodes.
const NODES: &str = "system:nodes";

/// What to do with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours, answered already, or of an unknown machine.
    Leave,
    /// Approve, and sign this.
    Sign(Box<(SigningRequest, Leaf)>),
    /// Deny for this reason.
    Deny(String),
}

/// Judges a request, given the slots' addresses by name.
pub fn judge(csr: &CertificateSigningRequest, slots: &BTreeMap<String, Ipv4Addr>) -> Verdict {
    let spec = &csr.spec;
    let status = csr.status.as_ref();
    let answered = status.is_some_and(|status| {
        let refused = |condition: &str| condition == "Denied" || condition == "Failed";
        status.certificate.is_some()
            || status
                .conditions
                .iter()
                .flatten()
                .any(|condition| refused(&condition.type_))
    });
    if answered || ![CLIENT, SERVING].contains(&spec.signer_name.as_str()) {
        return Verdict::Leave;
    }
    let request = match SigningRequest::parse_pem(&spec.request.0) {
        Ok(request) => request,
        Err(error) => return Verdict::Deny(error.to_string()),
    };
    let Some(node) = request.common_name.strip_prefix(NODE_USER) else {
        return Verdict::Deny(format!("the common name must be {NODE_USER}<slot>"));
    };
    let Some(address) = slots.get(node) else {
        return Verdict::Leave;
    };
    let result = match spec.signer_name.as_str() {
        CLIENT => client(spec, &request, node),
        _ => serving(spec, &request, node, *address),
    };
    match result {
        Err(reason) => Verdict::Deny(reason),
        Ok(mut leaf) => {
            leaf.validity = validity(spec);
            Verdict::Sign(Box::new((request, leaf)))
        }
    }
}

fn client(spec: &CertificateSigningRequestSpec, request: &SigningRequest, node: &str) -> Result<Leaf, String> {
    let user = spec.username.as_deref().unwrap_or_default();
    let bootstrap = user == bootstrap_user(node) && in_group(spec, BOOTSTRAP_GROUP);
    let renewal = user == request.common_name && in_group(spec, NODES);
    if !bootstrap && !renewal {
        return Err(format!("{user:?} may not have a certificate for node {node:?}"));
    }
    if !request.sans.is_empty() {
        return Err("a client certificate has no subject alternative names".to_owned());
    }
    subject(request)?;
    usages(spec, "client auth")?;
    Ok(Leaf::client(&request.common_name, Some(NODES)))
}

fn serving(
    spec: &CertificateSigningRequestSpec,
    request: &SigningRequest,
    node: &str,
    address: Ipv4Addr,
) -> Result<Leaf, String> {
    let user = spec.username.as_deref().unwrap_or_default();
    if user != request.common_name || !in_group(spec, NODES) {
        return Err(format!("{user:?} may not have a serving certificate for node {node:?}"));
    }
    subject(request)?;
    usages(spec, "server auth")?;
    let own = [San::Dns(node.to_owned()), San::Ip(address.into())];
    if request.sans.is_empty() || request.sans.iter().any(|san| !own.contains(san)) {
        return Err(format!("only the names {node} and {address} may stand in it"));
    }
    let mut leaf = Leaf::server(&request.common_name, request.sans.clone());
    leaf.organization = Some(NODES.to_owned());
    Ok(leaf)
}

fn in_group(spec: &CertificateSigningRequestSpec, group: &str) -> bool {
    spec.groups.iter().flatten().any(|name| name == group)
}

fn subject(request: &SigningRequest) -> Result<(), String> {
    if request.organizations == [NODES] {
        Ok(())
    } else {
        Err(format!("the organization must be {NODES}"))
    }
}

fn usages(spec: &CertificateSigningRequestSpec, purpose: &str) -> Result<(), String> {
    let usages = spec.usages.iter().flatten().map(String::as_str);
    let mut found = false;
    for usage in usages {
        match usage {
            "digital signature" | "key encipherment" => {}
            usage if usage == purpose => found = true,
            usage => return Err(format!("the usage {usage:?} is not signed for kubelets")),
        }
    }
    if found {
        Ok(())
    } else {
        Err(format!("the usage {purpose:?} is missing"))
    }
}

/// What the request asks for, at most a leaf's usual life; the API server demands at least ten minutes.
fn validity(spec: &CertificateSigningRequestSpec) -> Duration {
    let asked = spec.expiration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    asked.map_or(LEAF_VALIDITY, |seconds| Duration::from_secs(seconds).min(LEAF_VALIDITY))
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use serde_json::json;

    use super::*;

    /// ECDSA P-256 requests made by `openssl req -new` for node customera-a-0 at 100.64.0.20.
    const CLIENT_PEM: &str = include_str!("testdata/client.csr");
    const SERVING_PEM: &str = include_str!("testdata/serving.csr");
    const FOREIGN_PEM: &str = include_str!("testdata/serving-foreign.csr");

    fn slots() -> BTreeMap<String, Ipv4Addr> {
        BTreeMap::from([
            ("customera-a-0".to_owned(), "100.64.0.20".parse().unwrap()),
            ("customera-a-1".to_owned(), "100.64.0.21".parse().unwrap()),
        ])
    }

    fn csr(signer: &str, user: &str, group: &str, usage: &str, pem: &str) -> CertificateSigningRequest {
        serde_json::from_value(json!({
            "metadata": {"name": "csr-1"},
            "spec": {
                "signerName": signer, "username": user, "groups": [group, "system:authenticated"],
                "usages": ["digital signature", usage], "request": STANDARD.encode(pem), "expirationSeconds": 3600,
            },
        }))
        .unwrap()
    }

    fn denied(csr: &CertificateSigningRequest) -> bool {
        matches!(judge(csr, &slots()), Verdict::Deny(_))
    }

    #[test]
    fn judge_signs_a_slots_first_certificate() {
        let csr = csr(
            CLIENT,
            "kubernest:bootstrap:customera-a-0",
            BOOTSTRAP_GROUP,
            "client auth",
            CLIENT_PEM,
        );
        let Verdict::Sign(signed) = judge(&csr, &slots()) else {
            panic!("not signed")
        };
        assert_eq!(signed.1.common_name, "system:node:customera-a-0");
        assert_eq!(signed.1.validity, Duration::from_secs(3600));
    }

    #[test]
    fn judge_signs_a_nodes_renewal_and_serving_certificate() {
        let user = "system:node:customera-a-0";
        let renewal = csr(CLIENT, user, NODES, "client auth", CLIENT_PEM);
        assert!(matches!(judge(&renewal, &slots()), Verdict::Sign(_)));
        let serving = csr(SERVING, user, NODES, "server auth", SERVING_PEM);
        let Verdict::Sign(signed) = judge(&serving, &slots()) else {
            panic!("not signed")
        };
        assert_eq!(
            signed.1.sans,
            [
                San::Dns("customera-a-0".into()),
                San::Ip("100.64.0.20".parse().unwrap())
            ]
        );
    }

    #[test]
    fn judge_denies_another_slots_identity() {
        let other = "kubernest:bootstrap:customera-a-1";
        assert!(denied(&csr(CLIENT, other, BOOTSTRAP_GROUP, "client auth", CLIENT_PEM)));
        assert!(denied(&csr(
            CLIENT,
            "system:node:customera-a-1",
            NODES,
            "client auth",
            CLIENT_PEM
        )));
        assert!(denied(&csr(
            SERVING,
            "system:node:customera-a-1",
            NODES,
            "server auth",
            SERVING_PEM
        )));
        assert!(denied(&csr(
            SERVING,
            "kubernest:bootstrap:customera-a-0",
            BOOTSTRAP_GROUP,
            "server auth",
            SERVING_PEM
        )));
    }

    #[test]
    fn judge_denies_the_user_name_without_its_group() {
        assert!(denied(&csr(
            CLIENT,
            "kubernest:bootstrap:customera-a-0",
            "x",
            "client auth",
            CLIENT_PEM
        )));
        assert!(denied(&csr(
            CLIENT,
            "system:node:customera-a-0",
            "x",
            "client auth",
            CLIENT_PEM
        )));
    }

    #[test]
    fn judge_denies_foreign_names_and_usages() {
        let user = "system:node:customera-a-0";
        assert!(denied(&csr(SERVING, user, NODES, "server auth", FOREIGN_PEM)));
        assert!(denied(&csr(SERVING, user, NODES, "client auth", SERVING_PEM)));
        assert!(denied(&csr(CLIENT, user, NODES, "server auth", CLIENT_PEM)));
        assert!(denied(&csr(CLIENT, user, NODES, "client auth", SERVING_PEM)));
        assert!(denied(&csr(CLIENT, user, NODES, "client auth", "garbage")));
    }

    #[test]
    fn judge_leaves_unknown_machines_and_other_signers() {
        let bootstrap = csr(
            CLIENT,
            "kubernest:bootstrap:customera-a-0",
            BOOTSTRAP_GROUP,
            "client auth",
            CLIENT_PEM,
        );
        assert_eq!(judge(&bootstrap, &BTreeMap::new()), Verdict::Leave);
        let user = csr(
            "kubernetes.io/kube-apiserver-client",
            "jane",
            "x",
            "client auth",
            CLIENT_PEM,
        );
        assert_eq!(judge(&user, &slots()), Verdict::Leave);
    }

    #[test]
    fn judge_leaves_what_was_answered() {
        let mut csr = csr(CLIENT, "system:node:customera-a-0", NODES, "client auth", CLIENT_PEM);
        csr.status = Some(serde_json::from_value(json!({"certificate": STANDARD.encode("x")})).unwrap());
        assert_eq!(judge(&csr, &slots()), Verdict::Leave);
    }
}
