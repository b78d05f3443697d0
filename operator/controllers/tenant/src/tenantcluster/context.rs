//! What reconciles share: clients, flags, and one connection a tenant. Decides nothing.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::channel::mpsc;
use kube::{
    ResourceExt,
    runtime::reflector::{ObjectRef, Store},
};
use kubernest_crds::TenantCluster;
use kubernest_runtime::{Applier, events::Recorder};

use super::{
    build::network::API_PORT,
    link::{Link, View},
};
use crate::options::Options;

/// Where a tenant's API server is reached, given the address of its Service.
pub type Dial = Box<dyn Fn(IpAddr) -> String + Send + Sync>;

/// What reconciles share.
pub struct Context {
    /// Writes into the outer cluster.
    pub applier: Applier,
    /// Says what happened.
    pub recorder: Recorder,
    /// Flags.
    pub options: Options,
    /// Wakes the controller.
    pub wake: mpsc::UnboundedSender<ObjectRef<TenantCluster>>,
    /// Where a tenant is reached.
    pub dial: Dial,
    links: Mutex<HashMap<String, Arc<Link>>>,
}

impl Context {
    /// A context that reaches tenants at their Service's address.
    pub fn new(
        applier: Applier,
        recorder: Recorder,
        options: Options,
        wake: mpsc::UnboundedSender<ObjectRef<TenantCluster>>,
    ) -> Self {
        let dial: Dial = Box::new(|address| format!("https://{}", std::net::SocketAddr::new(address, API_PORT)));
        Context {
            applier,
            recorder,
            options,
            wake,
            dial,
            links: Mutex::default(),
        }
    }

    /// What is known of the tenant with this UID, if there is a connection to it.
    pub fn view(&self, uid: &str) -> Option<View> {
        Some(self.link(uid)?.view())
    }

    /// Ends the connections to tenants whose cluster is gone: one that lost its finalizer to somebody is never deleted by us.
    pub fn forget_gone(&self, clusters: &Store<TenantCluster>) {
        // Locked first: whoever has a connection now was in the store before.
        let mut links = self.links();
        let uids: HashSet<String> = clusters.state().iter().filter_map(|cluster| cluster.uid()).collect();
        links.retain(|uid, _| uids.contains(uid));
    }

    pub(super) fn link(&self, uid: &str) -> Option<Arc<Link>> {
        self.links().get(uid).cloned()
    }

    pub(super) fn set_link(&self, uid: &str, link: Option<Arc<Link>>) {
        match link {
            Some(link) => self.links().insert(uid.to_owned(), link),
            None => self.links().remove(uid),
        };
    }

    fn links(&self) -> MutexGuard<'_, HashMap<String, Arc<Link>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
