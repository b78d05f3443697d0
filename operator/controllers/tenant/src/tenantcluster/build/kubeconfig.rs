//! The admin kubeconfig of a tenant, for people outside the outer cluster. Kept as long as it serves.

use jiff::Timestamp;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kubernest_pki::{CertificateInfo, Credential, Kubeconfig, KubeconfigAuth, Leaf};

use super::{
    metadata,
    pki::{ADMIN_GROUP, Authorities, Authority, SECRET_TYPE},
};
use crate::tenantcluster::validate::Validated;

/// Key of the kubeconfig in its Secret (Cluster API).
pub const VALUE: &str = "value";
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";

/// Name of the Secret.
pub fn secret_name(cluster: &str) -> String {
    format!("{cluster}-kubeconfig")
}

/// Who the admin is.
pub fn leaf() -> Leaf {
    Leaf::client("kubernest:admin", Some(ADMIN_GROUP))
}

/// The stored credential, if it still serves.
pub fn reuse(stored: Option<&Secret>, authorities: &Authorities, now: Timestamp) -> Option<Credential> {
    let data = stored?.data.as_ref()?;
    let text = |key: &str| String::from_utf8(data.get(key)?.0.clone()).ok();
    let (chain_pem, key_pem) = (text(CERTIFICATE)?, text(KEY)?);
    let info = CertificateInfo::from_pem(&chain_pem).ok()?;
    let ca = CertificateInfo::from_pem(authorities.issuer(Authority::Cluster).certificate_pem()).ok()?;
    let good = info.serves(&leaf()) && info.signed_by(&ca) && !info.needs_renewal(now);
    good.then_some(Credential {
        chain_pem,
        key_pem,
        not_after: info.not_after,
    })
}

/// The Secret. Beside the kubeconfig it holds the credential on its own, from which the kubeconfig can be made anew.
pub fn secret(valid: &Validated, authorities: &Authorities, credential: &Credential) -> Secret {
    let text = Kubeconfig {
        cluster: &valid.name,
        user: &format!("{}-admin", valid.name),
        server: &valid.endpoint(),
        ca_pem: authorities.issuer(Authority::Cluster).certificate_pem(),
        auth: KubeconfigAuth::Inline(credential),
    }
    .render();
    let data = [
        (VALUE, &text),
        (CERTIFICATE, &credential.chain_pem),
        (KEY, &credential.key_pem),
    ];
    Secret {
        metadata: metadata(valid, secret_name(&valid.name)),
        type_: Some(SECRET_TYPE.to_owned()),
        data: Some(
            data.map(|(key, value)| (key.to_owned(), ByteString(value.clone().into_bytes())))
                .into(),
        ),
        ..Secret::default()
    }
}
