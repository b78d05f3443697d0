//! The tenant's network: which VNI and node CIDR, which address and MAC a host index has, and the objects made of it.
//! Allocates nothing itself: that is the API server's, through the uniqueness of names.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use k8s_openapi::{
    api::core::v1::{Service, ServicePort, ServiceSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::{
    ResourceExt,
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use kubernest_crds::{AllocationOwner, NetworkAllocation, SlotRole, labels};
use serde_json::json;

use super::metadata;
use crate::tenantcluster::validate::Validated;

/// VNI of index 0; below lie those that administrators use by hand.
pub const FIRST_VNI: u32 = 4097;
/// Largest VNI (RFC 7348: 24 bits).
const LAST_VNI: u32 = (1 << 24) - 1;
/// Prefix length of a tenant's node CIDR.
pub const NODE_PREFIX: u8 = 24;
/// MTU of the tenant network in bytes: 1500 less VXLAN's 50, less room for an encapsulated outer pod network.
pub const MTU: u32 = 1400;
/// Port of the API server, in the VM and of its Service.
pub const API_PORT: u16 = 6443;

/// A VNI and the node CIDR that goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// VXLAN network identifier.
    pub vni: u32,
    /// Addresses of the tenant's nodes, a /24.
    pub node_cidr: Ipv4Net,
}

/// Why there is no network for the tenant.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NetworkError {
    /// Every index is taken.
    #[error("no free VNI or node CIDR is left in {pool}: delete a TenantCluster, or give the operator a larger pool")]
    Exhausted {
        /// The pool.
        pool: Ipv4Net,
    },
    /// An allocation that was not written by us.
    #[error("NetworkAllocation {name} has the node CIDR {node_cidr:?}, which is not a /24: delete it")]
    Malformed {
        /// Its name.
        name: String,
        /// What stands there.
        node_cidr: String,
    },
}

impl Network {
    /// The i-th network of the pool.
    fn at(pool: Ipv4Net, index: u32) -> Option<Self> {
        let vni = FIRST_VNI.checked_add(index).filter(|vni| *vni <= LAST_VNI)?;
        let offset = index.checked_mul(1 << (32 - NODE_PREFIX))?;
        let address = Ipv4Addr::from(u32::from(pool.network()).checked_add(offset)?);
        if !pool.contains(&address) {
            return None;
        }
        Some(Network {
            vni,
            node_cidr: Ipv4Net::new(address, NODE_PREFIX).ok()?,
        })
    }

    /// Reads an allocation back.
    pub fn of(allocation: &NetworkAllocation) -> Result<Self, NetworkError> {
        let spec = &allocation.spec;
        match spec.node_cidr.parse::<Ipv4Net>() {
            Ok(node_cidr) if node_cidr.prefix_len() == NODE_PREFIX => Ok(Network {
                vni: spec.vni,
                node_cidr,
            }),
            _ => Err(NetworkError::Malformed {
                name: allocation.name_any(),
                node_cidr: spec.node_cidr.clone(),
            }),
        }
    }

    /// Address of the host with this index.
    pub fn address(&self, index: u8) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.node_cidr.network()) | u32::from(index))
    }

    /// Host index of an address of this network.
    pub fn index(&self, address: Ipv4Addr) -> Option<u8> {
        let inside = self.node_cidr.contains(&address);
        u8::try_from(u32::from(address) & 0xff).ok().filter(|_| inside)
    }

    /// MAC address of the host with this index: locally administered, unique over all tenants.
    pub fn mac(&self, index: u8) -> String {
        let [_, a, b, c] = self.vni.to_be_bytes();
        format!("02:{a:02x}:{b:02x}:{c:02x}:00:{index:02x}")
    }
}

/// The cluster's own allocation among all, if it has one. Should a race have given it several, `preferred` (what its
/// status says) wins, then the lowest.
pub fn own(allocations: &[NetworkAllocation], uid: &str, preferred: Option<u32>) -> Option<NetworkAllocation> {
    let mine = || allocations.iter().filter(|allocation| allocation.spec.owner.uid == uid);
    mine()
        .find(|allocation| Some(allocation.spec.vni) == preferred)
        .or_else(|| mine().min_by_key(|allocation| allocation.spec.vni))
        .cloned()
}

