//! What happens to nodes in tests: killed, powered off, cut off, restored.
//!
//! It deliberately does not wait for Kubernetes to notice a fault; tests do, since that is what they test.

use k8s_openapi::{api::coordination::v1::Lease, jiff::Timestamp};
use kube::{Api, runtime::wait::await_condition};

use crate::{
    bed::{Error, Testbed},
    group, net,
    plan::Group,
};

pub(crate) async fn kill(bed: &Testbed, i: usize) -> Result<(), Error> {
    bed.plan.check_node(i)?;
    let _lock = bed.dir.lock()?;
    Ok(group::hold(&bed.plan, &bed.dir, Group::Node(i)).await?)
}

pub(crate) async fn power_off(bed: &Testbed, i: usize) -> Result<(), Error> {
    bed.plan.check_node(i)?;
    let _lock = bed.dir.lock()?;
    group::stop(&bed.plan, Group::Node(i)).await?;
    Ok(net::remove_netns(&bed.plan.netns(Group::Node(i))).await?)
}

pub(crate) async fn cut(bed: &Testbed, i: usize) -> Result<(), Error> {
    bed.plan.check_node(i)?;
    let _lock = bed.dir.lock()?;
    Ok(net::set_port(&bed.plan, i, false).await?)
}

pub(crate) async fn restore(bed: &Testbed, i: usize) -> Result<(), Error> {
    bed.plan.check_node(i)?;
    let _lock = bed.dir.lock()?;
    let since = Timestamp::now();
    if net::has_netns(&bed.plan, Group::Node(i)) && !net::port_joined(&bed.plan, i).await {
        net::set_port(&bed.plan, i, true).await?;
    }
    if group::supervisor(&bed.plan, Group::Node(i)).is_some() {
        group::resume(&bed.plan, Group::Node(i))?;
    }
    bed.boot(i).await?;
    let client = bed.client().await?;
    // Kubernetes may not have noticed the fault yet, so Ready alone proves nothing.
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kube-node-lease");
    let name = bed.plan.node_name(i);
    let renewed = await_condition(leases, &name, |lease: Option<&Lease>| {
        lease
            .and_then(|l| l.spec.as_ref()?.renew_time.as_ref())
            .is_some_and(|time| time.0 > since)
    });
    bed.within(&format!("the kubelet of {name}"), renewed).await?;
    bed.await_node(&client, i).await
}
