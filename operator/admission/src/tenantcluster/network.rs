//! Pod network, pod and Service ranges.

use kubernest_crds::{Cni, TenantClusterSpec};

use crate::{
    Installation,
    addresses::{self, MACHINE_LINK, PODS, SERVICES},
    decision::Report,
};

const POD_CIDR: &str = "spec.network.podCIDR";
const SERVICE_CIDR: &str = "spec.network.serviceCIDR";

/// Checks the tenant's network.
pub fn check(report: &mut Report, installation: &Installation, spec: &TenantClusterSpec) {
    if spec.network.cni == Cni::Calico {
        report.not_supported("spec.network.cni", "calico is not supported yet, use flannel");
    }
    let pods = addresses::parse(report, POD_CIDR, &spec.network.pod_cidr, PODS);
    let services = addresses::parse(report, SERVICE_CIDR, &spec.network.service_cidr, SERVICES);
    if let Some(pods) = pods {
        let room = 1_i64 << (24 - pods.prefix_len());
        let nodes = i64::from(spec.control_plane.replicas)
            + spec.node_pools.iter().map(|pool| i64::from(pool.replicas)).sum::<i64>();
        if nodes > room {
            report.invalid(
                POD_CIDR,
                format!("\"{pods}\" has room for {room} nodes, a /24 each; {nodes} are asked for"),
            );
        }
    }
    addresses::apart(report, SERVICE_CIDR, services, pods, "the tenant's pods in");
    for (field, net) in [(POD_CIDR, pods), (SERVICE_CIDR, services)] {
        let pool = Some(installation.node_cidr_pool);
        addresses::apart(report, field, net, pool, "the addresses of tenants' nodes in");
        addresses::apart(report, field, net, Some(MACHINE_LINK), "the machines' own link");
    }
}