/// The allocation to try next: the lowest index that nobody has and that is not in `refused`.
pub fn candidate(
    valid: &Validated,
    pool: Ipv4Net,
    allocations: &[NetworkAllocation],
    refused: &BTreeSet<u32>,
) -> Result<NetworkAllocation, NetworkError> {
    let taken: BTreeSet<u32> = allocations.iter().map(|allocation| allocation.spec.vni).collect();
    let networks = (0..).map_while(|index| Network::at(pool, index));
    let free = networks
        .into_iter()
        .find(|network| !taken.contains(&network.vni) && !refused.contains(&network.vni));
    let network = free.ok_or(NetworkError::Exhausted { pool })?;
    let owner = AllocationOwner {
        namespace: valid.namespace.clone(),
        name: valid.name.clone(),
        uid: valid.uid.clone(),
    };
    Ok(NetworkAllocation::take(
        network.vni,
        network.node_cidr.to_string(),
        owner,
    ))
}

/// The kind NetworkAttachmentDefinition of Multus.
pub fn nad_kind() -> ApiResource {
    let gvk = GroupVersionKind::gvk("k8s.cni.cncf.io", "v1", "NetworkAttachmentDefinition");
    ApiResource::from_gvk_with_plural(&gvk, "network-attachment-definitions")
}

/// The network as Multus knows it, named as the cluster.
pub fn attachment(valid: &Validated, network: &Network) -> DynamicObject {
    let config = json!({
        "cniVersion": "1.0.0",
        "name": valid.name,
        "type": "kubernest-cni",
        "mode": "l2",
        "vni": network.vni,
        "mtu": MTU,
    });
    let mut object = DynamicObject::new(&valid.name, &nad_kind()).data(json!({"spec": {"config": config.to_string()}}));
    object.metadata = metadata(valid, valid.name.clone());
    object
}

/// Name of the Service before the API servers.
pub fn api_service_name(cluster: &str) -> String {
    format!("{cluster}-api")
}

/// The Service that reaches the API servers from the outer cluster.
pub fn api_service(valid: &Validated) -> Service {
    let selector = BTreeMap::from([
        (labels::CLUSTER.to_owned(), valid.name.clone()),
        (labels::ROLE.to_owned(), SlotRole::ControlPlane.as_str().to_owned()),
    ]);
    Service {
        metadata: metadata(valid, api_service_name(&valid.name)),
        spec: Some(ServiceSpec {
            selector: Some(selector),
            type_: Some("ClusterIP".to_owned()),
            ports: Some(vec![ServicePort {
                name: Some("https".to_owned()),
                port: i32::from(API_PORT),
                protocol: Some("TCP".to_owned()),
                target_port: Some(IntOrString::Int(i32::from(API_PORT))),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenantcluster::validate::{
        tests::{cluster, options},
        validate,
    };

    fn valid() -> Validated {
        validate(&cluster(json!({"version": "v1.35.4"})), &options()).unwrap()
    }

    fn taken(vni: u32, uid: &str) -> NetworkAllocation {
        let owner = AllocationOwner {
            namespace: "n".into(),
            name: "c".into(),
            uid: uid.into(),
        };
        NetworkAllocation::take(vni, "100.64.0.0/24".into(), owner)
    }

    #[test]
    fn plan_network_takes_the_lowest_free_index() {
        let pool = options().node_cidr_pool;
        let next = |all: &[NetworkAllocation]| candidate(&valid(), pool, all, &BTreeSet::new()).unwrap().spec;
        assert_eq!((next(&[]).vni, next(&[]).node_cidr), (4097, "100.64.0.0/24".to_owned()));
        let second = next(&[taken(4097, "x"), taken(4099, "y")]);
        assert_eq!((second.vni, second.node_cidr.as_str()), (4098, "100.64.1.0/24"));
    }

    #[test]
    fn plan_network_says_when_the_pool_is_exhausted() {
        let pool: Ipv4Net = "10.0.0.0/24".parse().unwrap();
        let error = candidate(&valid(), pool, &[taken(4097, "x")], &BTreeSet::new()).unwrap_err();
        assert_eq!(error, NetworkError::Exhausted { pool });
    }

    #[test]
    fn plan_network_reuses_its_own_after_a_crash() {
        let all = [taken(4097, "other"), taken(4099, "u-1"), taken(4098, "u-1")];
        assert_eq!(own(&all, "u-1", None).unwrap().spec.vni, 4098);
        assert_eq!(own(&all, "u-1", Some(4099)).unwrap().spec.vni, 4099);
        assert_eq!(own(&all, "u-2", None), None);
    }

    #[test]
    fn plan_network_addresses_and_macs_follow_from_the_index() {
        let network = Network {
            vni: 0x01_02_03,
            node_cidr: "100.64.7.0/24".parse().unwrap(),
        };
        assert_eq!(network.address(10).to_string(), "100.64.7.10");
        assert_eq!(network.mac(254), "02:01:02:03:00:fe");
        assert_eq!(network.index("100.64.7.20".parse().unwrap()), Some(20));
        assert_eq!(network.index("100.64.8.20".parse().unwrap()), None);
    }
}
