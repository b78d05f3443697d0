//! Which CAs, keys and certificates a tenant has, and what each says. Signing is the issuer's; storing is `apply`'s.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use jiff::Timestamp;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::ResourceExt;
use kubernest_pki::{
    CaMaterial, CertificateInfo, Credential, EmbeddedError, EmbeddedIssuer, IssueError, Issuer, KeyMaterial, Leaf,
    RandomError, San, Usage, issue, random_bytes,
};

use super::{metadata, network::api_service_name, slots::Slot};
use crate::tenantcluster::validate::Validated;

/// Type that Cluster API gives a cluster's Secrets.
pub const SECRET_TYPE: &str = "cluster.x-k8s.io/secret";
/// Key of a certificate (Cluster API, kubernetes.io/tls).
const CERTIFICATE: &str = "tls.crt";
/// Key of a private key (Cluster API, kubernetes.io/tls).
const KEY: &str = "tls.key";
/// Key of the encryption key: 32 random bytes for secretbox.
const ENCRYPTION_KEY: &str = "key";

/// Group of kubelets that have no certificate yet; may make certificate requests, nothing else.
pub const BOOTSTRAP_GROUP: &str = "kubernest:bootstrappers";
/// Group that holders of the admin kubeconfig are in; bound to cluster-admin, so that it can be unbound.
pub const ADMIN_GROUP: &str = "kubernest:cluster-admins";
/// User name of a slot's kubelet before it has a certificate.
pub fn bootstrap_user(slot: &str) -> String {
    format!("kubernest:bootstrap:{slot}")
}

/// User that kube-apiserver is for kubelets.
pub const KUBELET_CLIENT: &str = "kube-apiserver-kubelet-client";
/// Name that kube-apiserver has for aggregated API servers.
pub const FRONT_PROXY_CLIENT: &str = "front-proxy-client";

/// A CA of the tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Authority {
    /// Signs everything but the below.
    Cluster,
    /// etcd's servers, peers and clients.
    Etcd,
    /// kube-apiserver as a client of aggregated API servers.
    FrontProxy,
}

/// Why the tenant's keys can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Something can't be made.
    #[error("making {0} failed")]
    Make(&'static str, #[source] EmbeddedError),
    /// No random bytes.
    #[error("making the encryption key failed")]
    Random(#[source] RandomError),
    /// A Secret lacks a key, or holds something else there.
    #[error("Secret {secret} has no usable {key:?}: restore it from a backup; a new one would lock the cluster out")]
    Damaged {
        /// The Secret.
        secret: String,
        /// Its key.
        key: &'static str,
    },
    /// A Secret of that name is not ours.
    #[error("Secret {secret} exists and does not belong to this TenantCluster: delete or rename it")]
    Foreign {
        /// The Secret.
        secret: String,
    },
    /// A stored CA can't sign.
    #[error("the CA in Secret {secret} can't be used")]
    Authority {
        /// The Secret.
        secret: String,
        /// Why.
        #[source]
        source: EmbeddedError,
    },
    /// A certificate was not issued.
    #[error("issuing {name} failed")]
    Issue {
        /// Which one.
        name: String,
        /// Why.
        #[source]
        source: IssueError,
    },
}

/// The Secrets that are made once in a tenant's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// A CA.
    Ca(Authority),
    /// Key pair that signs service-account tokens.
    ServiceAccount,
    /// Key that encrypts Secrets in etcd.
    Encryption,
}

impl Origin {
    /// All of them.
    pub const ALL: [Origin; 5] = [
        Origin::Ca(Authority::Cluster),
        Origin::Ca(Authority::Etcd),
        Origin::Ca(Authority::FrontProxy),
        Origin::ServiceAccount,
        Origin::Encryption,
    ];

    /// Name of its Secret.
    pub fn secret_name(self, cluster: &str) -> String {
        let suffix = match self {
            Origin::Ca(Authority::Cluster) => "ca",
            Origin::Ca(Authority::Etcd) => "etcd",
            Origin::Ca(Authority::FrontProxy) => "proxy",
            Origin::ServiceAccount => "sa",
            Origin::Encryption => "encryption",
        };
        format!("{cluster}-{suffix}")
    }

