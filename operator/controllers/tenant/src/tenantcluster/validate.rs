//! Parses a TenantCluster into what can be built. Without a client; what admission refuses is refused here again,
//! because objects may have been stored before a rule existed.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use ipnet::Ipv4Net;
use kube::ResourceExt;
use kubernest_crds::{CONTROL_PLANE_POOL, Cni, Issuer, NodePool, Storage, Taint, TenantCluster, quantity::Quantity};

use super::dereference::Surroundings;
use crate::options::{NodeImage, Options};

/// Prefix length of a node's share of the pod CIDR.
pub const NODE_POD_PREFIX: u8 = 24;
/// Infix of control-plane slots' names; no pool may have it.
const CONTROL_PLANE_INFIX: &str = "cp";
/// Host index of the first control-plane slot in the node CIDR.
pub const FIRST_CONTROL_PLANE_INDEX: u8 = 10;
/// Host index of the first pool slot in the node CIDR.
pub const FIRST_POOL_INDEX: u8 = 20;
/// Host index of the last slot: .255 is the broadcast address.
pub const LAST_INDEX: u8 = 254;

/// Why a TenantCluster can't be carried out as written.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {message}")]
pub struct Invalid {
    /// Path of the field.
    pub field: String,
    /// What is wrong, and what to write instead.
    pub message: String,
}

impl Invalid {
    fn new(field: &str, message: impl Into<String>) -> Self {
        Invalid {
            field: field.to_owned(),
            message: message.into(),
        }
    }
}

/// A version of Kubernetes whose flags we know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// As written, `v1.35.4`.
    pub text: String,
    /// The minor number, 35.
    pub minor: u32,
}

/// The shape of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Virtual CPUs.
    pub cpu: u32,
    /// Guest memory.
    pub memory: Quantity,
    /// Data disk.
    pub storage: Storage,
}

/// A group of equal slots: the control plane, or a node pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Name in labels and the slot table.
    pub name: String,
    /// Name as part of slots' names.
    pub infix: String,
    /// Whether its machines run the control plane.
    pub control_plane: bool,
    /// Number of slots.
    pub replicas: u32,
    /// Shape of each.
    pub shape: Shape,
    /// Labels of its nodes.
    pub labels: BTreeMap<String, String>,
    /// Taints of its nodes.
    pub taints: Vec<Taint>,
}

/// A TenantCluster that can be built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Validated {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its UID.
    pub uid: String,
    /// Kubernetes version.
    pub version: Version,
    /// The image of that version.
    pub image: NodeImage,
    /// Host name that users reach the API server at.
    pub host: String,
    /// Port that users reach the API server at.
    pub port: u16,
    /// Addresses of pods.
    pub pod_cidr: Ipv4Net,
    /// Addresses of Services.
    pub service_cidr: Ipv4Net,
    /// The control plane first, then the node pools in the order of the spec.
    pub pools: Vec<Pool>,
}

impl Validated {
    /// `https://host:port` for users.
    pub fn endpoint(&self) -> String {
        format!("https://{}:{}", self.host, self.port)
    }

    /// The n-th address of the service CIDR: 1 is the API server's Service, 10 is DNS.
    pub fn service_ip(&self, n: u32) -> std::net::Ipv4Addr {
        std::net::Ipv4Addr::from(u32::from(self.service_cidr.network()) + n)
    }
}

/// Parses `cluster`, which may have its version for longer than that is offered, and whose host name may be another's.
pub fn among(cluster: &TenantCluster, options: &Options, found: &Surroundings) -> Result<Validated, Invalid> {
    let mut options = Cow::Borrowed(options);
    if let Some(image) = &found.image {
        // No new cluster can have it any more; one that has it goes on with its own.
        let images = &mut options.to_mut().node_images.0;
        images.entry(cluster.spec.version.clone()).or_insert(image.clone());
    }
    let valid = validate(cluster, &options)?;
    match &found.first_of_host {
        Some(first) if first.is_senior_to(cluster) => Err(Invalid::new(
            "spec.access.hostname",
            format!(
                "{} belongs to another TenantCluster: make this one anew with a name of its own",
                valid.host
            ),
        )),
        _ => Ok(valid),
    }
}

