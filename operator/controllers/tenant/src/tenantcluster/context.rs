//! What reconciles share: clients, flags, and one connection a tenant. Decides nothing.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use futures::channel::mpsc;
use kube::runtime::reflector::ObjectRef;
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

    pub(super) fn link(&self, uid: &str) -> Option<Arc<Link>> {
        self.links
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(uid)
            .cloned()
    }

    pub(super) fn set_link(&self, uid: &str, link: Option<Arc<Link>>) {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        match link {
            Some(link) => links.insert(uid.to_owned(), link),
            None => links.remove(uid),
        };
    }
}