    /// A new Secret of it. To be created, never applied: what exists wins.
    pub fn generate(self, valid: &Validated) -> Result<Secret, PkiError> {
        let ca = |name: &str| {
            let made = CaMaterial::generate(name).map_err(|source| PkiError::Make("a CA", source))?;
            Ok((made.certificate_pem, made.key_pem))
        };
        let pair = |(certificate, key): (String, String)| {
            BTreeMap::from([
                (CERTIFICATE.to_owned(), certificate.into()),
                (KEY.to_owned(), key.into()),
            ])
        };
        let data: BTreeMap<String, Vec<u8>> = match self {
            Origin::Ca(Authority::Cluster) => pair(ca("kubernetes")?),
            Origin::Ca(Authority::Etcd) => pair(ca("etcd")?),
            Origin::Ca(Authority::FrontProxy) => pair(ca("front-proxy")?),
            Origin::ServiceAccount => {
                let made = KeyMaterial::generate().map_err(|source| PkiError::Make("the token key", source))?;
                pair((made.public_pem, made.private_pem))
            }
            Origin::Encryption => {
                let key: [u8; 32] = random_bytes().map_err(PkiError::Random)?;
                BTreeMap::from([(ENCRYPTION_KEY.to_owned(), key.to_vec())])
            }
        };
        Ok(Secret {
            metadata: metadata(valid, self.secret_name(&valid.name)),
            type_: Some(SECRET_TYPE.to_owned()),
            immutable: Some(true),
            data: Some(data.into_iter().map(|(key, value)| (key, ByteString(value))).collect()),
            ..Secret::default()
        })
    }
}

/// What the origins hold, ready for use.
pub struct Authorities {
    cluster: EmbeddedIssuer,
    etcd: EmbeddedIssuer,
    front_proxy: EmbeddedIssuer,
    /// Signs service-account tokens.
    pub service_account: KeyMaterial,
    /// Encrypts Secrets in etcd.
    pub encryption_key: Vec<u8>,
}

impl Authorities {
    /// Reads the stored Secrets back.
    pub fn parse(valid: &Validated, secrets: &BTreeMap<Origin, Secret>) -> Result<Self, PkiError> {
        let ca = |authority| {
            let (secret, certificate_pem, key_pem) = pair(valid, secrets, Origin::Ca(authority))?;
            EmbeddedIssuer::new(&CaMaterial {
                certificate_pem,
                key_pem,
            })
            .map_err(|source| PkiError::Authority { secret, source })
        };
        let (_, public_pem, private_pem) = pair(valid, secrets, Origin::ServiceAccount)?;
        let encryption = secrets.get(&Origin::Encryption);
        let encryption_key = encryption.and_then(|secret| secret.data.as_ref()?.get(ENCRYPTION_KEY));
        Ok(Authorities {
            cluster: ca(Authority::Cluster)?,
            etcd: ca(Authority::Etcd)?,
            front_proxy: ca(Authority::FrontProxy)?,
            service_account: KeyMaterial {
                public_pem,
                private_pem,
            },
            encryption_key: encryption_key
                .map(|bytes| bytes.0.clone())
                .filter(|key| key.len() == 32)
                .ok_or_else(|| PkiError::Damaged {
                    secret: Origin::Encryption.secret_name(&valid.name),
                    key: ENCRYPTION_KEY,
                })?,
        })
    }

    /// The issuer of one CA.
    pub fn issuer(&self, authority: Authority) -> &EmbeddedIssuer {
        match authority {
            Authority::Cluster => &self.cluster,
            Authority::Etcd => &self.etcd,
            Authority::FrontProxy => &self.front_proxy,
        }
    }

    /// The CAs by the name they have in status.
    pub fn expiries(&self) -> [(&'static str, Timestamp); 3] {
        [
            ("ca", self.cluster.not_after()),
            ("etcd", self.etcd.not_after()),
            ("proxy", self.front_proxy.not_after()),
        ]
    }
}

fn pair(
    valid: &Validated,
    secrets: &BTreeMap<Origin, Secret>,
    origin: Origin,
) -> Result<(String, String, String), PkiError> {
    let secret = origin.secret_name(&valid.name);
    let stored = secrets.get(&origin).and_then(|secret| secret.data.as_ref());
    let text = |key| {
        let bytes = stored.and_then(|data| data.get(key));
        let text = bytes.and_then(|bytes| String::from_utf8(bytes.0.clone()).ok());
        text.ok_or_else(|| PkiError::Damaged {
            secret: secret.clone(),
            key,
        })
    };
    Ok((secret.clone(), text(CERTIFICATE)?, text(KEY)?))
}

/// A certificate that some program of a slot has, by the stem of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Stem of its keys in the Secret: `<name>.crt`, `<name>.key`.
    pub name: &'static str,
    /// Who signs it.
    pub authority: Authority,
    /// What it says.
    pub leaf: Leaf,
}