/// Parses `cluster` by itself.
pub fn validate(cluster: &TenantCluster, options: &Options) -> Result<Validated, Invalid> {
    let spec = &cluster.spec;
    let (version, image) = version(&spec.version, options)?;
    if spec.network.cni != Cni::Flannel {
        return Err(Invalid::new("spec.network.cni", "only flannel is supported yet"));
    }
    if spec.pki.issuer != Issuer::Embedded {
        return Err(Invalid::new("spec.pki.issuer", "only Embedded is supported yet"));
    }
    let pod_cidr = cidr("spec.network.podCIDR", &spec.network.pod_cidr, NODE_POD_PREFIX)?;
    let service_cidr = cidr("spec.network.serviceCIDR", &spec.network.service_cidr, 27)?;
    disjoint(
        ("spec.network.podCIDR", pod_cidr),
        ("spec.network.serviceCIDR", service_cidr),
    )?;
    disjoint(
        ("spec.network.podCIDR", pod_cidr),
        ("the operator's node CIDR pool", options.node_cidr_pool),
    )?;
    disjoint(
        ("spec.network.serviceCIDR", service_cidr),
        ("the operator's node CIDR pool", options.node_cidr_pool),
    )?;

    let control_plane = &spec.control_plane;
    if control_plane.replicas != 1 {
        return Err(Invalid::new("spec.controlPlane.replicas", "only 1 is supported yet"));
    }
    let shape = shape(
        "spec.controlPlane",
        control_plane.cpu,
        &control_plane.memory,
        &control_plane.storage,
    )?;
    let mut pools = vec![Pool {
        name: CONTROL_PLANE_POOL.to_owned(),
        infix: CONTROL_PLANE_INFIX.to_owned(),
        control_plane: true,
        replicas: 1,
        shape,
        labels: BTreeMap::new(),
        taints: Vec::new(),
    }];
    let mut names = BTreeSet::from([CONTROL_PLANE_POOL, CONTROL_PLANE_INFIX]);
    for (i, node_pool) in spec.node_pools.iter().enumerate() {
        let field = format!("spec.nodePools[{i}]");
        if !names.insert(&node_pool.name) {
            let message = format!(
                "{:?} is taken: give each pool a name of its own, other than cp",
                node_pool.name
            );
            return Err(Invalid::new(&format!("{field}.name"), message));
        }
        pools.push(pool(&field, node_pool)?);
    }
    let workers: u64 = pools.iter().skip(1).map(|pool| u64::from(pool.replicas)).sum();
    let room = u64::from(LAST_INDEX - FIRST_POOL_INDEX) + 1;
    if workers > room {
        return Err(Invalid::new(
            "spec.nodePools",
            format!("{workers} machines are more than the {room} addresses"),
        ));
    }
    Ok(Validated {
        name: cluster.name_any(),
        namespace: cluster.namespace().unwrap_or_default(),
        uid: cluster.uid().unwrap_or_default(),
        version,
        image,
        host: cluster.host(&options.base_domain),
        port: options.ingress_port,
        pod_cidr,
        service_cidr,
        pools,
    })
}

fn version(text: &str, options: &Options) -> Result<(Version, NodeImage), Invalid> {
    let invalid = |message: String| Invalid::new("spec.version", message);
    let image = options.node_images.0.get(text).ok_or_else(|| {
        invalid(format!(
            "there is no node image for {text:?}; the operator has: {}",
            options.node_images.versions()
        ))
    })?;
    let minor = text
        .strip_prefix("v1.")
        .and_then(|rest| rest.split_once('.'))
        .and_then(|(minor, _)| minor.parse().ok())
        .ok_or_else(|| invalid(format!("{text:?} is not of the form v1.<minor>.<patch>")))?;
    Ok((
        Version {
            text: text.to_owned(),
            minor,
        },
        image.clone(),
    ))
}

fn cidr(field: &str, text: &str, longest: u8) -> Result<Ipv4Net, Invalid> {
    let net: Ipv4Net = text
        .parse()
        .map_err(|_| Invalid::new(field, format!("{text:?} is not an IPv4 CIDR such as 10.10.0.0/16")))?;
    if net != net.trunc() {
        return Err(Invalid::new(
            field,
            format!("{text} has host bits set: write {}", net.trunc()),
        ));
    }
    if net.prefix_len() > longest {
        return Err(Invalid::new(
            field,
            format!("{text} is too small: a /{longest} or larger is needed"),
        ));
    }
    Ok(net)
}

fn disjoint((field, a): (&str, Ipv4Net), (other, b): (&str, Ipv4Net)) -> Result<(), Invalid> {
    if a.contains(&b) || b.contains(&a) {
        return Err(Invalid::new(field, format!("{a} overlaps {b} ({other})")));
    }
    Ok(())
}

fn shape(field: &str, cpu: i32, memory: &Quantity, storage: &Storage) -> Result<Shape, Invalid> {
    let positive = |name: &str, value: &Quantity| match value.value() {
        Ok(bytes) if bytes > 0 => Ok(()),
        _ => Err(Invalid::new(
            &format!("{field}.{name}"),
            format!("{:?} is not a positive quantity", value.0),
        )),
    };
    positive("memory", memory)?;
    positive("storage.size", &storage.size)?;
    let cpu = u32::try_from(cpu).ok().filter(|cpu| *cpu > 0);
    let cpu = cpu.ok_or_else(|| Invalid::new(&format!("{field}.cpu"), "at least 1 is needed"))?;
    Ok(Shape {
        cpu,
        memory: memory.clone(),
        storage: storage.clone(),
    })
}

