//! Carries out the verdicts on kubelets' certificate requests (`csr.rs`) in a tenant: approves, signs, denies.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher, RandomState},
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, Patch, PatchParams},
    runtime::reflector::ObjectRef,
};
use kubernest_crds::TenantCluster;
use kubernest_pki::Issuer;
use serde_json::json;

use super::{
    build::pki::{Authorities, Authority},
    csr::{Verdict, judge},
    link::{LinkError, PAGE, clip},
};

/// Pages of requests that are read at most: the tenant's API server says whether there are more.
const PAGES: u32 = 100;
/// Answered requests that are remembered at most.
const ANSWERED: usize = 4096;

/// Addresses of slots by name.
pub type Slots = BTreeMap<String, Ipv4Addr>;

/// Answers the requests of one tenant.
pub struct Signer {
    client: Client,
    cluster: ObjectRef<TenantCluster>,
    authorities: Arc<Authorities>,
    /// Hashes of the uids: a tenant makes them as long as it likes.
    answered: Mutex<BTreeSet<u64>>,
    hasher: RandomState,
}

impl Signer {
    /// A signer that remembers nothing yet.
    pub fn new(client: Client, cluster: ObjectRef<TenantCluster>, authorities: Arc<Authorities>) -> Self {
        Signer {
            client,
            cluster,
            authorities,
            answered: Mutex::default(),
            hasher: RandomState::new(),
        }
    }

    /// Forgets what it answered: the requests are about to be read again.
    pub fn forget(&self) {
        self.answered().clear();
    }

    fn answered(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers all requests, after slots have changed.
    pub async fn answer_all(&self, slots: &Slots) -> Result<(), LinkError> {
        let api = Api::<CertificateSigningRequest>::all(self.client.clone());
        let mut page = ListParams::default().limit(PAGE);
        for _ in 0..PAGES {
            let listed = api.list(&page).await;
            let listed = listed.map_err(|source| LinkError::Api("list certificate requests", source))?;
            page.continue_token = listed.metadata.continue_.clone().filter(|token| !token.is_empty());
            for csr in listed {
                self.answer(&csr, slots).await?;
            }
            if page.continue_token.is_none() {
                return Ok(());
            }
        }
        let most = PAGES * PAGE;
        tracing::warn!(cluster = %self.cluster, most, "the tenant has more certificate requests than are read; the rest wait");
        Ok(())
    }

    /// Answers a request once. Our own approval comes back as an event before the certificate does; signing on that one
    /// too would be refused, since a certificate can't be replaced.
    pub async fn answer(&self, csr: &CertificateSigningRequest, slots: &Slots) -> Result<(), LinkError> {
        let uid = self.hasher.hash_one(csr.uid());
        if self.answered().contains(&uid) {
            return Ok(());
        }
        let verdict = judge(csr, slots);
        let name = csr.name_any();
        match verdict {
            Verdict::Leave => return Ok(()),
            Verdict::Deny(reason) => {
                let (name, told) = (clip(&name), clip(&reason));
                tracing::warn!(cluster = %self.cluster, csr = name, reason = told, "denies a kubelet's certificate request");
                self.conclude(csr, "Denied", &reason).await?;
            }
            Verdict::Sign(signed) => {
                let (request, leaf) = *signed;
                let issuer = self.authorities.issuer(Authority::Cluster);
                let certificate = issuer.sign(&request, &leaf).await.map_err(LinkError::Sign)?;
                self.conclude(csr, "Approved", "a slot of this cluster").await?;
                let body = json!({"status": {"certificate": ByteString(certificate.chain_pem.into_bytes())}});
                let api = Api::<CertificateSigningRequest>::all(self.client.clone());
                let subject = leaf.common_name;
                tracing::info!(cluster = %self.cluster, csr = clip(&name), subject, "signs a kubelet's certificate");
                settled(
                    api.patch_status(&name, &PatchParams::default(), &Patch::Merge(body))
                        .await,
                )?;
            }
        }
        let mut answered = self.answered();
        if answered.len() >= ANSWERED {
            answered.clear();
        }
        answered.insert(uid);
        Ok(())
    }

    async fn conclude(&self, csr: &CertificateSigningRequest, type_: &str, message: &str) -> Result<(), LinkError> {
        let conditions = csr
            .status
            .as_ref()
            .and_then(|status| status.conditions.clone())
            .unwrap_or_default();
        if conditions.iter().any(|condition| condition.type_ == type_) {
            return Ok(());
        }
        let now = Some(Time(Timestamp::now()));
        let condition = CertificateSigningRequestCondition {
            type_: type_.to_owned(),
            status: "True".to_owned(),
            reason: Some("Kubernest".to_owned()),
            message: Some(message.to_owned()),
            last_update_time: now.clone(),
            last_transition_time: now,
        };
        let body = json!({"status": {"conditions": [condition]}});
        let api = Api::<CertificateSigningRequest>::all(self.client.clone());
        settled(
            api.patch_approval(&csr.name_any(), &PatchParams::default(), &Patch::Merge(body))
                .await,
        )
    }
}

fn settled<T>(result: kube::Result<T>) -> Result<(), LinkError> {
    match result {
        // 404: it is gone; 422: another operator has answered it, and answers can't be changed.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 422) => Ok(()),
        other => other
            .map(drop)
            .map_err(|source| LinkError::Api("take a certificate", source)),
    }
}