/// Every certificate of a slot. `cluster_ip` is the API Service's address in the outer cluster.
pub fn profiles(valid: &Validated, slot: &Slot, cluster_ip: IpAddr) -> Vec<Profile> {
    use Authority::{Cluster, Etcd, FrontProxy};
    let profile = |name, authority, leaf| Profile { name, authority, leaf };
    let mut all = vec![
        profile(
            "kubelet-bootstrap",
            Cluster,
            Leaf::client(bootstrap_user(&slot.name), Some(BOOTSTRAP_GROUP)),
        ),
        profile("kube-proxy", Cluster, Leaf::client("system:kube-proxy", None)),
    ];
    if !slot.is_control_plane() {
        return all;
    }
    let here = || vec![dns(&slot.name), dns("localhost"), ip(slot.ip), ip(Ipv4Addr::LOCALHOST)];
    let mut api_names = here();
    api_names.extend(["kubernetes", "kubernetes.default", "kubernetes.default.svc"].map(dns));
    api_names.extend([
        dns("kubernetes.default.svc.cluster.local"),
        ip(valid.service_ip(1)),
        dns(&valid.host),
        dns(&format!("{}.{}.svc", api_service_name(&valid.name), valid.namespace)),
        San::Ip(cluster_ip),
    ]);
    all.extend([
        // etcd's gRPC gateway uses the server's certificate as a client's.
        profile(
            "etcd-server",
            Etcd,
            Leaf::server(&slot.name, here()).with_usage(Usage::Both),
        ),
        profile(
            "etcd-peer",
            Etcd,
            Leaf::server(&slot.name, here()).with_usage(Usage::Both),
        ),
        profile(
            "apiserver-etcd-client",
            Etcd,
            Leaf::client("kube-apiserver-etcd-client", None),
        ),
        profile("apiserver", Cluster, Leaf::server("kube-apiserver", api_names)),
        profile("apiserver-kubelet-client", Cluster, Leaf::client(KUBELET_CLIENT, None)),
        profile("front-proxy-client", FrontProxy, Leaf::client(FRONT_PROXY_CLIENT, None)),
        profile(
            "controller-manager",
            Cluster,
            Leaf::client("system:kube-controller-manager", None),
        ),
        profile(
            "controller-manager-server",
            Cluster,
            Leaf::server("kube-controller-manager", local()),
        ),
        profile("scheduler", Cluster, Leaf::client("system:kube-scheduler", None)),
        profile("scheduler-server", Cluster, Leaf::server("kube-scheduler", local())),
    ]);
    all
}

/// Credentials by profile name: what `stored` holds where it still serves, new ones otherwise.
pub async fn credentials(
    profiles: &[Profile],
    authorities: &Authorities,
    stored: Option<&Secret>,
    now: Timestamp,
) -> Result<BTreeMap<&'static str, Credential>, PkiError> {
    let mut all = BTreeMap::new();
    for profile in profiles {
        let issuer = authorities.issuer(profile.authority);
        let credential = match stored.and_then(|secret| reuse(secret, profile, issuer, now)) {
            Some(credential) => credential,
            None => issue(issuer, &profile.leaf).await.map_err(|source| PkiError::Issue {
                name: stored.map_or(String::new(), |secret| secret.name_any() + "/") + profile.name,
                source,
            })?,
        };
        all.insert(profile.name, credential);
    }
    Ok(all)
}

fn reuse(secret: &Secret, profile: &Profile, issuer: &EmbeddedIssuer, now: Timestamp) -> Option<Credential> {
    let text = |suffix: &str| {
        let bytes = secret.data.as_ref()?.get(&format!("{}.{suffix}", profile.name))?;
        String::from_utf8(bytes.0.clone()).ok()
    };
    let (chain_pem, key_pem) = (text("crt")?, text("key")?);
    let info = CertificateInfo::from_pem(&chain_pem).ok()?;
    let ca = CertificateInfo::from_pem(issuer.certificate_pem()).ok()?;
    let good = info.serves(&profile.leaf) && info.signed_by(&ca) && !info.needs_renewal(now);
    good.then_some(Credential {
        chain_pem,
        key_pem,
        not_after: info.not_after,
    })
}