fn pool(field: &str, pool: &NodePool) -> Result<Pool, Invalid> {
    let replicas =
        u32::try_from(pool.replicas).map_err(|_| Invalid::new(&format!("{field}.replicas"), "must not be negative"))?;
    Ok(Pool {
        name: pool.name.clone(),
        infix: pool.name.clone(),
        control_plane: false,
        replicas,
        shape: shape(field, pool.cpu, &pool.memory, &pool.storage)?,
        labels: pool.labels.clone(),
        taints: pool.taints.clone(),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// Flags as the demo has them.
    pub(crate) fn options() -> Options {
        Options {
            node_images: r#"{"v1.35.4":{"image":"localhost/kubernest-node@sha256:1","kernelArgs":"root=LABEL=kubernest-root quiet","emulationKernelArgs":"mitigations=off"},"v1.34.4":{"image":"localhost/kubernest-node@sha256:2"}}"#
                .parse()
                .unwrap(),
            node_cidr_pool: "100.64.0.0/10".parse().unwrap(),
            base_domain: "kubernest.local".to_owned(),
            ingress_port: 6443,
        }
    }

    /// A cluster with this spec.
    pub(crate) fn cluster(spec: serde_json::Value) -> TenantCluster {
        serde_json::from_value(json!({
            "apiVersion": "kubernest.io/v1alpha1", "kind": "TenantCluster",
            "metadata": {"name": "customera", "namespace": "org-acme", "uid": "u-1", "generation": 1},
            "spec": spec,
        }))
        .unwrap()
    }

    #[test]
    fn validate_defaults_are_one_control_plane_and_one_worker() {
        let valid = validate(&cluster(json!({"version": "v1.35.4"})), &options()).unwrap();
        assert_eq!(
            valid
                .pools
                .iter()
                .map(|pool| (pool.infix.as_str(), pool.replicas))
                .collect::<Vec<_>>(),
            [("cp", 1), ("default", 1)]
        );
        assert_eq!(valid.version.minor, 35);
        assert_eq!(valid.endpoint(), "https://customera.org-acme.kubernest.local:6443");
        assert_eq!(valid.service_ip(10).to_string(), "10.11.0.10");
    }

    #[test]
    fn validate_among_leaves_a_host_name_with_the_older_cluster() {
        let asks = |name: &str, created: &str| {
            let mut cluster = cluster(json!({"version": "v1.35.4", "access": {"hostname": "api.example.com"}}));
            cluster.metadata.name = Some(name.into());
            cluster.metadata.creation_timestamp = serde_json::from_value(json!(created)).unwrap();
            cluster
        };
        let (old, young) = (asks("b", "2026-01-01T00:00:00Z"), asks("a", "2026-01-02T00:00:00Z"));
        let found = Surroundings {
            first_of_host: Some(old.clone()),
            ..Surroundings::default()
        };
        let refused = among(&young, &options(), &found).unwrap_err();
        assert_eq!(refused.field, "spec.access.hostname");
        assert!(refused.message.contains("belongs to another"), "{}", refused.message);
        assert_eq!(among(&old, &options(), &found).unwrap().host, "api.example.com");
        assert!(among(&young, &options(), &Surroundings::default()).is_ok());
    }

    #[test]
    fn validate_among_keeps_a_version_that_is_offered_no_more() {
        let cluster = cluster(json!({"version": "v1.33.9"}));
        let image = options().node_images.0["v1.34.4"].clone();
        let found = Surroundings {
            image: Some(image.clone()),
            ..Surroundings::default()
        };
        assert_eq!(among(&cluster, &options(), &found).unwrap().image, image);
        let refused = among(&cluster, &options(), &Surroundings::default()).unwrap_err();
        assert_eq!(refused.field, "spec.version");
    }

    #[test]
    fn validate_names_the_field() {
        let field = |spec| validate(&cluster(spec), &options()).unwrap_err().field;
        let v = "v1.35.4";
        assert_eq!(field(json!({"version": "v1.2.3"})), "spec.version");
        assert_eq!(
            field(json!({"version": v, "controlPlane": {"replicas": 2}})),
            "spec.controlPlane.replicas"
        );
        assert_eq!(
            field(json!({"version": v, "network": {"podCIDR": "10.10.0.1/16"}})),
            "spec.network.podCIDR"
        );
        assert_eq!(
            field(json!({"version": v, "network": {"podCIDR": "10.0.0.0/8", "serviceCIDR": "10.11.0.0/16"}})),
            "spec.network.podCIDR"
        );
        assert_eq!(
            field(json!({"version": v, "network": {"podCIDR": "100.64.0.0/16"}})),
            "spec.network.podCIDR"
        );
        assert_eq!(
            field(json!({"version": v, "nodePools": [{"name": "cp"}]})),
            "spec.nodePools[0].name"
        );
        assert_eq!(
            field(json!({"version": v, "nodePools": [{"name": "a", "memory": "0"}]})),
            "spec.nodePools[0].memory"
        );
        assert_eq!(
            field(json!({"version": v, "nodePools": [{"name": "a", "replicas": 236}]})),
            "spec.nodePools"
        );
    }
}