/// A client certificate of the operator's own, kept in memory only. `system:masters`, because it makes the first
/// role bindings.
pub async fn operator_credential(authorities: &Authorities) -> Result<Credential, PkiError> {
    let leaf = Leaf::client("kubernest:operator", Some("system:masters"));
    let issuer: &dyn Issuer = authorities.issuer(Authority::Cluster);
    issue(issuer, &leaf).await.map_err(|source| PkiError::Issue {
        name: "the operator's certificate".to_owned(),
        source,
    })
}

fn dns(name: &str) -> San {
    San::Dns(name.to_owned())
}

fn ip(address: Ipv4Addr) -> San {
    San::Ip(address.into())
}

fn local() -> Vec<San> {
    vec![dns("localhost"), ip(Ipv4Addr::LOCALHOST)]
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;
    use crate::tenantcluster::{
        build::slots::{plan, tests::network},
        validate::{
            tests::{cluster, options},
            validate,
        },
    };

    pub(crate) fn authorities(valid: &Validated) -> Authorities {
        let secrets = Origin::ALL.map(|origin| (origin, origin.generate(valid).unwrap()));
        Authorities::parse(valid, &BTreeMap::from(secrets)).unwrap()
    }

    fn setup() -> (Validated, Vec<Slot>, Authorities) {
        let valid = validate(&cluster(json!({"version": "v1.35.4"})), &options()).unwrap();
        let slots = plan(&valid, &network(), &BTreeMap::new()).unwrap();
        let authorities = authorities(&valid);
        (valid, slots, authorities)
    }

    fn store(credentials: &BTreeMap<&str, Credential>) -> Secret {
        let data = credentials.iter().flat_map(|(name, credential)| {
            [
                (format!("{name}.crt"), ByteString(credential.chain_pem.clone().into())),
                (format!("{name}.key"), ByteString(credential.key_pem.clone().into())),
            ]
        });
        Secret {
            data: Some(data.collect()),
            ..Secret::default()
        }
    }

    #[tokio::test]
    async fn plan_pki_keeps_what_serves_and_renews_what_does_not() {
        let (valid, slots, authorities) = setup();
        let profiles = profiles(&valid, &slots[0], "10.96.0.7".parse().unwrap());
        let now = Timestamp::now();
        let first = credentials(&profiles, &authorities, None, now).await.unwrap();
        let stored = store(&first);
        assert_eq!(
            credentials(&profiles, &authorities, Some(&stored), now).await.unwrap(),
            first
        );
        let later = now + jiff::SignedDuration::from_hours(24 * 300);
        let renewed = credentials(&profiles, &authorities, Some(&stored), later)
            .await
            .unwrap();
        assert!(
            renewed
                .iter()
                .all(|(name, credential)| credential.key_pem != first[name].key_pem)
        );
        let moved = super::profiles(&valid, &slots[0], "10.96.0.8".parse().unwrap());
        let changed = credentials(&moved, &authorities, Some(&stored), now).await.unwrap();
        let differing: Vec<_> = changed.keys().filter(|name| changed[*name] != first[*name]).collect();
        assert_eq!(differing, [&"apiserver"]);
    }

    #[test]
    fn plan_pki_gives_workers_no_key_of_the_control_plane() {
        let (valid, slots, _) = setup();
        let names: Vec<_> = profiles(&valid, &slots[1], "10.96.0.7".parse().unwrap())
            .iter()
            .map(|profile| profile.name)
            .collect();
        assert_eq!(names, ["kubelet-bootstrap", "kube-proxy"]);
    }

    #[test]
    fn plan_pki_refuses_a_damaged_secret() {
        let (valid, _, _) = setup();
        let mut secrets: BTreeMap<_, _> = Origin::ALL
            .map(|origin| (origin, origin.generate(&valid).unwrap()))
            .into_iter()
            .collect();
        secrets.get_mut(&Origin::Encryption).unwrap().data = None;
        assert!(matches!(
            Authorities::parse(&valid, &secrets),
            Err(PkiError::Damaged { .. })
        ));
    }
}
